"""Signals: a handler only sets a flag; all ranks agree at the end of a step, save, and stop with exit code 75.

Lightning's own handlers broadcast, or save, from inside the handler: with two ranks that deadlocks or loses the save.
"""

import os
import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from clippy_train.config import TrainConfig
from clippy_train.errors import Interrupted
from clippy_train.signals import SIGNALS
from clippy_train.train import collective
from clippy_train.train.callbacks.checkpointer import Checkpointer
from clippy_train.train.callbacks.progress import step_ended, validation_due


class Flag:
    """The last signal received, or None. A second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._owner = os.getpid()

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the launcher held them back until now

    def _set(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a forked loader process: its rank decides
        if number == self.signal == signal.SIGINT:
            os._exit(128 + number)
        self.signal = number


class Preemption(pl.Callback):
    """Ends the run once any rank has received a signal: behind the step, and the validation, that is under way.

    Must be the last callback.
    """

    def __init__(self, config: TrainConfig, flag: Flag, checkpointer: Checkpointer) -> None:
        self.config, self.flag, self.checkpointer = config, flag, checkpointer

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        disarm_lightning(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_before_the_first_step()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_before_the_first_step()  # the first validation may have taken minutes

    def _leave_before_the_first_step(self) -> None:
        if collective.anyone(self.flag.signal is not None):
            raise Interrupted("interrupted before the first step: nothing is lost, the same command starts again")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.global_step < self.config.trainer.max_steps:
            self._leave_if_asked(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if step_ended(trainer, batch_idx) and not validation_due(self.config, trainer.global_step):
            self._leave_if_asked(trainer)

    def _leave_if_asked(self, trainer: pl.Trainer) -> None:
        if collective.anyone(self.flag.signal is not None):
            self.checkpointer.save(trainer, last=True)
            raise Interrupted(
                f"interrupted after step {trainer.global_step}: saved; the same command continues from there"
            )


def disarm_lightning(trainer: pl.Trainer) -> None:
    """Turn off Lightning's SIGTERM handler and its broadcast (with a host sync) in every micro-batch."""
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    assert hasattr(connector, "register_signal_handlers")
    assert hasattr(loop, "_broadcast_sigterm_tensor")
    connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
