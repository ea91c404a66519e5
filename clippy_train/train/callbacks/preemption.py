"""Signals: a handler only sets a flag; all ranks agree at the end of a step, save, and stop with exit code 75.

Lightning's own handlers broadcast, or save, inside the handler: with two ranks that deadlocks or loses the save.
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
from clippy_train.train.callbacks.progress import validation_due
from clippy_train.train.internals import disable_signal_handling
from clippy_train.train.module import code_lm


class SignalFlag:
    """The last signal received, or None. A second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._owner = os.getpid()

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the agent blocked them during start-up

    def _set(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a forked loader process: its rank decides
        if number == self.signal == signal.SIGINT:
            os._exit(128 + number)
        self.signal = number


class Preemption(pl.Callback):
    """Ends the run once any rank has received a signal: after the current step and the validation that follows it."""

    def __init__(self, config: TrainConfig, flag: SignalFlag, checkpointer: Checkpointer) -> None:
        self.config, self.flag, self.checkpointer = config, flag, checkpointer
        self.progress = checkpointer.progress

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        disable_signal_handling(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_before_training()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_before_training()  # the first validation may have taken minutes

    def _leave_before_training(self) -> None:
        if collective.anyone(self.flag.signal is not None):
            raise Interrupted("interrupted before the first step: nothing is lost, the same command starts again")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and not self.progress.ended:
            self._save_and_leave(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = validation_due(self.config, trainer.global_step) or self.progress.ended
        if code_lm(pl_module).step.ended and not due:
            self._save_and_leave(trainer)

    def _save_and_leave(self, trainer: pl.Trainer) -> None:
        if collective.anyone(self.flag.signal is not None):
            self.checkpointer.save(trainer, last=True)
            raise Interrupted(
                f"interrupted after step {trainer.global_step}: saved; the same command continues from there"
            )
