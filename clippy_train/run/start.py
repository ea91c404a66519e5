"""`start.json`: what the launcher decided for one attempt of a run; every rank reads it."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from clippy_train.files import atomic_write
from clippy_train.run.folder import START


@dataclass(frozen=True)
class Start:
    """Where the state of an attempt comes from. All None: a new run, from its base model or from random weights.

    Attributes:
        checkpoint: folder of the checkpoint to resume from; its files have been verified.
        consolidated: folder with that checkpoint's state as whole tensors, where the run must be resharded.
        base_moments: folder of a base model whose step and Adam moments a new run continues.
        description: the run's folder with its model's configuration and tokenizer, where those of its base are gone.
    """

    checkpoint: Path | None = None
    consolidated: Path | None = None
    base_moments: Path | None = None
    description: Path | None = None


def write_start(run_dir: Path, start: Start) -> None:
    with atomic_write(run_dir / START) as file:
        json.dump({name: value and str(value) for name, value in asdict(start).items()}, file, indent=1)


def read_start(run_dir: Path) -> Start:
    content = json.loads((run_dir / START).read_text())
    return Start(**{field.name: Path(content[field.name]) if content[field.name] else None for field in fields(Start)})
