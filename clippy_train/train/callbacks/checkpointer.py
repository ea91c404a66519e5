"""Saves during training: every rank writes its part to a staging folder, then rank 0 publishes it as a checkpoint.

A disk error on one rank concerns all: they leave the save together, what was written is removed, the previous
checkpoint stays, and training goes on, up to `checkpoint.max_failed_saves` failures in a row.
"""

import logging
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy

from clippy_train.config import TrainConfig
from clippy_train.errors import CheckpointError, first_line
from clippy_train.files import STAGING
from clippy_train.run.checkpoint import Checkpoint, Manifest, checkpoint_layout, flush_and_hash, prune, publish
from clippy_train.run.folder import DEEPSPEED_TAG, STATE, checkpoint_folder, rng_file
from clippy_train.train import collective
from clippy_train.train.callbacks.health import Health, require_equal_replicas
from clippy_train.train.callbacks.monitor import Monitor
from clippy_train.train.callbacks.progress import Progress, validation_due
from clippy_train.train.internals import redirect_saves
from clippy_train.train.module import code_lm

log = logging.getLogger(__name__)


class Checkpointer(pl.Callback):
    """Saves every `checkpoint.every_steps` steps or `every_minutes` minutes, and after the last step.

    A step that is validated is saved after its validation: so a run that resumes never misses a validation, which
    Lightning would skip, and a checkpoint records its score.

    Args:
        data: what the order of the data depends on (`run.identity`).
        resumed: the checkpoint that this attempt starts from.
    """

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress,
        health: Health,
        monitor: Monitor,
        data: dict[str, Any],
        resumed: Checkpoint | None,
    ) -> None:
        self.config, self.progress, self.health, self.monitor = config, progress, health, monitor
        self.data, self.resumed = data, resumed
        self.failed_saves = 0
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._bytes = 0  # of the last checkpoint; known to rank 0
        self._disk = Disk()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._disk.attach(trainer.strategy)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.resumed:
            load_rng(rng_file(self.resumed.path, trainer.global_rank))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if code_lm(pl_module).step.ended and not validation_due(self.config, trainer.global_step):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        step, settings = trainer.global_step, self.config.checkpoint
        last = step == self.config.trainer.max_steps
        if last or step % settings.every_steps == 0 or self._overdue():
            self.save(trainer, last)

    def _overdue(self) -> bool:
        """Whether the last checkpoint is too old for any rank. Collective."""
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and collective.anyone(time.monotonic() - self._saved_at >= 60 * minutes)

    def save(self, trainer: pl.Trainer, last: bool = False) -> None:
        """Write, verify and publish a checkpoint of the step that just ended, unless there is one. Collective.

        Raises:
            NonFinite, Diverged: the weights are not worth saving.
            CheckpointError: the save failed, and it was the last one of this run (`last`) or one failure too many.
        """
        step, started = trainer.global_step, time.monotonic()
        if step == self._saved_step:
            return
        self.health.check(trainer)
        require_equal_replicas(code_lm(trainer.lightning_module), step)
        staging = checkpoint_folder(self.config.run_dir, step).with_suffix(STAGING)
        failures = self._write(trainer, staging)
        self._saved_at = time.monotonic()
        if failures:
            self._fail(trainer, staging, failures, last)
            return
        self.failed_saves, self._saved_step = 0, step
        self.monitor.saved(trainer, self._saved_at - started, self._bytes)

    def _write(self, trainer: pl.Trainer, staging: Path) -> list[str]:
        """Write the checkpoint; returns what failed on any rank, nothing if the checkpoint is complete."""
        rank_zero, state = trainer.is_global_zero, code_lm(trainer.lightning_module).step
        failures = on_all_ranks(partial(make_staging, staging, self._disk.is_deepspeed) if rank_zero else None)
        if failures:
            return failures
        trainer.save_checkpoint(staging / STATE)
        self._disk.save(rng_state(), rng_file(staging, trainer.global_rank))
        manifest = partial(
            Manifest,
            step=trainer.global_step,
            tokens=trainer.global_step * self.config.tokens_per_step,
            cursors=self.progress.all_cursors().tolist(),
            counts=self.progress.all_counts(),
            data=self.data,
            layout=checkpoint_layout(self.config),
            bits_per_byte=state.bits_per_byte.get(trainer.global_step),
        )
        failures = on_all_ranks(self._disk.raise_error)
        if failures:
            return failures
        return on_all_ranks(partial(self._publish, staging, manifest) if rank_zero else None)

    def _publish(self, staging: Path, unfinished: Callable[..., Manifest]) -> None:
        manifest = unfinished(files=flush_and_hash(staging))
        publish(staging, checkpoint_folder(self.config.run_dir, manifest.step), manifest)
        self._bytes = sum(size for size, _ in manifest.files.values())
        try:
            prune(self.config.run_dir, manifest.step, self.config.checkpoint)
        except OSError as error:
            log.error("step %d is saved, but older checkpoints could not be deleted: %s", manifest.step, error)

    def _fail(self, trainer: pl.Trainer, staging: Path, failures: list[str], last: bool) -> None:
        self.failed_saves += 1
        limit = self.config.checkpoint.max_failed_saves
        message = f"the checkpoint of step {trainer.global_step} could not be written: {'; '.join(failures)}"
        if trainer.is_global_zero:
            shutil.rmtree(staging, ignore_errors=True)
            log.error("%s (failed saves in a row: %d of %d)", message, self.failed_saves, limit)
        self.monitor.write(trainer, {"checkpoint/failed": self.failed_saves})
        if last or self.failed_saves >= limit:
            raise CheckpointError(f"{message}. Free or repair the disk; the same command resumes from the last one")


class Disk:
    """`torch.save` for every strategy, which keeps an error for later.

    A rank that raised in the middle of a save would leave the others waiting in a collective.
    """

    def __init__(self) -> None:
        self.is_deepspeed = False
        self._error: Exception | None = None

    def attach(self, strategy: Strategy) -> None:
        """Have the strategy write its files through this object."""
        self.is_deepspeed = isinstance(strategy, DeepSpeedStrategy)
        redirect_saves(strategy, self.save)

    def save(self, state_dict: Any, path: str | Path, storage_options: Any = None) -> None:
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
            self._error = self._error or error

    def raise_error(self) -> None:
        error, self._error = self._error, None
        if error:
            raise error


def on_all_ranks(work: Callable[[], None] | None) -> list[str]:
    """Do this rank's work, if any; returns what failed on all ranks. Collective."""
    message = None
    try:
        if work:
            work()
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error  # closing a file that torch could not write raises again
        message = f"rank {collective.rank()}: {first_line(cause)}"
    return [each for each in collective.gather(message) if each]


def make_staging(staging: Path, is_deepspeed: bool) -> None:
    """The folder that a checkpoint is written to, with what DeepSpeed would write outside of `Disk.save`."""
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    if is_deepspeed:
        (staging / STATE / DEEPSPEED_TAG).mkdir(parents=True)
        (staging / STATE / "latest").write_text(DEEPSPEED_TAG)


def rng_state() -> dict[str, Any]:
    name, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).copy()), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def load_rng(path: Path) -> None:
    """Restore what `rng_state` returned; a rank without a file (it did not exist then) keeps its seed."""
    if not path.exists():
        return
    state = torch.load(path, weights_only=True, map_location="cpu")
    random.setstate(state["python"])
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.numpy(), *position))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
