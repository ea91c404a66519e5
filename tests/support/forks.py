"""The `clippy` command and its ranks, forked from a process that imports everything once per test session.

Two new Python processes spend some eight seconds on imports. Python's fork server imports once; a forked launcher forks
its ranks from the same server. Processes, files, signals and exit codes are real.
"""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from clippy_train.signals import SIGNALS
from support import processes

COMMAND = "clippy_train.cli"
PRELOADED = [COMMAND, "clippy_train.train.rank", "clippy_train.launch.start", "clippy_train.sweep.sweep", __name__]
# Read while modules are imported
AT_IMPORT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}


class Popen:
    """The part of `subprocess.Popen` that the package and the tests use for `clippy` and its ranks."""

    returncode: int | None = None

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        stdin: int = subprocess.PIPE,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        start_new_session: bool = True,
        pass_fds: Sequence[int] = (),
        cwd: Path | None = None,
    ) -> None:
        assert (command[0], stdin) == (sys.executable, subprocess.PIPE)
        self._command = list(command)
        read, write = os.pipe()
        self.stdin: IO[bytes] = os.fdopen(write, "wb")
        files = [read, stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2, *pass_fds]
        self._process = _fork(command[1:], cwd or Path.cwd(), env, files, start_new_session)
        os.close(read)
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self._command, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Command(Popen):
    """`clippy ARGUMENTS` in the background, in its own session, until the test ends.

    Args:
        merged: take its standard error for its standard output, as a terminal shows them.
    """

    def __init__(
        self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], merged: bool = False
    ) -> None:
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115  # read when the process has ended
        self._err = self._out if merged else tempfile.TemporaryFile("w+")  # noqa: SIM115
        super().__init__(
            [sys.executable, "-m", COMMAND, *arguments], environment, stdout=self._out, stderr=self._err, cwd=cwd
        )
        processes.end_with_test(self)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to its standard output and its standard error, once it has ended."""
        self.wait(timeout)
        self._out.seek(0)
        out = self._out.read()
        self._err.seek(0)
        return out, self._err.read()


def run(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `clippy ARGUMENTS` to completion, like `subprocess.run`."""
    process = Command(arguments, cwd, environment)
    try:
        return subprocess.CompletedProcess(list(arguments), process.wait(timeout), *process.communicate())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


# In place of `subprocess` in a module whose processes are to be forked
SUBPROCESS = SimpleNamespace(Popen=Popen, PIPE=subprocess.PIPE, run=subprocess.run)


def _fork(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str], files: list[int], new_session: bool
) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = _Process(command, str(cwd), dict(environment), files, new_session)
    before = {name: os.environ.get(name) for name in AT_IMPORT}
    resource_tracker.ensure_running()  # it would unblock signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.environ.update(AT_IMPORT)
    try:
        process.start()  # the first one starts the server, whose children have what is blocked here, as ranks must
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return process


class _Process(ForkServerProcess):
    def __init__(
        self, command: Sequence[str], cwd: str, environment: dict[str, str], files: list[int], new_session: bool
    ) -> None:
        super().__init__()
        self._job, self._files = (command, cwd, environment, new_session), files

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": [DupFd(each) for each in self._files]}

    def run(self) -> None:
        gc.freeze()  # collecting what the server imported would take half a second, and copy all of it
        (_, module, *arguments), cwd, environment, new_session = self._job
        processes.die_with_parent()
        multiprocessing.set_start_method(None, force=True)  # a rank forks its loaders; the server's child would not
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]  # it would start another
        if module == COMMAND:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        else:
            os.memfd_create(mark(environment["RANK"], Path(arguments[0]).name))
        if new_session:
            os.setsid()
        inherited = [each.detach() for each in self._files]  # type: ignore[attr-defined]  # DupFd
        for number, file in enumerate(inherited[:3]):
            os.dup2(file, number)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        sys.argv = [module, *arguments]
        code = _main(module, arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def mark(rank: str, run: str) -> str:
    """The name of an open file that a forked rank and its loaders have; their command lines are the server's."""
    return f"rank {rank} of {run}"


def _main(module: str, arguments: list[str]) -> int:
    from clippy_train.run import consolidate
    from support import converter

    consolidate.subprocess = converter.SUBPROCESS  # type: ignore[attr-defined, assignment]  # its own import
    if module == COMMAND:
        from clippy_train import cli
        from clippy_train.launch import agent
        from clippy_train.sweep import trials

        agent.subprocess = trials.subprocess = SUBPROCESS  # type: ignore[attr-defined, assignment]  # what they import
        try:
            return cli.main(arguments)
        except SystemExit as end:
            return int(end.code or 0)
    if module == "clippy_train.train":
        from clippy_train.train.__main__ import main
        from support import faults

        faults.inject()
    elif module == "clippy_train.launch.preflight":
        from clippy_train.launch.preflight import main
    else:
        raise ValueError(f"{module} is not started by an agent")
    return main(*arguments)
