"""Where the kernel gives samples control groups, their limits hold for all processes of a sample, and none is left.

Skipped where it does not. `.ci/run` runs this file in a kernel that does.
"""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clippy_train.errors import SandboxFault
from clippy_train.evaluate import cgroups, confine
from clippy_train.evaluate.cgroups import divisible_group, sample_group, set_limits
from clippy_train.evaluate.inside import DISK_BYTES, PASSED, PROCESSES, Group
from clippy_train.evaluate.sandbox import Isolation, Limits, possible_isolations, run_isolated

MEMORY = 64 << 20
CGROUP_NAMESPACE = 0x02000000  # CLONE_NEWCGROUP
CHECK = "def check(candidate):\n    candidate()\n"
# Files in memory, which belong to no process
FILES = """
import os
def fill():
    path = "/dev/shm/test-cgroups-"
    try:
        for number in range(16):
            with open(path + str(number), "wb") as file:
                file.write(bytes(15 << 20))
    finally:
        for number in range(16):
            if os.path.exists(path + str(number)):
                os.unlink(path + str(number))
"""
THREADS = f"""
import os, signal
def fork():
    children = []
    try:
        for number in range({2 * PROCESSES}):
            child = os.fork()
            if not child:
                signal.pause()
            children.append(child)
    except BlockingIOError:
        assert {PROCESSES - 4} < len(children) < {PROCESSES}  # in a user namespace, its own limit counts others too
        return
    raise AssertionError("nothing stopped it")
"""

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(divisible_group() is None, reason="this process has no control group that it may divide"),
]


@pytest.fixture(params=possible_isolations(), ids=str)
def level(request: pytest.FixtureRequest) -> Isolation:
    found: Isolation = request.param
    return found


Start = Callable[..., int]


@pytest.fixture
def start_in() -> Iterator[Start]:
    """Start a process in a group, which calls a function if given and then sleeps; it is ended after the test."""
    started = []

    def start(folder: str, function: Callable[[], object] = int) -> int:
        entered, entering = os.pipe()
        child = os.fork()
        if not child:
            try:
                Group(folder).enter()
                os.write(entering, b"1")
                function()
                signal.pause()
            finally:
                os._exit(1)
        started.append(child)
        os.read(entered, 1)
        return child

    yield start
    for child in started:
        subprocess.run(["kill", "-9", str(child)], capture_output=True)


def groups() -> list[str]:
    above = divisible_group()
    assert above
    return [path.name for path in above.glob("sample-*")]


def test_samples_have_the_limits_of_their_group(level: Isolation) -> None:
    limits = Limits(seconds=10, memory_bytes=256 << 20)
    assert run_isolated(level, "def f(): pass", CHECK, "f", limits) == PASSED
    assert run_isolated(level, THREADS, CHECK, "fork", limits) == PASSED
    assert not groups()


@pytest.mark.parametrize("level", [each for each in possible_isolations() if not each.namespaces], ids=str)
def test_files_in_memory_count(level: Isolation) -> None:
    try:
        found = run_isolated(level, FILES, CHECK, "fill", Limits(seconds=20, memory_bytes=128 << 20))
        assert found == "failed: MemoryError: its processes together use more than 128 MB"
    finally:
        for path in Path("/dev/shm").glob("test-cgroups-*"):
            path.unlink()


def test_the_kernel_ends_processes_that_together_use_too_much(start_in: Start) -> None:
    def fill() -> None:
        for _ in range(2):
            os.fork()
        bytearray(b"x") * (MEMORY + DISK_BYTES - (32 << 20))

    with sample_group(MEMORY) as folder:
        assert folder
        group = Group(folder)
        assert group.kills() == (0, False)
        start_in(folder, fill)
        while not group.kills()[0]:
            pass
        assert group.kills()[1]
    assert not groups()


def test_a_group_ends_with_the_processes_that_are_left_in_it(start_in: Start) -> None:
    with sample_group(MEMORY) as folder:
        assert folder
        child = start_in(folder)
        assert Path(folder, "cgroup.procs").read_text().split() == [str(child)]
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not groups()


def test_a_sample_of_an_ordinary_user_does_not_mount_its_group(start_in: Start, tmp_path: Path) -> None:
    """It could change its own limits, and make groups below that keep its own from being removed."""
    said = tmp_path / "said"
    said.touch()
    said.chmod(0o666)
    tries = os.open(said, os.O_WRONLY)

    def unshare() -> None:
        if not os.getuid():
            confine.become(confine.FIRST_FREE_UID)
        confine.enter_namespaces()
        confine.deny_cgroup_namespaces()
        try:
            confine.call("unshare", confine.NEWUSER | CGROUP_NAMESPACE)
            os.write(tries, b"unshared")
        except OSError as error:
            os.write(tries, os.strerror(error.errno or 0).encode())

    with sample_group(MEMORY) as folder:
        assert folder
        start_in(folder, unshare)
        while not said.read_text():
            pass
    assert said.read_text() == os.strerror(errno.ENOSPC)


def test_groups_of_a_scorer_that_was_killed_are_removed() -> None:
    above = divisible_group()
    assert above
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, used = (above / f"sample-{pid}-x" for pid in (ended.pid, os.getpid()))
    left.mkdir()
    used.mkdir()
    try:
        divisible_group.cache_clear()
        assert divisible_group() == above
        assert [left.exists(), used.exists()] == [False, True]
    finally:
        used.rmdir()


def test_a_kernel_without_swap_has_no_limit_for_it(tmp_path: Path) -> None:
    set_limits(tmp_path, MEMORY)
    assert {path.name for path in tmp_path.iterdir()} == {"memory.max", "pids.max"}


def test_a_group_that_cannot_be_removed_is_a_fault() -> None:
    entered = sample_group(MEMORY)
    folder = entered.__enter__()
    assert folder
    below = Path(folder, "below")
    below.mkdir()
    with pytest.raises(SandboxFault, match="cannot be removed"):
        entered.__exit__(None, None, None)
    below.rmdir()
    Path(folder).rmdir()


DIVIDED = """
import os, sys
from pathlib import Path
from clippy_train.evaluate.cgroups import divisible_group, own_group
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
found = divisible_group()
print(found, own_group())
"""


def test_a_group_is_divided_unless_it_has_other_processes(start_in: Start) -> None:
    with sample_group(256 << 20) as folder:
        assert folder
        command = [sys.executable, "-c", DIVIDED, folder]
        alone = subprocess.run(command, capture_output=True, text=True, check=True)
        assert alone.stdout.split() == [folder, f"{folder}/{cgroups.SCORER}"]
        Path(folder, cgroups.SCORER).rmdir()
        Path(folder, "cgroup.subtree_control").write_text("-memory -pids")
        start_in(folder)
        beside = subprocess.run(command, capture_output=True, text=True, check=True)
        assert beside.stdout.split() == ["None", folder]
        assert not Path(folder, cgroups.SCORER).exists()
