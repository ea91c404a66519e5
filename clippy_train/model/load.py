"""Load a causal LM and its tokenizer from a Hugging Face folder or the hub, and save them to a folder."""

import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from clippy_train.errors import ConfigError, first_line
from clippy_train.files import lfs_hint, looks_local
from clippy_train.tokenizer import load_tokenizer


def load_model_and_tokenizer(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a model in evaluation mode, on the GPU if there is one, and its tokenizer.

    Raises:
        ConfigError: either cannot be loaded.
    """
    model = load_model(name)
    model.eval()
    move_to_device(model)
    return model, load_tokenizer(name)


def move_to_device(model: nn.Module) -> None:
    """Move a model to the GPU if there is one, otherwise to the CPU."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_model(name: str) -> PreTrainedModel:
    """Load a causal LM in fp32 from a folder or the hub, without running code from there.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if looks_local(name) and not Path(name).exists():
        raise ConfigError(f"no model could be loaded from {name}: no such folder")
    try:
        # Otherwise the library asks on the terminal whether to run a model's own code
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    except (EOFError, UnpicklingError) as error:  # its text recommends to load the file nevertheless
        raise ConfigError(
            f"no model could be loaded from {name}: its weights are a damaged pickle, or one that holds more than "
            f"tensors; nothing of it has been run{lfs_hint(Path(name))}. Use a folder with safetensors"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{_reason(error)}{lfs_hint(Path(name))}"
        raise ConfigError(f"no model could be loaded from {name}: {reason}") from error


def _reason(error: Exception) -> str:
    text = first_line(error)
    if isinstance(error, SafetensorError) or text.startswith("PytorchStreamReader"):
        return f"a file of weights is incomplete or damaged: {text.partition('. ')[0]}"
    return text


def generation_config(model: PreTrainedModel) -> GenerationConfig:
    """A causal LM's generation settings; `PreTrainedModel` does not declare them."""
    assert isinstance(model.generation_config, GenerationConfig)
    return model.generation_config


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model and its tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copy_file_modes(folder)


def copy_file_modes(folder: Path) -> None:
    """Give the tensor files the permissions of the other files; safetensors makes them readable by their owner only."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)
