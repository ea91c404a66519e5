"""Saving during training: every rank writes its part aside, then rank 0 publishes the whole as one checkpoint.

A disk error on one rank is everyone's: all ranks leave the save together, what was written is removed, the checkpoint
before stays, and training goes on, `checkpoint.max_failed_saves` times in a row.
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
from lightning.pytorch.strategies import DeepSpeedStrategy

from clippy_train.config import TrainConfig
from clippy_train.errors import CheckpointError
from clippy_train.files import STAGING
from clippy_train.run.checkpoint import (
    Checkpoint,
    Manifest,
    checkpoint_layout,
    flush_and_hash,
    prune,
    publish,
)
from clippy_train.run.folder import (
    DEEPSPEED_TAG,
    STATE,
    checkpoint_folder,
    rng_file,
)
from clippy_train.train import collective
from clippy_train.train.callbacks.health import Finite, require_equal_replicas
from clippy_train.train.callbacks.monitor import Monitor
from clippy_train.train.callbacks.progress import Progress, step_ended, validation_due

log = logging.getLogger(__name__)


class Checkpointer(pl.Callback):
    """Saves every `checkpoint.every_steps` steps or `every_minutes` minutes, and after the last step.

    Behind the validation of a step that has one: so a run that continues from a checkpoint never owes a validation,
    which Lightning would leave out, and a checkpoint knows how good it is.

    Args:
        data: what the order of the data depends on (`run.identity`).
        resumed: the checkpoint that this life of the run starts from.
    """

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress,
        finite: Finite,
        monitor: Monitor,
        data: dict[str, Any],
        resumed: Checkpoint | None,
    ) -> None:
        self.config, self.progress, self.finite, self.monitor = config, progress, finite, monitor
        self.data, self.resumed = data, resumed
        self.failed_saves = 0
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._bytes = 0  # of the last checkpoint; rank 0 knows
        self._disk = Disk()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._disk.attach(trainer.strategy)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.resumed:
            load_rng(rng_file(self.resumed.path, trainer.global_rank))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if step_ended(trainer, batch_idx) and not validation_due(self.config, trainer.global_step):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
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
        """Write, verify and publish a checkpoint of the step that just ended. Collective; nothing if it is there.

        Raises:
            NonFinite, Diverged: the weights are not worth saving.
            CheckpointError: it failed, and this run can save no later (`last`) or has tried too often.
        """
        step, started = trainer.global_step, time.monotonic()
        if step == self._saved_step:
            return
        self.finite.check(trainer)
        require_equal_replicas(trainer.lightning_module, step)
        aside = checkpoint_folder(self.config.run_dir, step).with_suffix(STAGING)
        failures = self._write(trainer, aside)
        self._saved_at = time.monotonic()
        if failures:
            self._fail(trainer, aside, failures, last)
            return
        self.failed_saves, self._saved_step = 0, step
        self.monitor.saved(trainer, self._saved_at - started, self._bytes)

    def _write(self, trainer: pl.Trainer, aside: Path) -> list[str]:
        """What went wrong on any rank; nothing if the checkpoint is complete."""
        rank_zero = trainer.is_global_zero
        failures = everywhere(partial(make_aside, aside, self._disk.is_deepspeed) if rank_zero else None)
        if failures:
            return failures
        trainer.save_checkpoint(aside / STATE)
        self._disk.save(rng_state(), rng_file(aside, trainer.global_rank))
        cursors, counts = self.progress.all_cursors(), self.progress.all_counts()
        failures = everywhere(self._disk.raise_error)
        if failures:
            return failures
        return everywhere(partial(self._publish, aside, trainer.global_step, cursors, counts) if rank_zero else None)

    def _publish(self, aside: Path, step: int, cursors: np.ndarray, counts: dict[str, int]) -> None:
        manifest = Manifest(
            step=step,
            tokens=step * self.config.tokens_per_step,
            cursors=cursors.tolist(),
            counts=counts,
            data=self.data,
            layout=checkpoint_layout(self.config),
            bits_per_byte=self.monitor.validated.get(step),
            files=flush_and_hash(aside),
        )
        publish(aside, checkpoint_folder(self.config.run_dir, step), manifest)
        self._bytes = sum(size for size, _ in manifest.files.values())
        try:
            prune(self.config.run_dir, step, self.config.checkpoint)
        except OSError as error:
            log.error("the checkpoint of step %d is complete, but older ones could not be deleted: %s", step, error)

    def _fail(self, trainer: pl.Trainer, aside: Path, failures: list[str], last: bool) -> None:
        self.failed_saves += 1
        limit = self.config.checkpoint.max_failed_saves
        message = f"the checkpoint of step {trainer.global_step} could not be written: {'; '.join(failures)}"
        if trainer.is_global_zero:
            shutil.rmtree(aside, ignore_errors=True)
            log.error("%s (failed saves in a row: %d of %d)", message, self.failed_saves, limit)
        self.monitor.write(trainer, {"checkpoint/failed": self.failed_saves})
        if last or self.failed_saves >= limit:
            raise CheckpointError(
                f"{message}. Make room or mend the disk; the same command continues from the last one"
            )


class Disk:
    """`torch.save` for every strategy, which keeps an error for later.

    A rank that raised in the middle of a save would leave the others waiting for it in a collective.
    """

    def __init__(self) -> None:
        self.is_deepspeed = False
        self._error: Exception | None = None

    def attach(self, strategy: Any) -> None:
        """Write the files of Lightning's strategies and of DeepSpeed through this object."""
        self.is_deepspeed = isinstance(strategy, DeepSpeedStrategy)
        if not self.is_deepspeed:
            strategy.checkpoint_io.save_checkpoint = self.save
            return
        engine = strategy.deepspeed_engine
        engine.checkpoint_engine.save = self.save
        engine.save_checkpoint = partial(engine.save_checkpoint, save_latest=False)  # `make_aside` writes it
        engine._copy_recovery_script = lambda path: None

    def save(self, state_dict: Any, path: Any, storage_options: Any = None) -> None:
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
            self._error = self._error or error

    def raise_error(self) -> None:
        error, self._error = self._error, None
        if error:
            raise error


def everywhere(work: Callable[[], None] | None) -> list[str]:
    """Do this rank's work, if any; what went wrong on all ranks. Collective."""
    error = None
    try:
        if work:
            work()
    except (OSError, RuntimeError) as raised:
        first = raised.__context__ or raised  # closing a file that torch could not write raises once more
        error = f"rank {collective.rank()}: {str(first).splitlines()[0]}"
    return [each for each in collective.gather(error) if each]


def make_aside(aside: Path, is_deepspeed: bool) -> None:
    """The folder that a checkpoint is written in, with what DeepSpeed would write outside of `Disk.save`."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if is_deepspeed:
        (aside / STATE / DEEPSPEED_TAG).mkdir(parents=True)
        (aside / STATE / "latest").write_text(DEEPSPEED_TAG)


def rng_state() -> dict[str, Any]:
    name, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).copy()), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def load_rng(path: Path) -> None:
    """Restore what `rng_state` was; a rank that did not exist then keeps its seed."""
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.numpy(), *position))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
