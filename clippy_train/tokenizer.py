"""The GPT-2 style tokenizer with tokens for runs of white space.

Promise: decode(encode(x)) == x byte for byte on any text, with and without `skip_special_tokens`. The original
registered the white-space tokens as *special*, so decoding deleted all indentation; here they are plain added tokens.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer

from clippy_train.errors import ConfigError, first_line

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name: str | Path) -> Any:
    """Load a fast tokenizer from a folder or from the hub.

    Raises:
        ConfigError: there is none, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer could be loaded from {name}: {first_line(error)}") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {name} is not a fast tokenizer with an end-of-text token")
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, model_max_length: int) -> Any:
    """Train a byte-level BPE as GPT-2's: no normaliser, its splitting rule, end-of-text as the last id."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    trained = json.loads(core.to_str())["model"]
    # GPT-2's own class, and not the general one of today, which transformers 4 cannot load
    tokenizer = GPT2Tokenizer(trained["vocab"], [tuple(merge) for merge in trained["merges"]])
    tokenizer.model_max_length = model_max_length
    return tokenizer


def fingerprint(tokenizer: Any) -> str:
    """A hash of what decides the ids of a text, whatever file format and version of the library it came from."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = [core[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer")]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def add_whitespace_tokens(tokenizer: Any, tokens: list[str], matching: str) -> dict[str, list[int]]:
    """Add plain tokens to `tokenizer` in place, in the order given, those that it lacks.

    Args:
        matching: `longest` is how today's tokenizers library matches. In `first_listed`, as the library matched in
            2021, a token behind one of its own prefixes could never be produced; such tokens are left out (and taken
            out, where the tokenizer has them), and only their ids stay reserved.

    Returns:
        For each token that is new, the ids that its text had before.

    Raises:
        ConfigError: a token is empty, a left-out token is followed by one that is not, or it cannot be taken out; or
            the tokenizer has one as a *special* token, as the released tokenizers do.
    """
    if not all(tokens):
        raise ConfigError("tokenizer.whitespace_tokens: an empty token cannot be added")
    shadowed = [any(token.startswith(first) for first in tokens[:index]) for index, token in enumerate(tokens)]
    if matching == "longest":
        shadowed = [False] * len(tokens)
    elif shadowed != sorted(shadowed):
        raise ConfigError(
            "tokenizer.whitespace_tokens: with tokenizer.matching=first_listed, tokens that begin with an earlier one "
            "are never produced and must come last"
        )
    special = [each.content for each in tokenizer.added_tokens_decoder.values() if each.special]
    if set(special) & set(tokens):
        raise ConfigError(
            "the tokenizer registers white-space tokens as special, so decoding would delete all indentation: take one "
            "without them (tokenizer.base=EleutherAI/gpt-neo-125m); the model keeps its rows for them"
        )
    take_out(tokenizer, {token for token, left_out in zip(tokens, shadowed, strict=True) if left_out})
    vocabulary = tokenizer.get_vocab()
    new = [token for token, left_out in zip(tokens, shadowed, strict=True) if not left_out and token not in vocabulary]
    pieces = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in new}
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False, lstrip=False, rstrip=False, single_word=False) for t in new]
    )
    return pieces


def take_out(tokenizer: Any, tokens: set[str]) -> None:
    """Remove added tokens from a fast tokenizer in place; every other token keeps its id.

    Raises:
        ConfigError: a token that stays would get another id.
    """
    before = tokenizer.get_vocab()
    if not tokens & before.keys():
        return
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] not in tokens]
    without = Tokenizer.from_str(json.dumps(core))
    if without.get_vocab() != {token: index for token, index in before.items() if token not in tokens}:
        raise ConfigError(
            "tokenizer.matching=first_listed: the tokenizer has tokens behind the white-space tokens that are never "
            "produced; start from the tokenizer without them (tokenizer.base)"
        )
    tokenizer._tokenizer = without  # the library can add tokens to a tokenizer, but not remove one


def without_whitespace_tokens(tokenizer: Any) -> Tokenizer:
    """The core of a tokenizer without its plain added tokens of white space; ids behind them may differ."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [t for t in core["added_tokens"] if t["special"] or not t["content"].isspace()]
    return Tokenizer.from_str(json.dumps(core))


def is_byte_level(tokenizer: Any) -> bool:
    """Whether its tokens are made of bytes, as `token_bytes` needs."""
    return (json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}).get("type") == "ByteLevel"


def token_bytes(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """How many bytes of text each id stands for, `[vocab_size]` int32; 0 for special tokens and unused ids.

    The bytes of a block's targets make the loss comparable between tokenizers (bits per byte).
    """
    lengths = np.zeros(vocab_size, dtype=np.int32)
    added = tokenizer.added_tokens_decoder
    for token, index in tokenizer.get_vocab().items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode())
        else:
            lengths[index] = len(token)  # byte-level BPE writes every byte as one character
    return lengths


def encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> ids through the tokenizer's Rust core, without special tokens."""
    return partial(encode_texts, tokenizer.backend_tokenizer)


def encode_texts(core: Any, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in core.encode_batch_fast(texts, add_special_tokens=False)]
