"""A control group for each sample, where this user may make one: the kernel limits all of its processes together.

That needs cgroup v2 and a group of this process's own, as in a container that may write /sys/fs/cgroup, or from
`systemd-run --user --scope -p Delegate=yes COMMAND`. Elsewhere, sums are only sampled (`evaluate.inside`).
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from clippy_train.errors import SandboxFault
from clippy_train.evaluate.inside import DISK_BYTES, EXIT_SECONDS, POLL, PROCESSES

CONTROLLERS = "+memory +pids"
SCORER = "scorer"  # the group of this process: one with groups below it that have limits cannot have processes itself


@cache
def divisible_group() -> Path | None:
    """The group below which this process may make groups with limits; it may have to move into one of them itself."""
    own = own_group()
    if own is None or not os.access(own, os.W_OK) or not os.access(own / "cgroup.procs", os.W_OK):
        return None
    try:
        _enable(own)  # works at once in the root of all groups, or if it was done before
    except OSError:
        if not _divided(own):
            return None
    for group in own.glob("sample-*"):
        if not Path("/proc", group.name.split("-")[1]).exists():  # a scorer that was killed has left it
            with suppress(OSError):
                group.rmdir()
    return own


def own_group() -> Path | None:
    """The folder of this process's group; None without cgroup v2."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"]
    paths = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    found = roots[0] / paths[0].strip("/") if roots and paths else None
    return found if found and found.is_dir() else None


def _divided(own: Path) -> bool:
    """Move to a group below and let others have limits; False, and as before, if other processes are in this group."""
    scorer = own / SCORER
    try:
        scorer.mkdir(exist_ok=True)
        _move(scorer)
        _enable(own)
    except OSError:
        with suppress(OSError):
            _move(own)
            scorer.rmdir()
        return False
    return True


def _move(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _enable(group: Path) -> None:
    (group / "cgroup.subtree_control").write_text(CONTROLLERS)


@contextmanager
def sample_group(memory_bytes: int) -> Iterator[str | None]:
    """A new group for one sample, removed with all that is still in it; None where there can be none.

    Args:
        memory_bytes: for its processes. Its files may be in memory, and come on top.

    Raises:
        SandboxFault: the kernel refuses the group, or it cannot be removed.
    """
    above = divisible_group()
    if above is None:
        yield None
        return
    try:
        group = Path(tempfile.mkdtemp(prefix=f"sample-{os.getpid()}-", dir=above))
    except OSError as error:
        raise SandboxFault(f"no cgroup for a sample: {error}") from error
    try:
        set_limits(group, memory_bytes)
        yield str(group)
    finally:
        _remove(group)


def set_limits(group: Path, memory_bytes: int) -> None:
    """Limit a group to what one sample may use.

    Raises:
        SandboxFault: the kernel refuses.
    """
    try:
        (group / "memory.max").write_text(str(memory_bytes + DISK_BYTES))
        (group / "pids.max").write_text(str(PROCESSES))
        if (swap := group / "memory.swap.max").exists():  # not in a kernel without swap
            swap.write_text("0")
    except OSError as error:
        raise SandboxFault(f"a cgroup for a sample takes no limits: {error}") from error


def _remove(group: Path) -> None:
    """End what a supervisor that was killed has left in a group, and remove it."""
    deadline = time.monotonic() + EXIT_SECONDS
    try:
        while "populated 1" in (group / "cgroup.events").read_text():
            if time.monotonic() > deadline:
                raise SandboxFault(f"the processes in {group} do not end")
            for pid in (group / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(POLL)
        group.rmdir()
    except OSError as error:
        raise SandboxFault(f"a cgroup of a sample cannot be removed: {error}") from error
