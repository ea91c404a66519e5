"""Adversarial programs: none passes that should not, reaches outside its folder, or leaves processes behind.

Ordinary programs: none fails because of the machine, or of the samples beside it.
"""

import fcntl
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from clippy_train.errors import SandboxFault
from clippy_train.evaluate import inside, sandbox
from clippy_train.evaluate.confine import NEW_CALLS, SET_FLAGS
from clippy_train.evaluate.inside import PASSED, TIMED_OUT
from clippy_train.evaluate.sandbox import Isolation, Limits, isolation, possible_isolations, run_checked, run_isolated

TEST = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(-2) == 4\n"
RIGHT = "def square(x):\n    return x * x\n"
WRONG = "def square(x):\n    return x\n"
LIMITS = Limits(seconds=10, memory_bytes=512 << 20)
HURRIED = Limits(seconds=1, memory_bytes=512 << 20)
FS_IOC_GETFLAGS = 0x80086601

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux's"),
]


def outcome(program: str, limits: Limits = LIMITS, level: Isolation | None = None) -> str:
    return run_isolated(level or isolation(), program, TEST, "square", limits)


@cache
def without_namespaces() -> Isolation:
    return sandbox.strongest(each for each in possible_isolations() if not each.namespaces)


@pytest.fixture(params=[isolation, without_namespaces], ids=["strongest", "without namespaces"])
def level(request: pytest.FixtureRequest) -> Isolation:
    found: Isolation = request.param()
    return found


def guarded(*attempts: str) -> str:
    """A program that makes all attempts, each of which may fail, and is right."""
    return "".join(f"try:\n    {attempt}\nexcept (OSError, AssertionError): pass\n" for attempt in attempts) + RIGHT


def test_a_correct_program_passes_and_a_wrong_one_reports_its_error() -> None:
    assert outcome(RIGHT) == PASSED
    assert outcome(WRONG) == "failed: AssertionError:"
    assert outcome("def square(x) return x").startswith("failed: SyntaxError")
    assert outcome("def cube(x):\n    return x\n") == "failed: KeyError: 'square'"


def test_a_program_also_runs_without_namespaces() -> None:
    assert outcome(RIGHT, level=without_namespaces()) == PASSED
    assert outcome(WRONG, level=without_namespaces()) == "failed: AssertionError:"


def test_namespaces_are_used_where_the_system_has_them() -> None:
    user = [] if os.getuid() == 0 else ["--map-root-user"]
    command = ["unshare", *user, "--mount", "--pid", "--net", "--ipc", "--fork", "--mount-proc", "true"]
    if not shutil.which("unshare") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no namespaces here")
    assert isolation().namespaces
    assert not isolation().gaps


@pytest.mark.parametrize(
    "attack",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import os\nos.kill(os.getpid(), 9)",
        "import atexit, os\natexit.register(os._exit, 0)\nquit = exit",
    ],
)
def test_an_early_exit_is_not_a_pass(attack: str) -> None:
    assert outcome(WRONG + attack).startswith("failed:")
    if "atexit" not in attack:
        assert outcome(f"{attack}\n{RIGHT}").startswith("failed:")


@pytest.mark.parametrize(
    "attack",
    [
        "print('passed')\nimport os\nos._exit(0)",
        # write everything that a program can see of itself to every descriptor
        """
import gc, os, sys
seen = []
frame = sys._getframe()
while frame:
    seen.append(str({name: str(value)[:60] for name, value in frame.f_locals.items()}))
    frame = frame.f_back
seen += [str(sys.argv), str(dict(os.environ)), str(gc.get_objects())[:100000]]
for name in ("cmdline", "environ"):
    seen.append(open(f"/proc/self/{name}").read())
for descriptor in range(64):
    try:
        os.write(descriptor, "\\n".join(seen).encode())
    except OSError:
        pass
os._exit(0)
""",
        # copy everything that can still be read
        """
import os
found = b""
for descriptor in range(64):
    try:
        found += os.pread(descriptor, 10000, 0)
    except OSError:
        pass
for descriptor in range(64):
    try:
        os.write(descriptor, found)
    except OSError:
        pass
os._exit(0)
""",
    ],
    ids=["guess", "frames", "descriptors"],
)
def test_a_forged_token_is_not_a_pass(attack: str) -> None:
    assert outcome(WRONG + attack).startswith("failed:")


