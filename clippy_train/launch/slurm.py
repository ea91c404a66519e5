"""A run inside a Slurm job: srun starts `launch.agent` once on each node; an interrupted job goes back into the queue.

Everything that decides whether a job runs again is here. It is requeued after exit code 75 (interrupted and saved) and
71 (a machine's fault), unless it was cancelled, must not be (`sbatch --no-requeue`), has been requeued often enough,
has made no step in two attempts in a row, or has a time limit shorter than its warning. Any other code ends it: a retry
repairs neither a wrong setting nor a bug. Slurm itself requeues the job of a dead node.

srun starts one task per node, and that task one process per device. So a node's ranks are started, signalled and ended
by the same code as on a laptop, and it does not matter how Slurm binds tasks to cores and GPUs.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import clippy_train
from clippy_train.config import TrainConfig
from clippy_train.errors import ConfigError, Interrupted, MachineFault, Stuck
from clippy_train.files import atomic_write
from clippy_train.launch.agent import (
    STRAGGLER_SECONDS,
    free_port,
)
from clippy_train.launch.ending import of_task_code
from clippy_train.launch.resources import JOB
from clippy_train.report import say
from clippy_train.run.environment import git_commit
from clippy_train.run.folder import ATTEMPTS, last_step
from clippy_train.signals import SIGNALS, handling_signals

PORTS = range(10_000, 30_000)  # below the range that the kernel uses for outgoing connections
REPEAT_SECONDS = 5.0  # until a signal is sent to srun again: it drops those that arrive while it starts tasks
PROBE_SECONDS = 60.0  # for every node of the job to respond

WARNING_SECONDS = 300  # as in `launch/train.sbatch`; Slurm does not tell a job which one it was submitted with

# Variables that say how the job asked for tasks, or which variables it keeps; srun would apply them to the agents.
OF_TASKS = re.compile(
    r"SLURM_(NTASKS|NPROCS|TASKS_PER_NODE|CPUS_PER_|GPUS_PER_(TASK|SOCKET)|TRES_PER_TASK|CPU_BIND|GPU_BIND|DISTRIBUTION|"
    r"EXPORT_ENV)|SRUN_CPUS_PER_TASK"
)
BAD_STATE = re.compile(r"\*|down|fail|unknown|powered|drain", re.IGNORECASE)  # of a node, as sinfo names it


def run_nodes(config: TrainConfig) -> int:
    """Run all nodes of this job, and requeue it where that helps; return the run's exit code.

    Raises:
        Stuck: Slurm has requeued the job repeatedly without progress.
    """
    restarts, began = _restarts(), time.monotonic()
    steps = begin_attempt(config.run_dir, job_id())
    stop = why_stop(restarts, steps, config.launcher.max_requeues)
    if stop:
        raise Stuck(f"job {job_id()} ends here: {stop}")
    nodes, _ = config.nodes_and_devices
    code = _srun(nodes, ["-m", "clippy_train.launch.agent", str(config.run_dir), meeting_point(restarts)])
    if code is None:
        code = _why_srun_failed(nodes)
    if code in (Interrupted.exit_code, MachineFault.exit_code):
        stop = why_stop(restarts + 1, [*steps, last_step(config.run_dir)], config.launcher.max_requeues)
        if code == Interrupted.exit_code:
            stop = stop or _too_short(time.monotonic() - began)
        requeue(stop)
    return code


def announce(config: TrainConfig) -> None:
    """Begin the log of an attempt with what it is, and with a time limit that leaves no time to train."""
    hosts, commit = os.environ["SLURM_JOB_NODELIST"], git_commit() or f"version {clippy_train.__version__}"
    say(f"{attempt_name()} on {hosts}: {config.run_dir}, {commit}")
    limit = time_limit(job_facts(job_id()))
    if limit is not None and limit <= WARNING_SECONDS:
        say(
            f"the job's time limit is {limit} s, and launch/train.sbatch asks to be warned {WARNING_SECONDS} s before "
            "it: ask for more time (sbatch --time), or for a shorter warning (sbatch --signal=B:USR1@SECONDS)"
        )


def _too_short(lasted: float) -> str | None:
    """Why an attempt that lasted this many seconds would be followed by others as short, if that is so."""
    limit = time_limit(job_facts(job_id()))
    if limit is not None and limit <= WARNING_SECONDS and lasted < limit / 2:
        return f"its time limit of {limit} s is shorter than the warning before it"
    return None


def time_limit(facts: Mapping[str, str]) -> int | None:
    """Seconds; None if there is no limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", facts.get("TimeLimit", ""))
    if not found:
        return None
    days, hours, minutes, seconds = (int(each or 0) for each in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def job_id() -> str:
    """What Slurm's commands call this job. The id of an array's last element also names the whole array."""
    array, element = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{element}" if array and element else os.environ[JOB]


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def why_stop(requeues: int, steps: Sequence[int], max_requeues: int) -> str | None:
    """Why a job must not make another attempt, or None.

    Args:
        requeues: how often it would have been requeued by then.
        steps: the step at which each attempt began, and at which the next one would.
    """
    if requeues > max_requeues:
        return f"it was requeued launcher.max_requeues={max_requeues} times"
    if len(steps) > 2 and steps[-3] == steps[-1]:
        return f"two attempts in a row made no step beyond {steps[-1]}"
    return None


def begin_attempt(run_dir: Path, job: str) -> list[int]:
    """Record the step at which this attempt of a job begins; returns those of all its attempts."""
    path = run_dir / ATTEMPTS
    recorded = json.loads(path.read_text()) if path.exists() else {}
    steps = [*recorded["steps"], last_step(run_dir)] if recorded.get("job") == job else [last_step(run_dir)]
    with atomic_write(path) as file:
        json.dump({"job": job, "steps": steps}, file)
    return steps


def attempt_name() -> str:
    """This attempt of this job, in words that `has_ended` parses."""
    return f"attempt {_restarts()} of job {job_id()}"


def has_ended(name: str) -> bool:
    """Whether `name` is an attempt of a job that is over: an earlier one of this job, or one that Slurm has ended."""
    named = re.fullmatch(r"attempt (\d+) of job (\S+)", name)
    if not named or not shutil.which("scontrol"):
        return False
    if JOB in os.environ and named[2] == job_id():
        return int(named[1]) < _restarts()
    return job_facts(named[2]).get("JobState") not in ("RUNNING", "SUSPENDED", "COMPLETING")


def requeue(stop: str | None) -> None:
    """Put this job back into the queue, unless there is a reason not to (`stop`, or one that Slurm knows)."""
    job = job_id()
    facts = job_facts(job)
    if not stop and facts.get("BatchFlag") != "1":
        stop = "only batch jobs can be"
    if not stop and facts.get("Requeue") != "1":
        stop = "it was submitted with --no-requeue"
    if not stop and facts.get("JobState") != "RUNNING":
        stop = f"Slurm is ending it ({facts.get('JobState')})"  # cancelled, or requeued already
    if stop:
        say(f"job {job} is not requeued: {stop}")
        return
    say(f"job {job} is requeued")
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # Slurm ends this attempt now
    subprocess.run(["scontrol", "requeue", job], check=False)


def job_facts(job: str) -> dict[str, str]:
    """What Slurm knows about a job, by Slurm's names; empty for a job that it has forgotten."""
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False).stdout
    return dict(item.split("=", 1) for item in shown.split() if "=" in item)


