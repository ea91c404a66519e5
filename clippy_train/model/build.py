"""Build the model that is trained: from a folder, from the hub, or from random weights; then extend it.

Every rank builds the whole model from the same bits before any strategy sees it, so that all ZeRO stages start alike
(built under ZeRO-3's own context, a model starts from other weights). Costs one copy of the model in host memory per
rank. `extend` is the one code path that adds white-space tokens, for `clippy extend` and for `clippy train`.
"""

from typing import Any

import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from clippy_train.config import SHAPE, ModelConfig, TokenizerConfig, TrainConfig
from clippy_train.errors import ConfigError
from clippy_train.model.embeddings import grow_embeddings
from clippy_train.model.load import load_model
from clippy_train.tokenizer import add_whitespace_tokens, load_tokenizer


def build(config: TrainConfig) -> tuple[Any, Any]:
    """The extended model in fp32 and its tokenizer, the same bits on every rank."""
    tokenizer = load_tokenizer(tokenizer_name(config))
    if config.model.base is None:
        model = random_model(config.model, tokenizer, config.seed)
    else:
        model = load_model(config.model.base)
        check_shape(model.config, config.model)
    extend(model, tokenizer, config.tokenizer, config.seed)
    return model, tokenizer


def extend(model: Any, tokenizer: Any, settings: TokenizerConfig, seed: int = 0) -> None:
    """Add the white-space tokens that are missing to the tokenizer and their rows to the model, both in place."""
    num_ids = len(tokenizer)
    pieces = add_whitespace_tokens(tokenizer, settings.whitespace_tokens, settings.matching)
    num_rows = num_ids + len(settings.whitespace_tokens) if pieces else num_ids
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grow_embeddings(model, tokenizer, pieces, max(num_rows, len(tokenizer)), settings.new_row_init)
    for each in (model.config, model.generation_config):
        each.bos_token_id = each.eos_token_id = tokenizer.eos_token_id


def random_model(settings: ModelConfig, tokenizer: Any, seed: int) -> Any:
    """A GPT-Neo of the given shape with the library's own initialisation, a pure function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoForCausalLM(
            gpt_neo_config(settings, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        )


def gpt_neo_config(settings: ModelConfig, **overrides: Any) -> GPTNeoConfig:
    """The Hugging Face configuration for a shape; layers alternate global, local, as in every published GPT-Neo."""
    kinds = [["global", "local"][layer % 2] for layer in range(settings.num_layers)]
    return GPTNeoConfig(
        **{name: getattr(settings, name) for name in SHAPE},
        attention_types=[[[kind], 1] for kind in kinds],
        embed_dropout=0.0,
        attention_dropout=0.0,
        resid_dropout=0.0,
        **overrides,
    )


def check_shape(base: Any, settings: ModelConfig) -> None:
    """Refuse a base model other than the one that the configuration describes and the plan was made for.

    Raises:
        ConfigError: naming every key that differs.
    """
    if getattr(base, "model_type", None) != "gpt_neo":
        raise ConfigError(f"model.base={settings.base} is a {getattr(base, 'model_type', '?')} model, not GPT-Neo")
    wrong = [
        f"model.{name}={getattr(settings, name)}, but {settings.base} has {getattr(base, name)}"
        for name in SHAPE
        if getattr(base, name) != getattr(settings, name)
    ]
    if base.activation_function != "gelu_new":  # what every GPT-Neo has, and all that model.attention computes
        raise ConfigError(
            f"model.base={settings.base} has activation_function={base.activation_function}, not gelu_new"
        )
    if wrong:
        raise ConfigError("\n".join([*wrong, "set these keys to the base model's values"]))


def tokenizer_name(config: TrainConfig) -> str:
    """Where the tokenizer comes from.

    Raises:
        ConfigError: neither `tokenizer.base` nor `model.base` is set.
    """
    name = config.tokenizer.base or config.model.base
    if name is None:
        raise ConfigError("tokenizer.base: needed when model.base=null (folder or hub name of a tokenizer)")
    return name
