"""Stacks of the ranks of a run, in `runs/NAME/stacks/rank-N.txt`: the launcher's side of `train.callbacks.watchdog`."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from clippy_train.run.folder import STACKS, stack_file

ANSWER_SECONDS = 3.0  # that a rank has for its stacks when the launcher asks
EXPIRED = "Timeout ("  # how Python's watchdog begins


def expired(run_dir: Path, ranks: Iterable[int]) -> bool:
    """Whether one of these ranks stands still."""
    return any(EXPIRED in _read(stack_file(run_dir, rank)) for rank in ranks)


def report(run_dir: Path, ranks: Mapping[int, subprocess.Popen]) -> str:
    """Ask these ranks for their stacks; in words, where each of them is."""
    files = {rank: stack_file(run_dir, rank) for rank in ranks}
    for rank, process in ranks.items():
        if process.poll() is None and not _read(files[rank]):
            process.send_signal(signal.SIGQUIT)
    deadline = time.monotonic() + ANSWER_SECONDS
    while not all(map(_read, files.values())) and time.monotonic() < deadline:
        time.sleep(0.05)
    places = [f"rank {rank} {_innermost(_read(file))}" for rank, file in files.items()]
    return f"a rank has made no progress for too long: {'; '.join(places)}. Stacks of all: {run_dir / STACKS}"


def tidy(run_dir: Path) -> None:
    """Remove the folder of stacks if there are none."""
    if not any(map(_read, (run_dir / STACKS).glob("*"))):
        shutil.rmtree(run_dir / STACKS, ignore_errors=True)


def _innermost(text: str) -> str:
    """The frame that the main thread is in; it is the last one in the dump."""
    frames = re.findall(r"\(most recent call first\):\n\s*File (.*)", text)
    return f"is in {frames[-1]}" if frames else "gives no answer: it is stopped, gone, or stuck in the kernel"


def _read(path: Path) -> str:
    """Its text, or none: the launcher of another node may have tidied up."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
