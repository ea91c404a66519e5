"""`clippy checkpoint ls|verify`: a table of the checkpoints of a run. Only `verify` reads every byte."""

from datetime import datetime
from pathlib import Path

from clippy_train.errors import CheckpointError, ConfigError
from clippy_train.run.checkpoint import (
    find_best,
    open_checkpoint,
    read_checkpoint,
)
from clippy_train.run.folder import (
    BEST,
    CHECKPOINTS,
    MANIFEST,
    checkpoint_folders,
    checkpoint_step,
)

HEADER = ["step", "tokens", "written", "GB", "ranks", "strategy", "", "state"]


def listing(run_dir: Path, content: bool) -> tuple[list[str], list[list[str]], bool]:
    """Header and rows of the table, newest checkpoint first, and whether all of them are intact.

    Args:
        content: verify every byte; otherwise only the manifest and the names and sizes of files.

    Raises:
        ConfigError: no such run.
    """
    if not (run_dir / CHECKPOINTS).is_dir():
        raise ConfigError(f"run={run_dir}: not a run folder with checkpoints")
    best = find_best(run_dir)
    rows: list[list[str]] = []
    for path in checkpoint_folders(run_dir):
        pointers = ["last"] if not rows else []
        pointers += [BEST] if path == best else []
        rows.append([*_facts(path), ", ".join(pointers), _state(path, content)])
    return HEADER, rows, all(row[-1] == _intact(content) for row in rows)


def _intact(content: bool) -> str:
    return "intact" if content else "complete"


def _state(path: Path, content: bool) -> str:
    try:
        open_checkpoint(path, content)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path} is ").removeprefix(f"{path}: ")
    return _intact(content)


def _facts(path: Path) -> list[str]:
    """Step, tokens, time, size, ranks and strategy; the step alone if the manifest cannot be read."""
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError:
        return [str(checkpoint_step(path)), "", "", "", "", ""]
    manifest = checkpoint.manifest
    written = datetime.fromtimestamp((path / MANIFEST).stat().st_mtime).isoformat(" ", "minutes")
    name, stage = manifest.layout["strategy.name"], manifest.layout["strategy.stage"] or ""
    size = f"{checkpoint.num_bytes / 1e9:.3g}"
    return [
        f"{manifest.step:,}",
        f"{manifest.tokens:,}",
        written,
        size,
        str(manifest.layout["ranks"]),
        f"{name}{stage}",
    ]
