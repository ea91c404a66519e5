"""Background processes of a test. None outlives it, however the test ends."""

import ctypes
import signal
import subprocess
from typing import Any, Protocol

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent dies


class Process(Protocol):
    """What `subprocess.Popen` and `forks.Popen` have in common."""

    def kill(self) -> None: ...

    def wait(self) -> int: ...


_started: list[Process] = []


def start(command: list[Any], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen(command, **options)`; the process is killed when the test ends."""
    process = subprocess.Popen(command, preexec_fn=_prepare, **options)
    end_with_test(process)
    return process


def end_with_test(process: Process) -> None:
    _started.append(process)


def end_all() -> None:
    """Kill those that still run; called after each test (`conftest.py`)."""
    for process in _started:
        process.kill()
        process.wait()
    _started.clear()


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    die_with_parent()


def die_with_parent() -> None:
    """Kill this process when its parent ends: a timeout kills pytest without clean-up."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
