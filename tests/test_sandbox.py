"""Adversarial programs: none passes that should not, reaches outside its folder, or leaves processes behind."""

import os
import sys
import time
from pathlib import Path

import pytest

from clippy_train.evaluate import sandbox
from clippy_train.evaluate.sandbox import PASSED, TIMED_OUT, Limits, isolation_command, run_checked, run_isolated

TEST = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(-2) == 4\n"
RIGHT = "def square(x):\n    return x * x\n"
WRONG = "def square(x):\n    return x\n"
LIMITS = Limits(seconds=10, memory_bytes=512 << 20)
HURRIED = Limits(seconds=1, memory_bytes=512 << 20)

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux's"),
]


def outcome(program: str, limits: Limits = LIMITS, test: str = TEST) -> str:
    return run_checked(program, test, "square", limits)


def test_a_correct_program_passes_and_a_wrong_one_reports_its_error() -> None:
    assert outcome(RIGHT) == PASSED
    assert outcome(WRONG) == "failed: AssertionError:"
    assert outcome("def square(x) return x").startswith("failed: SyntaxError")
    assert outcome("def cube(x):\n    return x\n") == "failed: KeyError: 'square'"


def test_a_program_also_runs_without_namespaces() -> None:
    assert run_isolated((), RIGHT, TEST, "square", LIMITS) == PASSED
    assert run_isolated((), WRONG, TEST, "square", LIMITS) != PASSED


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
    if "exit" in attack.lower() and "atexit" not in attack:  # a program cannot kill its namespace's first process
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
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a: None",
        "import os\nos.write = os.dup = lambda *a: 0",
        "import builtins\nbuiltins.AssertionError = builtins.BaseException = OSError",
        "import sys\nsys.modules['__main__'].run_sample = lambda *a: None",
        "import sys\nsys.modules['__main__'].__dict__.clear()",
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
    assert time.monotonic() - started < 3 * HURRIED.seconds


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
    assert time.monotonic() - started < 5 * HURRIED.seconds
    assert not samples()


@pytest.mark.parametrize("leave", ["", "os.setsid()\n    if os.fork(): os._exit(0)\n    "], ids=["child", "daemon"])
def test_a_child_does_not_outlive_its_program(leave: str, tmp_path: Path) -> None:
    if leave and "--pid" not in isolation_command():
        pytest.skip("no process namespaces here: a daemon leaves the process group")
    program = f"import os, time\nif not os.fork():\n    {leave}time.sleep(50)\n    os._exit(0)\n" + RIGHT
    assert outcome(program) == PASSED
    assert not samples()


def samples() -> list[str]:
    """Processes that still run a sample, except zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if sandbox.INSIDE.encode()[:200] in (entry / "cmdline").read_bytes():
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


def test_files_outside_of_the_temporary_folder_are_inaccessible(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:  # permissions must not stop the attack; only the sandbox may
        if folder.stat().st_uid == os.getuid() and folder != Path(folder.root) and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o666)
    victim = str(tmp_path / "secret")
    attacks = [
        f"open({victim!r}, 'w').write('x')", f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os\nos.remove({victim!r})", f"import os\nos.mkdir({str(tmp_path / 'folder')!r})",
        f"import os\nos.symlink({victim!r}, 'link')\nopen('link', 'a').write('x')",
        f"import os\nos.rename({victim!r}, 'mine')", f"assert 'secret' not in open({victim!r}).read()",
    ]  # fmt: skip
    assert [outcome(f"{attack}\n{RIGHT}").split(":")[0] for attack in attacks] == ["failed"] * len(attacks)
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert (tmp_path / "secret").read_text() == "secret"
    assert outcome("open('own', 'w').write('x')\nassert open('own').read() == 'x'\n" + RIGHT) == PASSED


def test_the_environment_and_other_processes_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    look = "import glob, os\nseen = str(dict(os.environ))\n"
    look += "for path in glob.glob('/proc/[0-9]*/environ'):\n    try: seen += open(path).read()\n"
    look += "    except OSError: pass\nassert 'hf_secret' not in seen\n"
    assert outcome(look + RIGHT) == PASSED
    assert os.environ["HF_TOKEN"] == "hf_secret"


def test_there_is_no_network() -> None:
    if "--net" not in isolation_command():
        pytest.skip("no network namespaces here")
    look = "import socket\nassert {name for _, name in socket.if_nameindex()} <= {'lo'}\n"
    look += "try:\n    socket.create_connection(('127.0.0.1', 22), 1)\nexcept OSError: pass\nelse: raise ValueError\n"
    assert outcome(look + RIGHT) == PASSED


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome("import os\nos.mkdir('locked')\nopen('locked/file', 'w')\nos.chmod('locked', 0)\n" + RIGHT)
    outcome("import time\nopen('file', 'w')\ntime.sleep(9)", HURRIED)
    assert list(tmp_path.iterdir()) == []
