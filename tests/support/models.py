"""Small models and tokenizers for tests: real GPT-Neo and real BPE, built in seconds."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

from clippy_train.tokenizer import gpt2_tokenizer, train_bpe

WHITESPACE_TOKENS = ["\t\t", "  ", "    ", "        "]
GPT2_BPE = "CLIPPY_GPT2_BPE"  # environment variable: a folder with GPT-2's encoder.json and vocab.bpe

CODE = [
    "def greet(name):\n    '''Say hello to the user.'''\n    return 'hello ' + name\n",
    "class Stack:\n\tdef __init__(self):\n\t\tself.items = []\n\n\tdef push(self, item):\n\t\tself.items.append(item)",
    "for (int i = 0; i < n; ++i) {\n        total += values[i];\n}\n",
]


def gpt_neo(
    kinds: tuple[str, ...] = ("global", "local"),
    *,
    window: int = 16,
    positions: int = 64,
    hidden: int = 32,
    heads: int = 4,
    vocab_size: int = 97,
    dropout: float = 0.0,
    seed: int = 0,
) -> GPTNeoForCausalLM:
    """A random GPT-Neo with weights large enough that attention is far from uniform and biases are not zero.

    The weights are a function of the arguments: torch's own seed differs from process to process.
    """
    config = GPTNeoConfig(
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        hidden_size=hidden,
        num_layers=len(kinds),
        attention_types=[[[kind], 1] for kind in kinds],
        num_heads=heads,
        window_size=window,
        embed_dropout=dropout,
        attention_dropout=dropout,
        resid_dropout=dropout,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = GPTNeoForCausalLM(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def token_ids(batch: int, seq: int, vocab_size: int = 97, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def small_bpe() -> PreTrainedTokenizerFast:
    """The project's byte-level BPE trained on a few code strings, without whitespace tokens."""
    return train_bpe(CODE, vocab_size=330, model_max_length=64)


def gpt2_bpe() -> PreTrainedTokenizerFast:
    """GPT-2's real tokenizer; skips the test if its files are not available."""
    folder = os.environ.get(GPT2_BPE)
    if not folder:
        pytest.skip(f"set {GPT2_BPE} to a folder with GPT-2's encoder.json and vocab.bpe")
    merges = (Path(folder) / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    vocabulary = json.loads((Path(folder) / "encoder.json").read_text(encoding="utf-8"))
    tokenizer = gpt2_tokenizer(vocabulary, [merge.split(" ") for merge in merges if merge])
    tokenizer.model_max_length = 64
    return tokenizer


def base_folder(folder: Path, tokenizer: PreTrainedTokenizerFast, **shape: Any) -> Path:
    """Write a random model and its tokenizer as a Hugging Face folder, for a test to extend."""
    gpt_neo(vocab_size=len(tokenizer), **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
