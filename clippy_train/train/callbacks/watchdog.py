"""Ends a run in which a rank hangs, and leaves the stacks of all ranks in `stacks/rank-N.txt` of the run folder.

Python's own watchdog does the watching: a thread in C that needs no interpreter lock, so it also notices a rank that is
stuck in a library. It writes the stacks of its rank; the agent sees them, asks the other ranks for theirs and ends the
run. A rank that waits for another one hangs as well: the stacks show which is which. `kill -QUIT` of a rank writes its
stacks at any time. Costs a thread per micro-batch, some 50 microseconds.
"""

import faulthandler
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from clippy_train.run.folder import stack_file

SLOW = 6  # times `seconds`, where progress is not visible: start-up, validation's first batch, a save


class Watchdog(pl.Callback):
    """Expires when this rank makes no progress for `seconds`; 0 disables it. Without an agent, it kills the rank."""

    def __init__(self, run_dir: Path, rank: int, seconds: int) -> None:
        path = stack_file(run_dir, rank)
        path.parent.mkdir(exist_ok=True)
        self._file, self._seconds = path.open("w"), seconds
        faulthandler.register(signal.SIGQUIT, self._file)
        self._restart(SLOW)

    def on_train_start(self, *_: Any) -> None:
        self._restart(SLOW)  # loaders start, kernels compile

    def on_train_batch_end(self, *_: Any) -> None:
        self._restart()

    def on_validation_start(self, *_: Any) -> None:
        self._restart(SLOW)

    def on_validation_batch_end(self, *_: Any) -> None:
        self._restart()

    def on_save_checkpoint(self, *_: Any) -> None:
        self._restart(SLOW)

    def _restart(self, factor: int = 1) -> None:
        if self._seconds:
            no_agent = "CLIPPY_LAUNCHED" not in os.environ
            faulthandler.dump_traceback_later(self._seconds * factor, file=self._file, exit=no_agent)
