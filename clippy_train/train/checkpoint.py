"""Checkpoints: complete or absent. Written aside, fsynced, listed in a manifest with a hash for each file, renamed.

A folder `checkpoints/step-XXXXXXXX/` holds the strategy's state (`state`), each rank's random state (`rng-*.pt`), and
`manifest.json`: step, cursors, counts, what the data depended on, size and SHA-256 of every file. DeepSpeed loads
flipped bytes and torn mixes without complaint, so nothing is loaded before its manifest was checked. Nothing in a
finished folder is ever rewritten. Costs one read of the checkpoint for hashing, at save and at start.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clippy_train.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "state"  # what Lightning's strategy writes: a file, or DeepSpeed's folder
ASIDE = ".writing"
VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is. `files` maps each path inside the folder to its size in bytes and SHA-256."""

    step: int
    tokens: int
    cursors: list[list[int]]
    counts: dict[str, int]
    data: dict[str, Any]
    world_size: int
    strategy: dict[str, Any]
    optimizer: str
    files: dict[str, list[Any]]
    version: int = VERSION


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    manifest: Manifest


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, good or not; what was left half-written is not among them."""
    return sorted((run_dir / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)


def find(run_dir: Path, step: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that passes verification (or that of `step`), or None where the run has none at all.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
    """
    candidates = checkpoints(run_dir) if step is None else [folder(run_dir, step)]
    broken = []
    for path in candidates:
        try:
            found = open_checkpoint(path)
        except CheckpointError as error:
            log.warning("%s", error)
            broken.append(str(error))
            continue
        if broken:
            log.warning("falling back to %s", path)
        return found
    if broken:
        raise CheckpointError("\n".join([f"no intact checkpoint in {run_dir}:", *broken]))
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint folder against its manifest.

    Raises:
        CheckpointError: naming what is wrong with it.
    """
    try:
        manifest = Manifest(**json.loads((path / MANIFEST).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: no readable {MANIFEST} ({type(error).__name__})") from error
    if manifest.version != VERSION:
        raise CheckpointError(f"{path}: written by another version of this program (format {manifest.version})")
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST}
    wrong = [f"{name} is missing" for name in sorted(manifest.files.keys() - present)]
    wrong += [f"{name} does not belong there" for name in sorted(present - manifest.files.keys())]
    for name in sorted(present & manifest.files.keys()):
        size, sha256 = manifest.files[name]
        if (path / name).stat().st_size != size:
            wrong.append(f"{name} has another size")
        elif hash_file(path / name) != sha256:
            wrong.append(f"{name} has other content")
    if wrong:
        raise CheckpointError(f"{path} is damaged: {', '.join(wrong)}")
    return Checkpoint(path, manifest)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(aside: Path, final: Path, manifest: Manifest) -> None:
    """Put the manifest in place and give the folder its name: from here on the checkpoint exists."""
    with (aside / MANIFEST).open("x") as file:
        json.dump(asdict(manifest), file)
        file.flush()
        os.fsync(file.fileno())
    _fsync(aside)
    if final.exists():  # a damaged checkpoint of the same step that was passed over at the start
        shutil.rmtree(final)
    aside.rename(final)
    _fsync(final.parent)


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and whatever an earlier life left half-written."""
    for path in checkpoints(run_dir)[keep:]:
        shutil.rmtree(path)
    for path in (run_dir / "checkpoints").glob(f"*{ASIDE}"):
        shutil.rmtree(path)


def seal(path: Path) -> dict[str, list[Any]]:
    """Bring every file and folder below `path` to the disk; size and SHA-256 of each file."""
    files = {}
    for each in sorted(path.rglob("*")):
        _fsync(each)
        if each.is_file():
            files[str(each.relative_to(path))] = [each.stat().st_size, hash_file(each)]
    return files


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