@pytest.mark.parametrize(
    "attack",
    [
        "def check(candidate): pass",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a: None\ndef check(candidate): pass",
        "import os\nos.write = os.dup = lambda *a: 0",
        "import builtins\nbuiltins.AssertionError = builtins.BaseException = OSError",
        "import sys\nsys.modules['clippy_train.evaluate.inside'].run_sample = lambda *a: None",
        "import sys\nsys.modules['clippy_train.evaluate.inside'].__dict__.clear()",
        "import sys\nsys.modules['clippy_train.evaluate.inside'].Job.token = property(lambda self: 'failed: ')",
        "import json\njson.load = lambda *a: {}",
        'x = """',
        "if False:",
    ],
)
def test_a_patched_or_swallowed_checker_still_checks(attack: str) -> None:
    assert outcome(f"{WRONG}{attack}") != PASSED
    assert outcome(f"{attack}\n{WRONG}") != PASSED


def test_catching_every_exception_does_not_escape_the_time_limit() -> None:
    program = "import signal\nfor n in (2, 14, 15): signal.signal(n, signal.SIG_IGN)\n"
    program += "def square(x):\n    while True:\n        try:\n            while True: pass\n"
    program += "        except BaseException:\n            pass\n"
    started = time.monotonic()
    assert outcome(program, HURRIED) == TIMED_OUT
    assert time.monotonic() - started < 20 * HURRIED.seconds  # waits for a core do not count


def test_a_sleeping_program_and_busy_threads_do_not_escape_the_time_limit() -> None:
    assert outcome("import time\ntime.sleep(60)\n" + RIGHT, HURRIED) == TIMED_OUT
    threads = "import threading\ndef spin():\n    while True: pass\n"
    threads += "for _ in range(3): threading.Thread(target=spin).start()\n"
    assert outcome(threads + RIGHT) == PASSED  # they end with it
    many = "import threading, time\nfor _ in range(500): threading.Thread(target=time.sleep, args=(60,)).start()\n"
    assert outcome(many + RIGHT).startswith("failed: RuntimeError: can't start new thread")


def test_a_fork_bomb_ends_with_its_program() -> None:
    started = time.monotonic()
    assert outcome("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", HURRIED) == TIMED_OUT
    assert time.monotonic() - started < 20 * HURRIED.seconds  # its own waits for a core do not count
    assert not samples()


@pytest.mark.parametrize("leave", ["", "os.setsid()\n    if os.fork(): os._exit(0)\n    "], ids=["child", "daemon"])
def test_a_child_does_not_outlive_its_program(leave: str, level: Isolation) -> None:
    program = f"import os, time\nif not os.fork():\n    {leave}time.sleep(50)\n    os._exit(0)\n" + RIGHT
    assert outcome(program, level=level) == PASSED
    assert not samples()


