"""The results file that `clippy evaluate out=FILE` writes and the model card is filled from.

It is a JSON object with the task's results and `about`: the task, the command that reproduces them, and the SHA-256 of
each model's weights (of a name on the hub, the commit), so that results cannot end up on another model's card. Scores
of samples also say how those were made (`samples`: n, temperature, top_p, ...).
"""

import dataclasses
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from clippy_train.config import EvaluateConfig, keys, values
from clippy_train.errors import ConfigError, first_line
from clippy_train.files import atomic_write


def write_results(config: EvaluateConfig, results: dict[str, Any], about: dict[str, Any] | None = None) -> None:
    """Write `config.out` atomically, if it is set.

    Args:
        about: added to what the results say about themselves. Its `models` are those that samples are from; by default,
            they are the models of this command.
    """
    if config.out is None:
        return
    models = {} if about else {name: weights_version(name) for name in config.model}
    about = {"task": config.task, "command": command_line(config), "models": models, **(about or {})}
    with atomic_write(Path(config.out)) as file:
        file.write(json.dumps({**results, "about": about}, indent=1) + "\n")


def read_results(path: str) -> dict[str, Any]:
    """Read a file that `write_results` wrote.

    Raises:
        ConfigError: it cannot be read, or is another kind of file.
    """
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text())
        about = content["about"]
        if not {"task", "command", "models"} <= about.keys():
            raise KeyError("about")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not what clippy evaluate out=FILE writes ({type(error).__name__})") from error
    return content


def weights_version(name: str) -> str | None:
    """What identifies a model's weights: the hash of a folder's, and of a name on the hub the commit.

    Raises:
        ConfigError: it is neither.
    """
    if Path(name).is_dir():
        return weights_hash(Path(name))
    try:
        return Path(hf_hub_download(name, "config.json")).parent.name  # in the hub's cache: snapshots/COMMIT
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={name} is neither a folder nor a model on the hub: {first_line(error)}") from error


def weights_hash(folder: Path) -> str | None:
    """Hash the weights of a Hugging Face folder; None if it has none."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None


def command_line(config: EvaluateConfig) -> str:
    """The command line that gives this configuration: every key that differs from its default, except `out`."""
    words, of_key = ["clippy", "evaluate"], values(config)
    for name, item in keys(EvaluateConfig):
        value = of_key[name]
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if value != default and name != "out":
            text = f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
            words.append(shlex.quote(f"{name}={text}"))
    return " ".join(words)
