"""Hugging Face folders: load a causal LM and its tokenizer, and save them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from clippy_train.errors import ConfigError, first_line
from clippy_train.tokenizer import load_tokenizer


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_both(name: str) -> tuple[Any, Any]:
    """A model, ready to be evaluated, and its tokenizer.

    Raises:
        ConfigError: there is none.
    """
    return load_model(name).eval().to(device()), load_tokenizer(name)


def load_model(name: str) -> Any:
    """Load a causal LM in fp32 from a folder or the hub.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"no model could be loaded from {name}: {first_line(error)}") from error


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    share_tensors(folder)


def share_tensors(folder: Path) -> None:
    """Let those read a folder's tensors who may read the rest: safetensors keeps its files to their owner."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)
