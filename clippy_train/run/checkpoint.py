"""Checkpoints: complete or absent. Written to a staging folder, fsynced, hashed into a manifest, then renamed.

A folder such as `checkpoints/step-00000500/` holds the strategy's state (`state`), each rank's random state
(`rng-*.pt`), and `manifest.json`: step, cursors, counts, what the data depended on, and size and SHA-256 of every file
and of itself. DeepSpeed loads flipped bytes and torn mixes of files without complaint, so nothing is loaded before its
manifest has been checked. Nothing in a finished folder is ever rewritten. Costs one read of the checkpoint for hashing,
when it is saved and when a run resumes.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clippy_train.config import CheckpointConfig, TrainConfig
from clippy_train.errors import CheckpointError
from clippy_train.files import atomic_write, fsync, replace_link
from clippy_train.run.folder import (
    BEST,
    CHECKPOINTS,
    MANIFEST,
    METRICS,
    checkpoint_folder,
    checkpoint_folders,
    checkpoint_step,
    staging_folders,
)
from clippy_train.run.history import compared_after
from clippy_train.run.rows import SCORE, read_rows

VERSION = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        data: what the order of the data depends on (`run.identity`).
        layout: what the files depend on (`checkpoint_layout`).
        files: size in bytes and SHA-256 of each path inside the folder.
    """

    step: int
    tokens: int
    cursors: list[list[int]]
    counts: dict[str, int]
    data: dict[str, Any]
    layout: dict[str, Any]
    files: dict[str, list[Any]]


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    manifest: Manifest

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.manifest.files.values())


class Unreadable(CheckpointError):
    """A checkpoint that cannot be read now, and may be intact."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path} cannot be read: {error}. It may be intact: restore the access to it, or move it away")


def checkpoint_layout(config: TrainConfig) -> dict[str, Any]:
    """What the files of a checkpoint depend on. A run with another layout must be resharded (`run.consolidate`)."""
    return {
        "ranks": config.world_size,
        "strategy.name": config.strategy.name,
        "strategy.stage": config.strategy.stage,
        "trainer.precision": config.trainer.precision,
        "trainer.micro_batch_size": config.trainer.micro_batch_size,
        "optim.name": config.optim.name,
    }


def find_checkpoint(run_dir: Path, step: int | None = None) -> Checkpoint | None:
    """The newest intact checkpoint (or that of `step`), verified; None if the run has no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
        Unreadable: one cannot be read. A run that continued from an older one would replace it.
    """
    candidates = checkpoint_folders(run_dir) if step is None else [checkpoint_folder(run_dir, step)]
    broken = []
    for path in candidates:
        try:
            found = open_checkpoint(path)
        except Unreadable:
            raise
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


def open_checkpoint(path: Path, content: bool = True) -> Checkpoint:
    """Verify a checkpoint folder against its manifest: every byte, or without `content` names and sizes only.

    Raises:
        CheckpointError: naming every damaged file.
        Unreadable: a file cannot be read.
    """
    checkpoint = read_checkpoint(path)
    try:
        wrong = _damage(checkpoint, content)
    except FileNotFoundError as error:  # a link to nowhere
        wrong = [str(error)]
    except OSError as error:
        raise Unreadable(path, error) from error
    if wrong:
        raise CheckpointError(f"{path} is damaged: {', '.join(wrong)}")
    return checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint as its manifest describes it; no other file is read.

    Raises:
        CheckpointError: the manifest is missing, damaged, or from another checkpoint.
        Unreadable: it cannot be read.
    """
    try:
        content = (path / MANIFEST).read_bytes()
        fields = json.loads(content)
        version = fields.pop("version")
        fields.pop("sha256", None)
        manifest = Manifest(**fields) if version == VERSION else None
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: no readable {MANIFEST} ({type(error).__name__})") from error
    except OSError as error:
        raise Unreadable(path, error) from error
    if manifest is None:
        raise CheckpointError(f"{path}: written by another version of this program (format {version})")
    if manifest_bytes(manifest) != content:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} has other content")
    if checkpoint_step(path) not in (-1, manifest.step):
        raise CheckpointError(f"{path} is damaged: {MANIFEST} is from step {manifest.step}")
    return Checkpoint(path, manifest)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`; they contain their own hash, so a reader detects any change."""
    fields = {"version": VERSION, **asdict(manifest)}
    sha256 = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return json.dumps({**fields, "sha256": sha256}).encode()


def _damage(checkpoint: Checkpoint, content: bool) -> list[str]:
    path, files = checkpoint.path, checkpoint.manifest.files
    present = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()} - {MANIFEST}
    wrong = [f"{name} is missing" for name in sorted(files.keys() - present)]
    wrong += [f"{name} does not belong there" for name in sorted(present - files.keys())]
    for name in sorted(present & files.keys()):
        size, sha256 = files[name]
        if (path / name).stat().st_size != size:
            wrong.append(f"{name} has another size")
        elif content and hash_file(path / name) != sha256:
            wrong.append(f"{name} has other content")
    return wrong


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(staging: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest and rename the staging folder: from then on the checkpoint exists."""
    with atomic_write(staging / MANIFEST, durable=True) as file:
        file.write(manifest_bytes(manifest).decode())
    for each in (*staging.rglob("*"), staging):
        if each.is_dir():
            fsync(each)
    if final.exists():  # a damaged checkpoint of the same step, which the resume skipped
        shutil.rmtree(final)
    staging.rename(final)
    fsync(final.parent)


def prune(run_dir: Path, step: int, settings: CheckpointConfig) -> None:
    """Delete the checkpoints that are not kept now that the one of `step` is complete, and link the best one.

    The newest `keep_last`, those of every `keep_every` steps, and the best are kept. Checkpoints beyond `step` are
    deleted: an earlier attempt wrote them, and this one resumed before them. So are half-written ones.
    """
    for path in staging_folders(run_dir):
        shutil.rmtree(path)
    for path in checkpoint_folders(run_dir):
        if checkpoint_step(path) > step:
            shutil.rmtree(path)
    best, remaining = find_best(run_dir), checkpoint_folders(run_dir)
    for path in remaining[settings.keep_last :]:
        if path != best and not (settings.keep_every and checkpoint_step(path) % settings.keep_every == 0):
            shutil.rmtree(path)
    link_best(run_dir)


def link_best(run_dir: Path) -> None:
    """Point `best` to the checkpoint with the lowest validation, if there is one."""
    best = find_best(run_dir)
    if best:
        replace_link(run_dir / CHECKPOINTS / BEST, best)


def find_best(run_dir: Path) -> Path | None:
    """The checkpoint whose step has the lowest validation in `metrics.jsonl`, the oldest of equals.

    Validations of other sequences than the last one's do not count.
    """
    found, after = [], compared_after(run_dir)
    scores = {row["step"]: row[SCORE] for row in read_rows(run_dir / METRICS, SCORE) if row["step"] > after}
    for path in checkpoint_folders(run_dir):
        with suppress(CheckpointError):
            step = read_checkpoint(path).manifest.step
            if step in scores:
                found.append((scores[step], step, path))
    return min(found)[-1] if found else None


def flush_and_hash(folder: Path, paths: Collection[Path]) -> dict[str, list[Any]]:
    """Flush files in `folder` to the disk; returns size and SHA-256 of each."""
    for path in paths:
        fsync(path)
    return {str(path.relative_to(folder)): [path.stat().st_size, hash_file(path)] for path in paths}
