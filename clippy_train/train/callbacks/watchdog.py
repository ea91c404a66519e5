"""Ends a run in which a rank stands still, and leaves the stacks of all ranks in `runs/NAME/stacks/rank-N.txt`.

Python's own watchdog does the watching: a thread in C that needs no interpreter lock, so it also sees a rank that is
stuck in a library. It writes the stacks of its rank; the launcher sees that, asks the other ranks for theirs and ends
the run. A rank that waits for another one stands still as well: the stacks tell the two apart. `kill -QUIT` of a rank
writes its stacks at any time. Costs a thread for each micro-batch, some 50 microseconds.
"""

import faulthandler
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from clippy_train.run.folder import stack_file

PATIENCE = 6  # times the usual, where progress cannot be seen: at the start, in a save


class Watchdog(pl.Callback):
    """Sees this rank stand still for `seconds`, from here on; 0 sees nothing. Without a launcher, it ends the rank."""

    def __init__(self, run_dir: Path, rank: int, seconds: int) -> None:
        path = stack_file(run_dir, rank)
        path.parent.mkdir(exist_ok=True)
        self._file, self._seconds = path.open("w"), seconds
        faulthandler.register(signal.SIGQUIT, self._file)
        self._moved(PATIENCE)

    def on_train_start(self, *_: Any) -> None:
        self._moved(PATIENCE)  # loaders start, kernels compile

    def on_train_batch_end(self, *_: Any) -> None:
        self._moved()

    def on_validation_start(self, *_: Any) -> None:
        self._moved(PATIENCE)

    def on_validation_batch_end(self, *_: Any) -> None:
        self._moved()

    def on_save_checkpoint(self, *_: Any) -> None:
        self._moved(PATIENCE)

    def _moved(self, patience: int = 1) -> None:
        if self._seconds:
            alone = "CLIPPY_LAUNCHED" not in os.environ
            faulthandler.dump_traceback_later(self._seconds * patience, file=self._file, exit=alone)
