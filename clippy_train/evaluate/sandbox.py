"""Runs one generated program and its checks, in a process that may do as little as the system lets us forbid.

Always: a process group of its own that is killed whole; limits on wall time, CPU time, memory, size of a file, open
files and processes; a temporary folder; an empty environment; its output discarded. A pass is a secret token that
arrives after the checks on a channel that carries nothing else: neither an exit status nor anything printed is one.
Where Linux allows it: namespaces of its own for network, processes, mounts and IPC (no network, no sight of other
processes, nothing outlives the sample), no root (a root starts samples as `nobody`), and no files but those of the
temporary folder, and for reading those of the interpreter and the system (Landlock).

What it does not stop: filling the disk with many files while it runs; and code that attacks its own checks in the
interpreter that they share, for example by an `==` that is always true, or by taking the token from the frames below.
Without namespaces also: the network, and a child that leaves the process group. Without Landlock: reading what the user
can read, and writing where the user can write.
It is a seat belt, not a prison: for programs of unknown origin run the whole command in a container (docs/evaluate.md).
Costs: an interpreter's start for each sample.
"""

import json
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clippy_train.evaluate import inside

INSIDE = Path(inside.__file__).read_text()
NOBODY = 65534
NAMESPACES = ("--net", "--pid", "--mount", "--ipc", "--fork", "--kill-child", "--mount-proc")
PROCESSES = 32  # and threads
FILE_BYTES = 16 << 20
OPEN_FILES = 64
REPORT_BYTES = 4096  # read of what a sample reports
LAST_SECONDS = 10.0  # for processes that were killed to be gone
PASSED = "passed"
TIMED_OUT = "timed out"


@dataclass(frozen=True)
class Limits:
    """`seconds` of wall time for a sample with its checks; `memory_bytes` of address space of each of its processes."""

    seconds: float
    memory_bytes: int


def run_checked(program: str, test: str, entry_point: str, limits: Limits) -> str:
    """`passed`, or why a program did not pass (`timed out`, `failed: ...`).

    Args:
        program: defines `entry_point`; untrusted.
        test: defines `check(candidate)`, which raises if the candidate is wrong.
    """
    return run_wrapped(wrapper(), program, test, entry_point, limits)


@cache
def wrapper() -> tuple[str, ...]:
    """The command that gives a program namespaces of its own, the strongest that works here; none at worst.

    A root becomes `nobody`, if need be one who can still read (an interpreter below /root); another user becomes the
    root of a user namespace, which is the same user outside.
    """
    prefixes: tuple[tuple[str, ...], ...]
    if os.getuid() == 0:
        namespaces = ("unshare", *NAMESPACES)
        prefixes = ((*namespaces, *nobody()), (*namespaces, *nobody("+dac_read_search")), nobody(), ())
    else:
        user = ("unshare", "--map-root-user")
        prefixes = ((*user, *NAMESPACES), (*user, "--net"), ())
    trial = Limits(seconds=20, memory_bytes=1 << 30)
    for prefix in prefixes:
        if run_wrapped(prefix, "import decimal, socket\ndef f(): pass", "def check(f): f()", "f", trial) == PASSED:
            return prefix
    raise RuntimeError("a sample that does nothing does not pass")


def nobody(*capabilities: str) -> tuple[str, ...]:
    """The command that gives up root, all but some capabilities."""
    kept = ",".join(("-all", *capabilities))
    users = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs")
    return ("setpriv", *users, f"--bounding-set={kept}", f"--inh-caps={kept}", f"--ambient-caps={kept}")


def isolation() -> str:
    """What `wrapper` found, for a person."""
    if "--pid" in wrapper():
        return "no network, no sight of other processes"
    if "--net" in wrapper():
        return "no network"
    return "NO namespaces: samples can use the network and leave their process group"


def run_wrapped(prefix: tuple[str, ...], program: str, test: str, entry_point: str, limits: Limits) -> str:
    """As `run_checked`, in the namespaces that `prefix` makes."""
    token = secrets.token_hex(16)
    job = {"program": program, "test": test, "entry_point": entry_point, "token": token}
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryDirectory(prefix="sample-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as channel,  # a file, so that a flood ends at its size limit
    ):
        if os.getuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        json.dump({**job, "resources": resources(limits)}, stdin)
        stdin.seek(0)
        try:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-I", "-c", INSIDE],
                cwd=folder,
                env={},
                stdin=stdin,
                stdout=channel,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:  # there is no `unshare`
            return f"failed: {error}"
        in_time = _ended(process.pid, limits.seconds)
        if not in_time and "--pid" in prefix:
            _kill_first(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not in_time:
            return TIMED_OUT
        channel.seek(0)
        report = channel.read(REPORT_BYTES)
    return PASSED if report == token.encode() else _reason(report, token)


def _kill_first(unshare: int) -> None:
    """Kill the first process of the namespaces, and wait until `unshare` has seen the last of them."""
    for child in Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split():
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(int(child), signal.SIGKILL)
    _ended(unshare, LAST_SECONDS)


def _ended(pid: int, seconds: float) -> bool:
    """Wait for the end of a child without reaping it, so that its process group cannot become another's."""
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(descriptor)


def resources(limits: Limits) -> dict[str, int]:
    """Limits by the names of the `resource` module."""
    return {
        "RLIMIT_CPU": math.ceil(limits.seconds) + 1,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_NPROC": PROCESSES,
        "RLIMIT_CORE": 0,
    }


def _reason(report: bytes, token: str) -> str:
    """What a sample says of its failure: untrusted text, in one line."""
    text = " ".join(report.decode(errors="replace").replace(token, "").split())
    return text if text.startswith("failed: ") else "failed: ended before its checks were through"
