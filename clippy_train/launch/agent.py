"""The agent of one node: starts a process per device, forwards signals, detects hangs, returns one exit code.

The launcher is the agent of its own machine. Under Slurm, srun starts one agent on each node:

    python -m clippy_train.launch.agent RUN_DIR HOST:PORT

so a cluster and a laptop share their handling of signals, stragglers, hangs and exit codes. The exit code is that of
the rank that caused the end (`launch.ending`); torchrun's agent would replace it with its own.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from clippy_train.config import TrainConfig, load
from clippy_train.errors import ClippyError, ConfigError, Interrupted, MachineFault
from clippy_train.launch import ending, stacks
from clippy_train.launch.hub import fetch_bases
from clippy_train.report import say, set_up_log
from clippy_train.run.folder import CONFIG
from clippy_train.signals import SIGNALS, handling_signals

RANK, PREFLIGHT = "clippy_train.train", "clippy_train.launch.preflight"  # what a rank's process runs
STRAGGLER_SECONDS = 60.0  # for the other ranks to end after one has ended well
CAUSE_SECONDS = 3.0  # for the rank that failed first to end too, after one has lost it
LOOK_SECONDS = 3.0  # between two looks at the files of stacks, which are on a shared file system
SUSPENDED_SECONDS = 2.0  # a longer pause between two looks at the ranks: this process was stopped, as they were

Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class Place:
    """A node's number, and where rank 0 listens for all ranks."""

    node: int
    address: str
    port: int


def here() -> Place:
    """The only node of a run."""
    return Place(0, "127.0.0.1", free_port())


def run_ranks(config: TrainConfig, place: Place, module: str = RANK) -> int:
    """Start one process per device of this node, forward signals to them, and return their exit code.

    The ranks die with this process, however it ends: each holds the read end of a pipe to it. A second SIGINT kills
    them.
    """
    command = [sys.executable, "-m", module, str(config.run_dir)]
    ranks: dict[int, Process] = {}
    fetched = fetch_bases(config) if module == RANK else {}
    interrupted = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if number == signal.SIGINT and interrupted:
            sys.exit(128 + number)  # ranks that hang in a collective cannot react; leaving here kills them
        interrupted = interrupted or number == signal.SIGINT
        for process in ranks.values():
            if process.poll() is None:
                process.send_signal(number)

    # Ranks inherit the blocked signals: one that arrives during start-up waits until they can handle it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with handling_signals(forward):
            for local_rank in range(config.nodes_and_devices[1]):
                variables = rank_environment(config, local_rank, place)
                ranks[int(variables["RANK"])] = subprocess.Popen(
                    command,
                    env={**os.environ, **variables, **fetched},
                    stdin=subprocess.PIPE,
                    start_new_session=True,  # a terminal's Ctrl-C reaches the ranks once, through `forward`
                )
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return _wait(ranks, config.run_dir)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for process in ranks.values():
            _kill_group(process)
        stacks.remove_empty(config.run_dir)
        while signal.sigpending() & set(SIGNALS):
            signal.sigwait(SIGNALS)  # too late to change how the run ended
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def rank_environment(config: TrainConfig, local_rank: int, place: Place) -> dict[str, str]:
    """The variables that say which rank a process is; the names are torchrun's."""
    _, devices = config.nodes_and_devices
    return {
        "RANK": str(place.node * devices + local_rank),
        "LOCAL_RANK": str(local_rank),
        "GROUP_RANK": str(place.node),
        "WORLD_SIZE": str(config.world_size),
        "LOCAL_WORLD_SIZE": str(devices),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
        "CLIPPY_LAUNCHED": "1",
        **device_environment(config),
    }


def device_environment(config: TrainConfig) -> dict[str, str]:
    """Settings of the libraries that a rank uses; those that the user has made win."""
    if config.trainer.accelerator == "cpu":
        threads = max(1, (os.cpu_count() or 1) // config.nodes_and_devices[1])
        chosen = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "DS_ACCELERATOR": "cpu"}
    else:
        chosen = {"CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")}
    return {**chosen, "TOKENIZERS_PARALLELISM": "false"}