def samples() -> list[str]:
    """Processes that still run a sample, except zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if inside.__name__.encode() in (entry / "cmdline").read_bytes():
                found.append((entry / "stat").read_text())
        except OSError:
            continue
    return [each for each in found if each.split(")")[-1].split()[0] != "Z"]


@pytest.mark.parametrize(
    "greedy", ["x = bytearray(1 << 30)", "x = []\nwhile True: x.append('x' * 1000000)", "x = 'x' * (1 << 40)"]
)
def test_memory_is_limited(greedy: str) -> None:
    assert outcome(f"{greedy}\n{RIGHT}").startswith("failed: MemoryError")


def test_huge_output_is_discarded_and_a_huge_file_fails() -> None:
    loud = "import sys\nfor _ in range(200): print('x' * 1000000); sys.stderr.write('x' * 1000000)\n"
    assert outcome(loud + RIGHT) == PASSED
    flood = "import os\nfor fd in range(3, 64):\n    try:\n        while True: os.write(fd, b'x' * 1000000)\n"
    assert outcome(f"{flood}    except OSError: pass\n{RIGHT}").startswith("failed:")
    large = "f = open('large', 'wb')\nfor _ in range(100): f.write(b'x' * 1000000)\n"
    assert outcome(large + RIGHT) != PASSED


def test_memory_of_all_processes_together_is_limited(level: Isolation) -> None:
    child = "if not os.fork():\n        x = bytearray(90 << 20)\n        time.sleep(9)\n"
    program = f"import os, time\nfor _ in range(4):\n    {child}time.sleep(5)\n{RIGHT}"
    limits = Limits(seconds=10, memory_bytes=256 << 20)
    assert outcome(program, limits, level) == "failed: MemoryError: its processes together use more than 256 MB"


def test_memory_that_no_limit_counts_cannot_be_had(level: Isolation) -> None:
    program = "import ctypes, os\ntry: os.memfd_create('x')\nexcept OSError: pass\nelse: raise ValueError\n"
    program += "assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) == -1\n"
    assert outcome(program + RIGHT, level=level) == PASSED


def test_files_together_are_limited(level: Isolation) -> None:
    program = "import time\nfor n in range(9): open(f'{n}', 'wb').write(bytes(10 << 20))\ntime.sleep(5)\n"
    assert outcome(program + RIGHT, level=level).startswith(
        "failed: OSError: [Errno 28]" if level.namespaces else "failed: more than 64 MB of files"
    )


# Outside


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that only the sandbox protects."""
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == os.getuid() and folder != Path(folder.root) and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o055)
    path = tmp_path / "secret"
    path.write_text("secret")
    path.chmod(0o666)
    return path


def test_files_outside_of_the_temporary_folder_are_inaccessible(secret: Path, level: Isolation) -> None:
    before = secret.stat()
    victim, new = str(secret), str(secret.with_name("new"))
    attacks = [
        f"open({victim!r}, 'w').write('x')", f"open({new!r}, 'w')", f"os.remove({victim!r})", f"os.mkdir({new!r})",
        f"os.symlink({victim!r}, 'link'); open('link', 'a').write('x')", f"os.rename({victim!r}, 'mine')",
        f"os.rename({victim!r}, {new!r})", f"os.truncate({victim!r}, 0)", f"os.chmod({victim!r}, 0)",
        f"os.utime({victim!r}, (1, 1))", f"os.setxattr({victim!r}, 'user.x', b'')",
    ]  # fmt: skip
    assert outcome(f"import os\n{guarded(*attacks)}", level=level) == PASSED
    assert [path.name for path in secret.parent.iterdir()] == ["secret"]
    assert (secret.read_text(), os.listxattr(secret)) == ("secret", [])
    assert (secret.stat().st_mode, secret.stat().st_mtime) == (before.st_mode, before.st_mtime)
    assert outcome(f"assert open({victim!r}).read() != 'secret'\n{RIGHT}", level=level).startswith("failed: ")
    assert outcome("open('own', 'w').write('x')\nassert open('own').read() == 'x'\n" + RIGHT, level=level) == PASSED


def test_processes_and_sockets_outside_are_out_of_reach(tmp_path: Path, level: Isolation) -> None:
    """Attacks one process and not all (`kill(-1)`), which the kernel checks alike: a failing test must not end more."""
    with (
        socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as abstract, socket.socket() as tcp,
        subprocess.Popen(["sleep", "60"]) as victim,
    ):  # fmt: skip
        named.bind(str(tmp_path / "socket"))
        abstract.bind(f"\0{tmp_path}")
        tcp.bind(("127.0.0.1", 0))
        for each in (named, abstract, tcp):
            each.listen()
            each.setblocking(False)
        attacks = [
            f"socket.socket(socket.AF_UNIX).connect({str(tmp_path / 'socket')!r})",
            f"socket.socket(socket.AF_UNIX).connect({chr(0) + str(tmp_path)!r})",
            f"socket.create_connection({tcp.getsockname()})", f"os.kill({victim.pid}, 9)", "os.kill(os.getppid(), 9)",
            f"assert open('/proc/{victim.pid}/environ').read() == '{chr(92)}0'",
        ]  # fmt: skip
        assert outcome(f"import os, socket\n{guarded(*attacks)}", level=level) == PASSED
        for each in (named, abstract, tcp):
            with pytest.raises(BlockingIOError):
                each.accept()
        assert victim.poll() is None
        victim.kill()


