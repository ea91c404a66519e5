"""Files of evaluation results: what `clippy evaluate out=FILE` writes and a model card is filled from.

A JSON object of the task's results, and `about`: the task, the command that gives them, and for each model the SHA-256
of its weights, so that nobody's results end up on the card of another model.
"""

import dataclasses
import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any

from clippy_train.config import EvaluateConfig, keys
from clippy_train.errors import ConfigError
from clippy_train.files import atomic_write


def require_writable(config: EvaluateConfig) -> None:
    """Raises ConfigError where `config.out` cannot become a file: before hours of work, not after."""
    if config.out is None:
        return
    path = Path(config.out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={path}: {error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"out={path} is a folder, or lies in one that cannot be written: name a file")


def write_results(config: EvaluateConfig, results: dict[str, Any]) -> None:
    """Write `config.out`, complete or not at all; without it nothing."""
    if config.out is None:
        return
    models = {name: weights_hash(Path(name)) for name in config.model}
    about = {"task": config.task, "command": command(config), "models": models}
    with atomic_write(Path(config.out)) as file:
        file.write(json.dumps({**results, "about": about}, indent=1) + "\n")


def read_results(path: str) -> dict[str, Any]:
    """What `write_results` wrote.

    Raises:
        ConfigError: it is something else.
    """
    try:
        content = json.loads(Path(path).read_text())
        about = content["about"]
        if not {"task", "command", "models"} <= about.keys():
            raise KeyError("about")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not what clippy evaluate out=FILE writes ({type(error).__name__})") from error
    return content


def weights_hash(folder: Path) -> str | None:
    """A hash of the weights of a Hugging Face folder; None where it has no safetensors (a name on the hub)."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None


def command(config: EvaluateConfig) -> str:
    """The command line that this configuration stands for: every key that has not its default value."""
    words = ["clippy", "evaluate"]
    for name, item in keys(EvaluateConfig):
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if value != default and name != "out":
            text = f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
            words.append(shlex.quote(f"{name}={text}"))
    return " ".join(words)
