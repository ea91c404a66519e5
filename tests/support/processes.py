"""Processes that run beside the test that started them: none outlives it, however it ends."""

import ctypes
import signal
import subprocess
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent dies

_started: list[subprocess.Popen] = []


def start(command: list[Any], **options: Any) -> subprocess.Popen:
    process = subprocess.Popen(command, preexec_fn=_prepare, **options)
    _started.append(process)
    return process


def end_all() -> None:
    """Kill what is left of them; after each test (`conftest.py`)."""
    for process in _started:
        process.kill()
        process.wait()
    _started.clear()


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a timeout ends the test's process at once
