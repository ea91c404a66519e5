"""Ends a run in which a rank stands still, and leaves the stacks of all ranks in `runs/NAME/stacks/rank-N.txt`.

Python's own watchdog does the watching: a thread in C that needs no interpreter lock, so it also sees a rank that is
stuck in a library. It writes the stacks of its rank; the launcher sees that, asks the other ranks for theirs and ends
the run. A rank that waits for another one stands still as well: the stacks tell the two apart. `kill -QUIT` of a rank
writes its stacks at any time. Costs a thread for each micro-batch, some 50 microseconds.
"""

import faulthandler
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

STACKS = "stacks"
PATIENCE = 6  # times the usual, where progress cannot be seen: at the start, in a save
ANSWER_SECONDS = 3.0  # that a rank has for its stacks when the launcher asks
EXPIRED = "Timeout ("  # how Python's watchdog begins


class Watchdog(pl.Callback):
    """Sees this rank stand still for `seconds`, from here on; 0 sees nothing. Without a launcher, it ends the rank."""

    def __init__(self, run_dir: Path, rank: int, seconds: int) -> None:
        path = stacks(run_dir, rank)
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


def stacks(run_dir: Path, rank: int) -> Path:
    return run_dir / STACKS / f"rank-{rank}.txt"


def expired(run_dir: Path, num_ranks: int) -> bool:
    """Whether a rank stands still."""
    return any(EXPIRED in _read(stacks(run_dir, rank)) for rank in range(num_ranks))


def report(run_dir: Path, ranks: list[subprocess.Popen]) -> str:
    """Ask all ranks for their stacks; in words, where each of them is."""
    files = [stacks(run_dir, rank) for rank in range(len(ranks))]
    for process, file in zip(ranks, files, strict=True):
        if process.poll() is None and not _read(file):
            process.send_signal(signal.SIGQUIT)
    deadline = time.monotonic() + ANSWER_SECONDS
    while not all(map(_read, files)) and time.monotonic() < deadline:
        time.sleep(0.05)
    places = [f"rank {rank} {_innermost(_read(file))}" for rank, file in enumerate(files)]
    return f"a rank has made no progress for too long: {'; '.join(places)}. Stacks of all: {files[0].parent}"


def tidy(run_dir: Path) -> None:
    """Remove the folder of stacks if there are none."""
    if not any(file.stat().st_size for file in (run_dir / STACKS).glob("*")):
        shutil.rmtree(run_dir / STACKS, ignore_errors=True)


def _innermost(text: str) -> str:
    """The frame that the main thread is in; it is the last one in the dump."""
    frames = re.findall(r"\(most recent call first\):\n\s*File (.*)", text)
    return f"is in {frames[-1]}" if frames else "gives no answer: it is stopped, gone, or stuck in the kernel"


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
