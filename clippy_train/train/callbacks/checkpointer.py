"""Saves during training: every rank writes its part to a staging folder, then rank 0 publishes it as a checkpoint.

A disk error on one rank concerns all: the save is given up, what was written is removed, the previous checkpoint stays,
and training goes on, up to `checkpoint.max_failed_saves` failures in a row. Every stage of a save is agreed on by all
ranks at the end of a step, so no checkpoint mixes files of two steps.
"""

import logging
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from clippy_train.config import TrainConfig
from clippy_train.errors import CheckpointError, Diverged, NonFinite, first_line
from clippy_train.files import STAGING, full_disks
from clippy_train.run.checkpoint import (
    Checkpoint,
    Manifest,
    checkpoint_layout,
    flush_and_hash,
    link_best,
    prune,
    publish,
)
from clippy_train.run.folder import DEEPSPEED_TAG, LATEST, STATE, checkpoint_folder, rng_file
from clippy_train.run.plain import load_plain
from clippy_train.train import collective
from clippy_train.train.callbacks.health import Health, require_equal_replicas
from clippy_train.train.callbacks.monitor import Monitor
from clippy_train.train.callbacks.progress import Progress
from clippy_train.train.internals import redirect_saves
from clippy_train.train.module import code_lm
from clippy_train.train.writer import Writer

log = logging.getLogger(__name__)


@dataclass
class Save:
    """A save in flight.

    Attributes:
        called: when the step ended that is saved.
        stall: seconds for which training stopped.
        manifest: makes the manifest from the files.
        files: of all ranks, once they are written; rank 0 then publishes the checkpoint.
        work: of this rank, in its thread.
    """

    step: int
    staging: Path
    called: float
    manifest: Callable[..., Manifest]
    work: "Future[Any]"
    stall: float = 0.0
    files: dict[str, list[Any]] | None = None