def meeting_point(restarts: int) -> str:
    """HOST:PORT where ranks meet: the first node, and a port for this attempt of the job; the next port is used too."""
    listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    first_node = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[0]
    return f"{first_node}:{free_port(first_port(int(os.environ[JOB]), restarts))}"


def first_port(job: int, restarts: int) -> int:
    """Where an attempt of a job looks for its two ports: away from neighbouring jobs and its last attempts."""
    return PORTS[0] + (job * 20 + restarts % 10 * 2) % (len(PORTS) - 100)


def _srun(nodes: int, command: list[str]) -> int | None:
    """Run an agent's command on each node of the job, forward signals to it; see `exit_code` for the result."""
    process = subprocess.Popen(
        [*_one_task_each(nodes), sys.executable, *command],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C reaches it once, through `forward`
    )
    interrupted = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        again = interrupted and number == signal.SIGINT
        interrupted = True
        # Any signal asks for a save. srun forwards USR1, but kills its tasks when it gets TERM.
        process.send_signal(signal.SIGTERM if again else signal.SIGUSR1)

    with handling_signals(forward):
        while True:
            try:
                return exit_code(process.wait(REPEAT_SECONDS))
            except subprocess.TimeoutExpired:
                if interrupted:
                    process.send_signal(signal.SIGUSR1)


def exit_code(code: int) -> int | None:
    """A run's exit code from srun's, which is the largest of its tasks', or 128 + N if signal N ended one.

    None: srun itself failed.
    """
    signalled = code - 128 if code > 128 else -code
    if signalled in SIGNALS:
        return Interrupted.exit_code  # it arrived before the task could handle it
    return MachineFault.exit_code if signalled == signal.SIGKILL else of_task_code(code)


def _why_srun_failed(nodes: int) -> int:
    """The exit code for a srun that has started no agent, or lost one: a node's fault, or that of its options."""
    if _nodes_respond(nodes):
        return 1
    lost = lost_nodes()
    if lost:
        say(f"job {job_id()} has lost {', '.join(lost)}")
        return MachineFault.exit_code
    say(f"srun starts nothing in job {job_id()}, though its nodes are up: its message is above")
    return ConfigError.exit_code


def lost_nodes() -> list[str]:
    """Nodes of this job that Slurm cannot use, with their states."""
    command = ["sinfo", "-h", "-N", "-o", "%N:%T", "-n", os.environ["SLURM_JOB_NODELIST"]]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return sorted({each for each in listed if BAD_STATE.search(each)})


def _one_task_each(nodes: int) -> list[str]:
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--export=ALL",  # what the script has exported reaches the ranks
        "--overlap",  # also from inside a step, such as an interactive shell
        "--cpu-bind=none",
        "--kill-on-bad-exit=0",
        f"--wait={STRAGGLER_SECONDS:.0f}",
    ]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not OF_TASKS.match(name)}


def _nodes_respond(nodes: int) -> bool:
    probe = [*_one_task_each(nodes), "true"]
    try:
        return subprocess.run(probe, env=_environment(), timeout=PROBE_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False
