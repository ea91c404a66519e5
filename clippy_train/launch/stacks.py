"""Stacks of a run's ranks in `stacks/rank-N.txt`: the agent's side of `train.callbacks.watchdog`."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from clippy_train.run.folder import STACKS, stack_file

REPLY_SECONDS = 3.0  # for a rank to write its stacks when asked
EXPIRED = "Timeout ("  # how the output of Python's watchdog begins


def any_expired(run_dir: Path, ranks: Iterable[int]) -> bool:
    """Whether the watchdog of one of these ranks has expired."""
    return any(EXPIRED in _read(stack_file(run_dir, rank)) for rank in ranks)


def report(run_dir: Path, ranks: Mapping[int, subprocess.Popen[bytes]]) -> str:
    """Ask these ranks for their stacks, and say where each of them is."""
    files = {rank: stack_file(run_dir, rank) for rank in ranks}
    for rank, process in ranks.items():
        if process.poll() is None and not _read(files[rank]):
            process.send_signal(signal.SIGQUIT)
    deadline = time.monotonic() + REPLY_SECONDS
    while not all(map(_read, files.values())) and time.monotonic() < deadline:
        time.sleep(0.05)
    places = [f"rank {rank} {_innermost(_read(file))}" for rank, file in files.items()]
    return f"a rank made no progress for too long: {'; '.join(places)}. Stacks of all ranks: {run_dir / STACKS}"


def forget(run_dir: Path, ranks: Iterable[int]) -> None:
    """Empty the files of these ranks, which go on writing to them."""
    for rank in ranks:
        if stack_file(run_dir, rank).exists():
            os.truncate(stack_file(run_dir, rank), 0)


def remove_empty(run_dir: Path) -> None:
    """Remove the folder of stacks if there are none in it."""
    if not any(map(_read, (run_dir / STACKS).glob("*"))):
        shutil.rmtree(run_dir / STACKS, ignore_errors=True)


def _innermost(text: str) -> str:
    """The innermost frame of the main thread, which is the last thread in the dump."""
    frames = re.findall(r"\(most recent call first\):\n\s*File (.*)", text)
    return f"is in {frames[-1]}" if frames else "does not respond: it is stopped, gone, or stuck in the kernel"


def _read(path: Path) -> str:
    """A file's text; empty if the agent of another node has removed it."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