class Checkpointer(pl.Callback):
    """Saves every `checkpoint.every_steps` steps or `every_minutes` minutes, and after the last step.

    Training waits while each rank copies its state to host memory. Writing, hashing and publishing run beside it, one
    save at a time. The last save of a run, or before a signal ends it, is waited for.

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
        self._writer = Writer(config.checkpoint.asynchronous)
        self._save: Save | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        redirect_saves(trainer.strategy, self._writer.take)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.resumed:
            load_rng(rng_file(self.resumed.path, trainer.global_rank))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not code_lm(pl_module).step.ended:
            return
        self._advance(trainer)
        step, settings = trainer.global_step, self.config.checkpoint
        if self.progress.ended or step % settings.every_steps == 0 or self._overdue():
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last = self.progress.ended
        if last and not trainer.sanity_checking:
            self.save(trainer, last=True)
        if trainer.is_global_zero:
            linked = self._writer.submit(self._link_best)  # not here: publishing does it too
            if last:
                linked.exception()  # waits

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, NonFinite | Diverged):  # raised on all ranks together; the save in flight is sound
            self._advance(trainer, wait=True)

    def _overdue(self) -> bool:
        """Whether the last checkpoint is too old for any rank. Collective."""
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and collective.anyone(time.monotonic() - self._saved_at >= 60 * minutes)

    def save(self, trainer: pl.Trainer, last: bool = False) -> None:
        """Start to save the step that just ended, unless it is saved; `last` waits until that is complete. Collective.

        Raises:
            NonFinite, Diverged: the weights are not worth saving.
            CheckpointError: a save failed, and it was the last one of this run or one failure too many.
        """
        called = time.monotonic()
        if self._save and self._save.step != trainer.global_step:
            self._advance(trainer, wait=True)
        if not self._save and self._saved_step != trainer.global_step:
            self._start(trainer, called, last)
        self._advance(trainer, wait=last or not self._writer.asynchronous, last=last)

    def _start(self, trainer: pl.Trainer, called: float, last: bool) -> None:
        """Copy the state of all ranks, and let their threads write it."""
        step = trainer.global_step
        self.health.check(trainer)
        require_equal_replicas(code_lm(trainer.lightning_module), step)
        staging = checkpoint_folder(self.config.run_dir, step).with_suffix(STAGING)
        is_deepspeed = isinstance(trainer.strategy, DeepSpeedStrategy)
        make = partial(make_staging, staging, is_deepspeed) if trainer.is_global_zero else None
        failures = on_all_ranks(self.config.run_dir, make)
        self._saved_at = time.monotonic()
        if failures:
            self._fail(trainer, step, staging, failures, last)
            return
        trainer.save_checkpoint(staging / STATE)
        self._writer.take(rng_state(), rng_file(staging, trainer.global_rank))
        manifest = partial(
            Manifest,
            step=step,
            tokens=step * self.config.tokens_per_step,
            cursors=self.progress.all_cursors().tolist(),
            counts=self.progress.all_counts(),
            data=self.data,
            layout=checkpoint_layout(self.config),
        )
        self._save = Save(step, staging, called, manifest, self._writer.start(staging))
        self._save.stall = time.monotonic() - called

    def _advance(self, trainer: pl.Trainer, wait: bool = False, last: bool = False) -> None:
        """Take the save in flight to its next stage, if all ranks are there: written, published, logged. Collective."""
        while self._save:
            if wait:
                self._save.work.exception()
            if collective.anyone(not self._save.work.done()):
                return
            save, self._save = self._save, None
            failures = on_all_ranks(self.config.run_dir, save.work.result)
            if failures:
                self._fail(trainer, save.step, save.staging, failures, last)
            elif save.files is None:
                parts = collective.gather(save.work.result())
                save.files = {name: facts for part in parts for name, facts in sorted(part.items())}
                save.work = self._writer.submit(partial(self._publish, save) if trainer.is_global_zero else int)
                self._save = save
            else:
                self.failed_saves, self._saved_step = 0, save.step
                num_bytes = sum(size for size, _ in save.files.values())
                self.monitor.saved(trainer, save.step, save.stall, time.monotonic() - save.called, num_bytes)

    def _publish(self, save: Save) -> None:
        assert save.files is not None
        if (save.staging / STATE / LATEST).exists():
            save.files |= flush_and_hash(save.staging, [save.staging / STATE / LATEST])
        manifest = save.manifest(files=save.files)
        publish(save.staging, checkpoint_folder(self.config.run_dir, save.step), manifest)
        try:
            prune(self.config.run_dir, save.step, self.config.checkpoint)
        except OSError as error:
            log.error("step %d is saved, but older checkpoints could not be deleted: %s", save.step, error)

    def _link_best(self) -> None:
        try:
            link_best(self.config.run_dir)
        except OSError as error:
            log.error("the best checkpoint could not be linked: %s", error)

    def _fail(self, trainer: pl.Trainer, step: int, staging: Path, failures: list[str], last: bool) -> None:
        self.failed_saves += 1
        limit = self.config.checkpoint.max_failed_saves
        message = f"the checkpoint of step {step} could not be written: {'; '.join(failures)}"
        if trainer.is_global_zero:
            shutil.rmtree(staging, ignore_errors=True)
            log.error("%s (failed saves in a row: %d of %d)", message, self.failed_saves, limit)
        self.monitor.write(trainer, {"checkpoint/step": step, "checkpoint/failed": self.failed_saves})
        if last or self.failed_saves >= limit:
            raise CheckpointError(f"{message}. Free or repair the disk; the same command resumes from the last one")


def on_all_ranks(folder: Path, work: Callable[[], Any] | None) -> list[str]:
    """Do this rank's work in `folder`, if any; returns what failed on all ranks. Collective."""
    message = None
    try:
        if work:
            work()
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error  # closing a file that torch could not write raises again
        full = f"no space left on {folder}: " if full_disks(folder) else ""
        message = f"rank {collective.rank()}: {full}{first_line(cause)}"
    return [each for each in collective.gather(message) if each]


def make_staging(staging: Path, is_deepspeed: bool) -> None:
    """The folder that a checkpoint is written to, with what DeepSpeed would write outside `Writer.take`."""
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    if is_deepspeed:
        (staging / STATE / DEEPSPEED_TAG).mkdir(parents=True)
        (staging / STATE / LATEST).write_text(DEEPSPEED_TAG)


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
    state = load_plain(path)
    random.setstate(state["python"])
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.numpy(), *position))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