def test_a_pair_of_sockets_does_not_reach_a_socket_outside(tmp_path: Path, level: Isolation) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outside:
        outside.bind(str(tmp_path / "socket"))
        outside.setblocking(False)
        sends = [f"socket.socketpair(type={kind})[0].sendto(b'x', {str(tmp_path / 'socket')!r})" for kind in (2, 3)]
        assert outcome(f"import asyncio, socket\nsocket.socketpair()\n{guarded(*sends)}", level=level) == PASSED
        with pytest.raises(BlockingIOError):
            outside.recv(1)


def test_sockets_to_the_host_of_a_virtual_machine_are_refused(level: Isolation) -> None:
    attack = "import socket\ntry: socket.socket(socket.AF_VSOCK)\nexcept OSError: pass\nelse: raise ValueError\n"
    assert outcome(attack + RIGHT, level=level) == PASSED


def test_what_other_processes_are_given_stays_out_of_reach(level: Isolation) -> None:
    with subprocess.Popen(["sleep", "60"]) as victim:
        other = victim.pid
        before = resource.prlimit(other, resource.RLIMIT_NOFILE), os.getpriority(os.PRIO_PROCESS, other)
        assert os.sched_getscheduler(other) == os.SCHED_OTHER
        attacks = [
            f"resource.prlimit({other}, resource.RLIMIT_NOFILE, (9, 9))", f"os.setpriority(0, {other}, 19)",
            f"os.sched_setscheduler({other}, os.SCHED_BATCH, os.sched_param(0))",
        ]  # fmt: skip
        assert outcome(f"import os, resource\n{guarded(*attacks)}", level=level) == PASSED
        assert (resource.prlimit(other, resource.RLIMIT_NOFILE), os.getpriority(os.PRIO_PROCESS, other)) == before
        assert os.sched_getscheduler(other) == os.SCHED_OTHER
        victim.kill()


def test_a_sample_leaves_no_shared_memory_of_its_user(level: Isolation) -> None:
    before = Path("/proc/sysvipc/shm").read_text()
    assert outcome(f"import ctypes\nctypes.CDLL(None).shmget(0, 4096, 0o1600)\n{RIGHT}", level=level) == PASSED
    assert Path("/proc/sysvipc/shm").read_text() == before


def test_attributes_outside_cannot_be_set_by_newer_calls(secret: Path, level: Isolation) -> None:
    """Which a library may not know yet."""

    def flags() -> bytes:
        with secret.open() as file:
            return fcntl.ioctl(file, FS_IOC_GETFLAGS, bytes(8))

    before, victim = flags(), str(secret).encode()
    program = f"""
import ctypes
call, text = ctypes.CDLL(None).syscall, ctypes.create_string_buffer(b"x")
value, size = (ctypes.c_uint64 * 2)(ctypes.addressof(text), 1), ctypes.c_long(16)
call({NEW_CALLS["setxattrat"]}, -100, {victim!r}, 0, b"user.x", value, size)
call({NEW_CALLS["file_setattr"]}, -100, {victim!r}, (ctypes.c_uint64 * 3)(0x40), 24, 0)
"""
    assert outcome(program + RIGHT, level=level) == PASSED
    assert (os.listxattr(secret), flags()) == ([], before)


