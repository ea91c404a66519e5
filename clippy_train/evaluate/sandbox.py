"""Run one generated program and its checks in a process that is restricted as far as the system allows.

Always: a separate process group, killed as a whole; limits on wall time, CPU time, memory, file size, open files and
processes; a temporary folder; an empty environment; output discarded. A pass is a secret token that arrives after the
checks on a channel reserved for it; an exit status or printed text is never a pass.
Where Linux allows it: separate namespaces for network, processes, mounts and IPC (no network, other processes hidden,
nothing outlives the sample); no root (root runs samples as `nobody`); access to files only in the temporary folder,
plus read access to the interpreter and the system (Landlock).

It does not stop a sample that fills the disk with many files while it runs, or one that attacks its own checks in the
interpreter that they share, for example with an `==` that is always true, or by reading the token from the frames
below. Without namespaces it also does not stop network access, or a child that leaves the process group. Without
Landlock the sample can read and write whatever the user can.
It is a seat belt, not a prison: run programs of unknown origin inside a container (docs/evaluate.md).
Costs one interpreter start per sample.
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
PROCESSES = 32  # including threads
FILE_BYTES = 16 << 20
OPEN_FILES = 64
REPORT_BYTES = 4096  # of a sample's report that are read
EXIT_SECONDS = 10.0  # for killed processes to exit
PASSED = "passed"
TIMED_OUT = "timed out"


@dataclass(frozen=True)
class Limits:
    """`seconds` of wall time for a sample with its checks; `memory_bytes` of address space per process."""

    seconds: float
    memory_bytes: int


def run_checked(program: str, test: str, entry_point: str, limits: Limits) -> str:
    """Run a program and its checks; return `passed`, or why it did not pass (`timed out`, `failed: ...`).

    Args:
        program: defines `entry_point`; untrusted.
        test: defines `check(candidate)`, which raises if the candidate is wrong.
    """
    return run_isolated(isolation_command(), program, test, entry_point, limits)


@cache
def isolation_command() -> tuple[str, ...]:
    """The command prefix that runs a program in separate namespaces: the strongest one that works here, or none.

    Root becomes `nobody`, with read access if necessary (for an interpreter below /root). Another user becomes root of
    a user namespace, which is the same user outside.
    """
    prefixes: tuple[tuple[str, ...], ...]
    if os.getuid() == 0:
        namespaces = ("unshare", *NAMESPACES)
        prefixes = ((*namespaces, *drop_root()), (*namespaces, *drop_root("+dac_read_search")), drop_root(), ())
    else:
        user = ("unshare", "--map-root-user")
        prefixes = ((*user, *NAMESPACES), (*user, "--net"), ())
    trial = Limits(seconds=20, memory_bytes=1 << 30)
    for prefix in prefixes:
        if run_isolated(prefix, "import decimal, socket\ndef f(): pass", "def check(f): f()", "f", trial) == PASSED:
            return prefix
    raise RuntimeError("the sandbox fails a sample that does nothing")


def drop_root(*capabilities: str) -> tuple[str, ...]:
    """The command prefix that becomes `nobody` and drops all but the given capabilities."""
    kept = ",".join(("-all", *capabilities))
    users = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs")
    return ("setpriv", *users, f"--bounding-set={kept}", f"--inh-caps={kept}", f"--ambient-caps={kept}")


def describe_isolation() -> str:
    """What `isolation_command` achieves here, in words."""
    if "--pid" in isolation_command():
        return "no network, other processes hidden"
    if "--net" in isolation_command():
        return "no network"
    return "NO namespaces: samples can use the network and leave their process group"


def run_isolated(prefix: tuple[str, ...], program: str, test: str, entry_point: str, limits: Limits) -> str:
    """`run_checked` with a given isolation command."""
    token = secrets.token_hex(16)
    job = {"program": program, "test": test, "entry_point": entry_point, "token": token}
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryDirectory(prefix="sample-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as channel,  # a file, because its size limit stops a flood
    ):
        if os.getuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        json.dump({**job, "resources": resource_limits(limits)}, stdin)
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
        except OSError as error:  # for example, `unshare` is not installed
            return f"failed: {error}"
        in_time = _wait_for_exit(process.pid, limits.seconds)
        if not in_time and "--pid" in prefix:
            _kill_init(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not in_time:
            return TIMED_OUT
        channel.seek(0)
        report = channel.read(REPORT_BYTES)
    return PASSED if report == token.encode() else _reason(report, token)


def _kill_init(unshare: int) -> None:
    """Kill the first process of the process namespace, and with it all others, and wait until `unshare` exits."""
    for child in Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split():
        with suppress(ProcessLookupError):  # it has just exited
            os.kill(int(child), signal.SIGKILL)
    _wait_for_exit(unshare, EXIT_SECONDS)


def _wait_for_exit(pid: int, seconds: float) -> bool:
    """Wait for a child to exit, without reaping it: its process group id must not be reused yet."""
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(descriptor)


def resource_limits(limits: Limits) -> dict[str, int]:
    """Values of the `resource` module's limits by their names."""
    return {
        "RLIMIT_CPU": math.ceil(limits.seconds) + 1,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_NPROC": PROCESSES,
        "RLIMIT_CORE": 0,
    }


def _reason(report: bytes, token: str) -> str:
    """The failure that a sample reports, in one line; untrusted text."""
    text = " ".join(report.decode(errors="replace").replace(token, "").split())
    return text if text.startswith("failed: ") else "failed: ended before its checks were through"
