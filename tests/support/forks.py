"""The `clippy` command and its ranks, forked from a process that imports everything once per test session.

Two new Python processes spend some eight seconds on imports. Python's fork server imports once; a forked launcher forks
its ranks from the same server. Processes, files, signals and exit codes are real. Tests that depend on the imports
themselves (PYTHONPATH, a broken module) need a real command.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

PRELOADED = ["clippy_train.cli", "clippy_train.train.rank", "clippy_train.launch.start", "support.forks"]
# Read while modules are imported
AT_IMPORT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}


def run(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `clippy ARGUMENTS` to completion, like `subprocess.run`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, Path(os.devnull).open() as nothing:
        files = [nothing.fileno(), out.fileno(), err.fileno()]
        process = _fork(["-m", "clippy_train.cli", *arguments], cwd, environment, files, new_session=True)
        process.join(timeout)
        if process.exitcode is None:
            os.killpg(process.pid or 0, signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out.read(), err.read())


class Popen:
    """The part of `subprocess.Popen` that `launch.agent` uses for a rank."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stdin: int, start_new_session: bool) -> None:
        assert command[0] == sys.executable
        read, write = os.pipe()
        self.stdin: IO[bytes] = os.fdopen(write, "wb")
        self._process = _fork(command[1:], Path.cwd(), env, [read, 1, 2], start_new_session)
        os.close(read)
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _fork(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str], files: list[int], new_session: bool
) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = _Process(command, str(cwd), dict(environment), files, new_session)
    before = {name: os.environ.get(name) for name in AT_IMPORT}
    os.environ.update(AT_IMPORT)  # for the server, which the first process starts
    try:
        process.start()
    finally:
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
        (_, module, *arguments), cwd, environment, new_session = self._job
        is_rank = module != "clippy_train.cli"
        if is_rank:
            from clippy_train.signals import SIGNALS

            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # as the agent does for its ranks
        if new_session:
            os.setsid()
        for number, file in enumerate([each.detach() for each in self._files]):  # type: ignore[attr-defined]  # DupFd
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


def _main(module: str, arguments: list[str]) -> int:
    if module == "clippy_train.cli":
        from clippy_train import cli
        from clippy_train.launch import agent

        stand_in = SimpleNamespace(Popen=Popen, PIPE=subprocess.PIPE)
        agent.subprocess = stand_in  # type: ignore[attr-defined, assignment]  # replaces the module that it imports
        try:
            return cli.main(arguments)
        except SystemExit as end:
            return int(end.code or 0)
    if module == "clippy_train.train":
        from clippy_train.train.__main__ import main
    elif module == "clippy_train.launch.preflight":
        from clippy_train.launch.preflight import main
    else:
        raise ValueError(f"{module} is not started by an agent")
    return main(*arguments)