def test_flags_of_files_are_not_set() -> None:
    change = (
        f"with open('own', 'w') as file:\n    fcntl.ioctl(file, {SET_FLAGS[0]}, bytearray(b'{chr(64)}' + bytes(7)))\n"
    )
    look = f"    assert fcntl.ioctl(file, {FS_IOC_GETFLAGS}, bytes(8))[0] & 64 == 0\n"
    assert outcome(f"import fcntl\n{change}{look}{RIGHT}", level=without_namespaces()) == PASSED


def test_the_environment_and_other_processes_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    look = "import glob, os\nseen = str(dict(os.environ))\n"
    look += "for path in glob.glob('/proc/[0-9]*/environ'):\n    try: seen += open(path).read()\n"
    look += "    except OSError: pass\nassert 'hf_secret' not in seen\n"
    assert outcome(look + RIGHT) == PASSED
    assert os.environ["HF_TOKEN"] == "hf_secret"


def test_there_is_no_network() -> None:
    if not isolation().namespaces:
        pytest.skip("no network namespaces here")
    look = "import socket\nassert {name for _, name in socket.if_nameindex()} <= {'lo'}\n"
    look += "try:\n    socket.create_connection(('127.0.0.1', 22), 1)\nexcept OSError: pass\nelse: raise ValueError\n"
    assert outcome(look + RIGHT) == PASSED


@pytest.mark.parametrize(
    ("level", "landlock", "seccomp", "expected"),
    [
        (Isolation(True, True), 0, True, []),
        (Isolation(True, True), 6, False, ["vsock"]),
        (Isolation(False, True), 6, True, ["no namespaces"]),
        (Isolation(False, True), 2, False, ["no namespaces", "no libseccomp", "version 3", "version 6"]),
        (Isolation(False, False), 0, True, ["as root", "no namespaces", "no Landlock", "version 6"]),
    ],
)
def test_what_remains_open_is_named(
    level: Isolation, landlock: int, seccomp: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 0)
    monkeypatch.setattr("clippy_train.evaluate.confine.landlock_version", lambda: landlock)
    monkeypatch.setattr("clippy_train.evaluate.confine.seccomp_available", lambda: seccomp)
    assert len(level.gaps) == len(expected)
    assert all(word in gap for word, gap in zip(expected, level.gaps, strict=True))


# Ordinary programs, and the machine


def test_an_ordinary_program_finds_what_it_needs(level: Isolation) -> None:
    program = """
import dataclasses, multiprocessing, os, shutil, sys, threading
from typing import ClassVar
multiprocessing.Lock()
assert sys.modules[__name__].__dict__ is globals()
@dataclasses.dataclass
class A:
    x: "ClassVar[int]" = 1
assert not dataclasses.fields(A)
open("a", "w").close()
shutil.copy("a", "b")
for each in [threading.Thread(target=print) for _ in range(9)]:
    each.start()
assert os.environ["OMP_NUM_THREADS"] == "1" and os.cpu_count() == len(os.sched_getaffinity(0)) <= 4
"""
    assert outcome(program + RIGHT, level=level) == PASSED


def test_a_neighbour_with_many_processes_fails_no_other_sample(level: Isolation) -> None:
    fork = (
        "try:\n    while True:\n        if not os.fork(): time.sleep(1); os._exit(0)\nexcept OSError: time.sleep(1)\n"
    )
    modest = "import os\nif not os.fork(): os._exit(0)\nos.wait()\n"
    with ThreadPoolExecutor() as pool:
        greedy = pool.submit(outcome, f"import os, time\n{fork}{RIGHT}", LIMITS, level)
        time.sleep(0.5)
        assert [outcome(modest + RIGHT, level=level) for _ in range(3)] == [PASSED] * 3
        assert greedy.result() == (PASSED if level.namespaces else "failed: more than 32 processes and threads")


