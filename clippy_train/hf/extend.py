"""`clippy extend`: add tokens to a model and its tokenizer, as a new Hugging Face folder."""

from pathlib import Path

from clippy_train.config import ExtendConfig, TokenizerConfig
from clippy_train.files import new_folder
from clippy_train.model.build import extend_model
from clippy_train.model.load import load_model, save_model
from clippy_train.tokenizer import load_tokenizer


def extend_folder(config: ExtendConfig) -> str:
    """Write the extended model and tokenizer to `out`; return a one-line summary.

    Raises:
        ConfigError: `base` cannot be loaded, or `out` is not empty.
    """
    with new_folder(Path(config.out), "out") as out:
        model, tokenizer = load_model(config.base), load_tokenizer(config.base)
        before = len(tokenizer)
        settings = TokenizerConfig(
            base=config.base,
            whitespace_tokens=config.whitespace_tokens,
            matching=config.matching,
            new_row_init=config.new_row_init,
        )
        extend_model(model, tokenizer, settings, fim_tokens=config.fim_tokens)
        save_model(model, tokenizer, out)
    return f"{config.out}: {before:,} tokens plus {len(tokenizer) - before} new ones"