def _wait(ranks: Mapping[int, Process], run_dir: Path) -> int:
    """Wait for all ranks. One that fails or hangs decides the exit code, and the caller kills the others."""
    end_by = cause_by = float("inf")
    watch = _Watch(ranks, run_dir)
    while True:
        codes = {rank: code for rank, process in ranks.items() if (code := process.poll()) is not None}
        failed = {rank: code for rank, code in codes.items() if code not in (0, Interrupted.exit_code)}
        if failed and set(failed.values()) == {MachineFault.exit_code} and len(codes) < len(ranks):
            cause_by = min(cause_by, time.monotonic() + CAUSE_SECONDS)
        elif failed:
            cause_by = 0.0
        if failed and time.monotonic() > cause_by:
            say(ending.describe(failed, run_dir))
            return ending.strongest(failed.values())
        if len(codes) == len(ranks):
            return max(codes.values())
        if codes and end_by == float("inf"):
            end_by = time.monotonic() + STRAGGLER_SECONDS
        if watch.expired():
            say(stacks.report(run_dir, ranks))
            return MachineFault.exit_code
        if time.monotonic() > end_by:
            say(f"ranks did not end together (exit codes so far: {list(codes.values())})")
            return MachineFault.exit_code
        time.sleep(0.05)


class _Watch:
    """Looks for the stacks of a rank whose watchdog has expired."""

    def __init__(self, ranks: Mapping[int, Process], run_dir: Path) -> None:
        self.ranks, self.run_dir = ranks, run_dir
        self._called = time.monotonic()
        self._next = self._called + LOOK_SECONDS

    def expired(self) -> bool:
        """Whether a rank hangs; call it all the time. After a suspension, watchdogs have expired for no reason."""
        now, before = time.monotonic(), self._called
        self._called = now
        if now - before > SUSPENDED_SECONDS:
            time.sleep(SUSPENDED_SECONDS / 2)  # until they have written
            stacks.forget(self.run_dir, self.ranks)
            self._called = time.monotonic()
        if now < self._next:
            return False
        self._next = now + LOOK_SECONDS
        return stacks.any_expired(self.run_dir, self.ranks)


def _kill_group(process: Process) -> None:
    """Kill a rank and everything that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def interrupt(number: int, frame: FrameType | None) -> None:
    """The signal handler until the ranks run."""
    raise Interrupted("interrupted before the run started: nothing is lost, the same command starts it")


def free_port(first: int = 0) -> int:
    """The first free port of this machine from `first` on; any free port for 0."""
    for port in range(first, first + 100):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return int(listener.getsockname()[1])
    raise ConfigError(f"no free port between {first} and {first + 100} on {socket.gethostname()}")


def main(run_dir: str, meeting_point: str) -> int:
    """Run this node's ranks of a run on several nodes, after the preflight."""
    try:
        config = _shared_config(Path(run_dir))
        address, _, port = meeting_point.rpartition(":")
        place = Place(int(os.environ["SLURM_NODEID"]), address, int(port))
        if config.launcher.preflight:
            code = run_ranks(config, place, PREFLIGHT)
            if code:
                return code
        return run_ranks(config, replace(place, port=place.port + 1))
    except ClippyError as error:
        print(f"{socket.gethostname()}: {error}", file=sys.stderr)
        return error.exit_code


def _shared_config(run_dir: Path) -> TrainConfig:
    if not (run_dir / CONFIG).exists():
        raise ConfigError(f"run.root: {run_dir} is not visible from this node; it must be on a shared file system")
    return load(run_dir / CONFIG)


if __name__ == "__main__":
    set_up_log()
    with handling_signals(interrupt):
        sys.exit(ending.task_code(main(*sys.argv[1:])))
