"""Build the model to train: from a folder, from the hub, or from random weights; then extend it.

Every rank builds the full model from the same bits before the strategy wraps it, so all ZeRO stages start from the same
weights (under ZeRO-3's own init context they would differ). Costs one copy of the model in host memory per rank.
`clippy extend` and `clippy train` add tokens through the same function, `extend_model`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from clippy_train.config import SHAPE, ModelConfig, TokenizerConfig, TrainConfig
from clippy_train.errors import ConfigError
from clippy_train.model.embeddings import grow_embeddings
from clippy_train.model.load import generation_config, load_model
from clippy_train.tokenizer import add_fim_tokens, add_whitespace_tokens, load_tokenizer


def build_model(config: TrainConfig) -> tuple[GPTNeoForCausalLM, PreTrainedTokenizerFast]:
    """Return the extended model in fp32 and its tokenizer, bit-equal on every rank.

    Raises:
        ConfigError: the model or the tokenizer cannot be loaded, or the base model is not the one described.
    """
    tokenizer = load_tokenizer(tokenizer_name(config))
    base, seed = config.model.base, config.seed
    model = random_model(config.model, tokenizer, seed) if base is None else load_base(base, config.model)
    extend_model(model, tokenizer, config.tokenizer, seed, config.fim_tokens)
    if config.model.checkpoint_activations:
        recompute_activations(model)
    return model, tokenizer


def build_described(folder: Path, settings: ModelConfig) -> tuple[GPTNeoForCausalLM, PreTrainedTokenizerFast]:
    """Return the model that `folder` describes, with random weights, and its tokenizer.

    For a run whose base is gone: the weights come from its checkpoint.
    """
    model = GPTNeoForCausalLM(GPTNeoConfig.from_pretrained(folder))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    if settings.checkpoint_activations:
        recompute_activations(model)
    return model, load_tokenizer(folder)


def recompute_activations(model: PreTrainedModel) -> None:
    """Have training keep only the input of each block, and recompute the rest in the backward pass."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def load_base(name: str, settings: ModelConfig) -> GPTNeoForCausalLM:
    """Load a GPT-Neo in fp32.

    Raises:
        ConfigError: it cannot be loaded, or differs from the model that `settings` describe.
    """
    model = load_model(name)
    check_shape(model.config, settings)
    assert isinstance(model, GPTNeoForCausalLM)
    return model


def extend_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    settings: TokenizerConfig,
    seed: int = 0,
    fim_tokens: Sequence[str] = (),
) -> None:
    """Add the missing whitespace tokens and `fim_tokens` to the tokenizer and their rows to the model, in place."""
    num_ids = len(tokenizer)
    pieces = add_whitespace_tokens(tokenizer, settings.whitespace_tokens, settings.matching)
    num_rows = num_ids + len(settings.whitespace_tokens) if pieces else num_ids
    pieces |= add_fim_tokens(tokenizer, list(fim_tokens))
    new_rows = range(num_ids, max(num_rows, len(tokenizer)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grow_embeddings(model, tokenizer, pieces, new_rows, settings.new_row_init)
    for each in (model.config, generation_config(model)):
        each.bos_token_id = each.eos_token_id = tokenizer.eos_token_id


def random_model(settings: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> GPTNeoForCausalLM:
    """Return a GPT-Neo of the given shape with the library's initialisation, a pure function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoForCausalLM(
            gpt_neo_config(settings, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        )


def gpt_neo_config(settings: ModelConfig, **overrides: Any) -> GPTNeoConfig:
    """The Hugging Face configuration of a shape; layers alternate global, local, as in every published GPT-Neo."""
    kinds = [["global", "local"][layer % 2] for layer in range(settings.num_layers)]
    return GPTNeoConfig(
        **{name: getattr(settings, name) for name in SHAPE},
        attention_types=[[[kind], 1] for kind in kinds],
        embed_dropout=0.0,
        attention_dropout=0.0,
        resid_dropout=0.0,
        **overrides,
    )


def check_shape(base: PreTrainedConfig, settings: ModelConfig) -> None:
    """Require the base model that the settings describe, since the plan was made for that one.

    Raises:
        ConfigError: it names every key that differs.
    """
    if getattr(base, "model_type", None) != "gpt_neo":
        raise ConfigError(f"model.base={settings.base} is a {getattr(base, 'model_type', '?')} model, not GPT-Neo")
    wrong = [
        f"model.{name}={getattr(settings, name)}, but {settings.base} has {getattr(base, name)}"
        for name in SHAPE
        if getattr(base, name) != getattr(settings, name)
    ]
    if wrong:
        raise ConfigError("\n".join([*wrong, "set these keys to the base model's values"]))
    expected, found = (_taken_for_granted(config) for config in (gpt_neo_config(settings), base))
    wrong = [f"{name}={found[name]}, not {expected[name]}" for name in found if found[name] != expected[name]]
    if wrong:
        raise ConfigError(f"model.base={settings.base} cannot be trained: it has {'; '.join(wrong)}")


def _taken_for_granted(config: PreTrainedConfig) -> dict[str, Any]:
    """What no key sets: the same in every published GPT-Neo. Attention, plan, MFU and checkpoints build on it."""
    return {
        "activation_function": config.activation_function,
        "attention_layers": config.attention_layers,
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def tokenizer_name(config: TrainConfig) -> str:
    """The folder or hub name of the tokenizer.

    Raises:
        ConfigError: neither `tokenizer.base` nor `model.base` is set.
    """
    name = config.tokenizer.base or config.model.base
    if name is None:
        raise ConfigError("tokenizer.base: needed when model.base=null (folder or hub name of a tokenizer)")
    return name
