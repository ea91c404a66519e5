"""Run one generated program and its checks, confined as far as the system allows, and say whether it passed.

Promises: a pass is a secret token that arrives after the checks on a channel reserved for it; an exit status or printed
text is never a pass. A verdict is about the sample: if anything else goes wrong (no space, no memory, another
interpreter, a process that does not end), the sample runs once more, and then a `SandboxFault` is raised. All processes
of a sample end with it.

Always: limits on time, memory, processes, files and open files; a temporary folder; an environment without the user's
variables; output discarded.
With namespaces: no network, no other processes, and a file system of its own, in memory, which shows only the
interpreter and the system, read-only. For root: a user for each sample that nobody else is.
With Landlock: access to the same files only, no signals to other processes, no TCP. With libseccomp: no memory that no
limit counts, no sockets to the host of a virtual machine; without namespaces, no sockets at all, no changes of
permissions or of other processes' limits. `Isolation.gaps` names what remains open.

Nothing here stops a sample that attacks its own checks in the interpreter that they share, for example with an `==`
that is always true, or by reading the token from the frames below. It is a seat belt, not a prison: run programs of
unknown origin inside a container (docs/evaluate.md). Costs one interpreter start per sample.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import clippy_train
from clippy_train.errors import ConfigError, SandboxFault
from clippy_train.evaluate import confine, inside
from clippy_train.evaluate.cgroups import sample_group
from clippy_train.evaluate.inside import PASSED, Job

# -I leaves out the user's site-packages and PYTHONPATH, so the package is named; the sample does not see its folder.
START = """import sys; sys.path.insert(0, {folder!r})
from clippy_train.evaluate.inside import main
del sys.path[0]; main()"""
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),  # they start one per core
    "MALLOC_ARENA_MAX": "1",  # otherwise each thread reserves 64 MB of the address space
    **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},  # the interpreter may need it
}
RETRY_SECONDS = 1.0
PATIENCE = 100  # a sandbox that takes this many times the sample's limit does not work

NO_NAMESPACES = "samples see the names of other processes, and can change and leave files in /dev/shm (no namespaces)"


@dataclass(frozen=True)
class Limits:
    """`seconds` for a sample with its checks, waits for a core excepted; `memory_bytes` for all of its processes."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Isolation:
    """The protections that a sample runs under besides its limits."""

    namespaces: bool
    drop_root: bool

    @property
    def gaps(self) -> list[str]:
        """What these protections leave open that the strongest would not, in words."""
        return list(_gaps(self, confine.landlock_version(), confine.seccomp_available()))


def _gaps(isolation: Isolation, landlock: int, seccomp: bool) -> Iterator[str]:
    if os.getuid() == 0 and not isolation.drop_root:
        yield "samples run as root (as another user, the interpreter does not work)"
    if isolation.namespaces:
        if not seccomp:
            yield "samples can exceed memory_mb, and reach the host of a virtual machine by vsock (no libseccomp)"
        return
    yield NO_NAMESPACES
    if not seccomp:
        yield (
            "samples can use the network and Unix sockets, exceed memory_mb, and change permissions and times of files "
            "and the limits of this user's processes (no libseccomp)"
        )
    if landlock < 1:
        yield "samples can read and write what this user can (no Landlock)"
    elif landlock < 3:
        yield "samples can empty files of this user (Landlock older than version 3)"
    if landlock < 6:
        yield "samples can send signals to processes of this user (Landlock older than version 6)"


def run_checked(program: str, test: str, entry_point: str, limits: Limits) -> str:
    """Run a program and its checks; return `passed`, or why it did not pass (`timed out`, `failed: ...`).

    Args:
        program: defines `entry_point`; untrusted.
        test: defines `check(candidate)`, which raises if the candidate is wrong.

    Raises:
        SandboxFault: twice, no verdict was possible.
    """
    try:
        return run_isolated(isolation(), program, test, entry_point, limits)
    except SandboxFault:
        time.sleep(RETRY_SECONDS)
        return run_isolated(isolation(), program, test, entry_point, limits)


@cache
def isolation() -> Isolation:
    """The strongest protections that work here."""
    return strongest(possible_isolations())


def possible_isolations() -> list[Isolation]:
    """All that could work for this user, the strongest first."""
    root = os.getuid() == 0
    return [Isolation(True, root), Isolation(False, root), *([Isolation(False, False)] if root else [])]


def strongest(candidates: Iterable[Isolation]) -> Isolation:
    """The first of these under which a sample that does nothing passes.

    Raises:
        ConfigError: this is not Linux.
        SandboxFault: none of them works.
    """
    if sys.platform != "linux":
        raise ConfigError("samples can only be scored on Linux")
    trial = Limits(seconds=20, memory_bytes=128 << 20)
    faults = []
    for each in candidates:
        try:
            outcome = run_isolated(each, "import decimal, socket\ndef f(): pass", "def check(f): f()", "f", trial)
        except SandboxFault as error:
            outcome = str(error)
        if outcome == PASSED:
            return each
        faults.append(outcome)
    raise SandboxFault(f"a sample that does nothing does not pass: {'; '.join(faults)}")


def run_isolated(isolation: Isolation, program: str, test: str, entry_point: str, limits: Limits) -> str:
    """`run_checked`, once, under given protections."""
    with _sample_folder(isolation) as folder, sample_group(limits.memory_bytes) as group:
        job = Job(
            program,
            test,
            entry_point,
            token=secrets.token_hex(16),
            **asdict(limits),
            **asdict(isolation),
            interpreter=inside.interpreter(),
            folder=folder,
            group=group,
        )
        return _verdict(job)


def _verdict(job: Job) -> str:
    """Start an interpreter with the job and read its report."""
    package = str(Path(clippy_train.__file__).parents[1])
    try:
        process = subprocess.run(
            [sys.executable, "-I", "-c", START.format(folder=package)],
            input=json.dumps(job._asdict()).encode(),
            capture_output=True,
            cwd="/",
            env=ENVIRONMENT,
            timeout=PATIENCE * job.seconds,
            start_new_session=True,  # an interrupt from the keyboard ends the scoring, not the sample
        )
        report = json.loads(process.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxFault(f"the sandbox does not work: {error}") from error
    except ValueError as error:
        last = process.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise SandboxFault(f"the sandbox ended with status {process.returncode}: {last}") from error
    if "fault" in report:
        raise SandboxFault(f"the sandbox does not work: {report['fault']}")
    return str(report["outcome"])


@contextmanager
def _sample_folder(isolation: Isolation) -> Iterator[str | None]:
    """A temporary folder on disk, if the sample has no file system of its own.

    Raises:
        SandboxFault: the disk is full, or something in the folder cannot be removed.
    """
    if isolation.namespaces:
        yield None
        return
    try:
        folder = tempfile.mkdtemp(prefix="sample-")
    except OSError as error:
        raise SandboxFault(f"no folder for a sample: {error}") from error
    try:
        if inside.free_bytes(folder) < inside.DISK_BYTES:
            raise SandboxFault(f"{folder} has less than {inside.DISK_BYTES >> 20} MB: set TMPDIR to one with more")
        yield folder
    finally:
        # Python's own removal recurses, and thousands of nested folders exceed its stack
        subprocess.run(["chmod", "-R", "u+rwX", folder], capture_output=True)
        removed = subprocess.run(["rm", "-rf", folder], capture_output=True, text=True)
    if removed.returncode:
        raise SandboxFault(f"{folder} cannot be removed: {removed.stderr[-200:]}")