def test_waiting_for_a_core_does_not_count_as_time() -> None:
    busy = "import time\nwhile time.process_time() < 0.5: pass\n"
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        started = time.monotonic()
        with ThreadPoolExecutor(5) as pool:
            found = list(pool.map(lambda _: outcome(busy + RIGHT, HURRIED), range(5)))
        assert found == [PASSED] * 5
        assert time.monotonic() - started > 1.5 * HURRIED.seconds  # otherwise nobody waited
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_pause_of_the_machine_does_not_count_as_time() -> None:
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(outcome, f"import time\ntime.sleep(0.5)\n{RIGHT}", Limits(1.5, 512 << 20))
        deadline = time.monotonic() + 20
        while len(own_samples()) < 2 + isolation().namespaces and time.monotonic() < deadline:
            time.sleep(0.02)
        paused = own_samples()
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in paused:
                os.kill(pid, number)
            time.sleep(3)
        assert found.result() == PASSED


def own_samples() -> list[int]:
    """The processes of this one's samples: supervisors, with namespaces two for each, and what they supervise."""
    return list(inside.descendants(os.getpid()))


def test_each_sample_has_a_few_of_the_cores() -> None:
    many = set(range(3, 67))
    assert {len(inside.some_cores(many, number)) for number in range(99)} == {inside.CORES}
    assert set.union(*(inside.some_cores(many, number) for number in range(99))) == many
    assert inside.some_cores({5, 7}, 9) == {5, 7}


def test_a_limit_of_the_shell_is_not_a_verdict() -> None:
    script = f"""
import resource
from clippy_train.errors import SandboxFault
from clippy_train.evaluate.sandbox import *
run_checked({RIGHT!r}, {TEST!r}, "square", Limits(10, 512 << 20))
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
try:
    print(run_isolated(isolation(), {RIGHT!r}, {TEST!r}, "square", Limits(10, 512 << 20)))
except SandboxFault as error:
    print(error)
"""
    drop = [] if os.getuid() else ["setpriv", "--bounding-set", "-sys_resource"]
    found = subprocess.run([*drop, sys.executable, "-c", script], capture_output=True, text=True)
    assert "need a limit of 64, and here it is at most 50" in found.stdout


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    level = without_namespaces()
    locked = "import os\nos.mkdir('locked')\nopen('locked/file', 'w')\nos.chmod('locked', 0)\n"
    deep = "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\n"
    assert [outcome(program + RIGHT, level=level) for program in (locked, deep)] == [PASSED] * 2
    assert outcome("import time\nopen('file', 'w')\ntime.sleep(9)", HURRIED, level) == TIMED_OUT
    assert list(tmp_path.iterdir()) == []


def test_the_disk_does_not_matter_to_a_sample_with_its_own_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    if not isolation().namespaces:
        pytest.skip("no namespaces here")
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    assert outcome("open('file', 'w').write('x')\n" + RIGHT) == PASSED


@pytest.mark.parametrize(
    ("target", "value", "cause"),
    [
        ("clippy_train.evaluate.inside.DISK_BYTES", 1 << 60, "set TMPDIR"),
        ("tempfile.tempdir", "/nonexistent", "no folder for a sample"),
        ("sys.executable", "/nonexistent", "/nonexistent"),
        ("clippy_train.evaluate.inside.interpreter", lambda: "another", "another interpreter"),
        ("clippy_train.evaluate.sandbox.START", "import os; os._exit(3)", "status 3"),
        ("clippy_train.evaluate.sandbox.PATIENCE", 0, "timed out"),
    ],
)
def test_a_fault_of_the_machine_is_not_a_verdict(
    target: str, value: object, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = without_namespaces()
    monkeypatch.setattr(target, value)
    with pytest.raises(SandboxFault, match=cause):
        outcome(RIGHT, level=level)


def test_a_fault_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [SandboxFault("first"), SandboxFault("second"), SandboxFault("third")]

    def run(*arguments: object) -> str:
        if len(faults) > 1:
            raise faults.pop(0)
        return PASSED

    isolation()
    monkeypatch.setattr(sandbox, "RETRY_SECONDS", 0)
    monkeypatch.setattr(sandbox, "run_isolated", run)
    with pytest.raises(SandboxFault, match="second"):
        run_checked(RIGHT, TEST, "square", LIMITS)
    faults.append(SandboxFault("fourth"))
    assert run_checked(RIGHT, TEST, "square", LIMITS) == PASSED
