"""Real jobs on whatever Slurm `sbatch` reaches: `make test-slurm`. Needs two nodes that share this file system.

Where CLIPPY_SLURM_CLUSTER="SCRIPT DIR" is a throwaway cluster, on which `SCRIPT hurry DIR` starts requeued jobs and
`SCRIPT fail|boot DIR NODE` powers nodes off and on, a node failure is tested too; elsewhere a requeue takes Slurm two
minutes.
"""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import Runs, environment, rank_pids, trained, weights_hash

from clippy_train.compose import LAUNCH
from clippy_train.config import load
from clippy_train.errors import Interrupted
from clippy_train.launch.agent import SUSPENDED_SECONDS
from clippy_train.run.folder import ATTEMPTS, JOB_FILE
from clippy_train.sweep.table import TABLE

pytestmark = [pytest.mark.slurm, pytest.mark.processes, pytest.mark.timeout(600)]

CLUSTER = shlex.split(os.environ.get("CLIPPY_SLURM_CLUSTER", ""))
STATE_SECONDS = 240.0  # for a job to reach its next state
STOP_SECONDS = 3.0  # from a suspension on: SIGTSTP does not stop ranks, and Slurm sends SIGSTOP two seconds later
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
STEPS = 300  # more than the run makes before the last interruption
SETTINGS = [
    "trainer.audit=true", f"trainer.max_steps={STEPS}", f"optim.decay_steps={STEPS}", "trainer.val_every_steps=1000",
    "checkpoint.every_steps=1000", "trainer.val_samples=2", "data.num_workers=0", "model.num_layers=1",
]  # fmt: skip


def cluster(verb: str, *names: str) -> None:
    subprocess.run([CLUSTER[0], verb, *CLUSTER[1:], *names], check=True, timeout=60, stdout=subprocess.DEVNULL)


def run(*command: str, check: bool = True) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=60).stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> None:
    """Skip where there is no Slurm with two nodes."""
    if not shutil.which("sbatch"):
        pytest.skip("no sbatch on the PATH")
    if len(run("sinfo", "-h", "-N", "-o", "%N", check=False).split()) < 2:
        pytest.skip("sbatch reaches no cluster of two nodes")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("slurm"), tiny_corpus, tiny_tokenizer)
    runs.settings.append("trainer.devices=null")  # filled in by the launcher
    return runs


def submit(runs: Runs, *arguments: str) -> str:
    """Submit a job; its number."""
    command = ["sbatch", "--parsable", *arguments]
    variables = environment(runs.root)
    done = subprocess.run(command, cwd=runs.root, env=variables, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Job:
    """A training job, submitted as users submit it."""

    def __init__(self, runs: Runs, name: str, *overrides: str, tasks: int = 1, nodes: int = 2) -> None:
        self.runs, self.name = runs, name
        options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--time=20", "--output=%j.out"]
        script = [str(LAUNCH / "train.sbatch"), *runs.settings, *SETTINGS, f"run.name={name}", *overrides]
        self.number = submit(runs, *options, *script)

    @classmethod
    def of(cls, runs: Runs, name: str, number: str) -> "Job":
        """A job that was submitted in another way."""
        job = cls.__new__(cls)
        job.runs, job.name, job.number = runs, name, number
        return job

    @property
    def log(self) -> str:
        path = self.runs.root / f"{self.number}.out"
        return path.read_text() if path.exists() else ""

    def fact(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S*)", run("scontrol", "show", "job", "-o", self.number))
        assert found, f"job {self.number} has no {name}"
        return found[1]

    def wait(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + STATE_SECONDS
        while True:
            state = self.fact("JobState")
            if reached():
                return
            assert state not in ENDED, f"{what}: {state}\n{self.log}"
            assert time.monotonic() < deadline, f"{what}: timed out in state {state}\n{self.log}"
            time.sleep(0.1)

    def wait_for_end(self) -> str:
        self.wait(lambda: self.fact("JobState") in ENDED, "no end")
        return self.fact("ExitCode")

    def last_step(self) -> int:
        rows = self.runs.rows(self.name)
        return rows[-1]["step"] if rows else 0

    def let_it_train(self) -> None:
        """Wait until it has made a step in this attempt."""
        first = self.last_step() + 1
        if self.fact("JobState") == "PENDING" and CLUSTER:
            time.sleep(1.1)  # a node confuses a start within the same second with the attempt that ended
            cluster("hurry")
        self.wait(lambda: self.last_step() >= first, f"no step {first}")

    def wait_for_requeue(self, restarts: int) -> None:
        expected = ("PENDING", str(restarts))
        self.wait(lambda: (self.fact("JobState"), self.fact("Restarts")) == expected, "no requeue")


def warned(job: Job) -> None:
    """Send Slurm's warning before the time limit, as set by `#SBATCH --signal`."""
    run("scancel", "--batch", "--signal=USR1", job.number)


def signalled(job: Job) -> None:
    run("scancel", "--signal=USR1", job.number)


def requeued(job: Job) -> None:
    run("scontrol", "requeue", job.number)


def preempted(job: Job) -> None:
    if "high" not in run("sinfo", "-h", "-o", "%P").split():
        pytest.skip("no partition `high` that pre-empts")
    sized = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    run("sbatch", *sized)


def powered_off(job: Job) -> None:
    """Power the second node off during a step, and on again once Slurm has noticed."""
    if not CLUSTER:
        pytest.skip("not a throwaway cluster")
    node = run("scontrol", "show", "hostnames", job.fact("NodeList")).split()[1]
    cluster("fail", node)
    run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    cluster("boot", node)


INTERRUPTIONS = [warned, signalled, requeued, preempted, powered_off]
SAVES = INTERRUPTIONS[:-1]  # those that leave the run time to save


@pytest.fixture(scope="module")
def reference(runs: Runs) -> str:
    """An uninterrupted run of two ranks on this machine."""
    runs.train("reference", *SETTINGS, "trainer.devices=2", "launcher=local")
    return "reference"


@pytest.fixture(scope="module")
def job(runs: Runs) -> Job:
    """Two nodes of one rank each, under ZeRO-1."""
    return Job(runs, "interrupted", "launcher.preflight=false")


@pytest.mark.parametrize("interrupt", INTERRUPTIONS)
def test_an_interrupted_job_is_requeued(runs: Runs, job: Job, interrupt: Callable[[Job], None]) -> None:
    restarts = int(job.fact("Restarts"))
    job.let_it_train()
    interrupt(job)
    job.wait_for_requeue(restarts + 1)
    if interrupt in SAVES:
        assert f"interrupted after step {job.last_step()}: saved" in job.log


def test_a_suspended_job_stands_still_and_goes_on(runs: Runs, job: Job) -> None:
    job.let_it_train()
    if subprocess.run(["scontrol", "suspend", job.number]).returncode:
        pytest.skip("only an operator may suspend a job")
    job.wait(lambda: job.fact("JobState") == "SUSPENDED", "not suspended")
    time.sleep(STOP_SECONDS)
    before = job.last_step()
    time.sleep(SUSPENDED_SECONDS + 1)
    after = job.last_step()
    run("scontrol", "resume", job.number)
    assert after == before
    job.wait(lambda: job.last_step() > before, "no step after it")


def test_the_requeued_job_equals_the_uninterrupted_run(runs: Runs, reference: str, job: Job) -> None:
    assert job.wait_for_end() == "0:0", job.log
    assert "finished" not in job.log
    assert list(map(trained, runs.rows(job.name))) == list(map(trained, runs.rows(reference)))
    assert weights_hash(runs.folder(job.name)) == weights_hash(runs.folder(reference))
    assert runs.rows(job.name, "val/loss") == runs.rows(reference, "val/loss")


def test_two_nodes_of_two_ranks_are_checked_and_train_on_the_same_data(runs: Runs, reference: str) -> None:
    job = Job(runs, "four", "strategy=zero2", "trainer.max_steps=3", tasks=2)
    assert job.wait_for_end() == "0:0", job.log
    assert "preflight: 2 nodes x 2 cpu, gloo: all-reduce of 64 MB in" in job.log
    rows, expected = runs.rows("four"), runs.rows(reference)[:3]
    assert [row["data/digest"] for row in rows] == [row["data/digest"] for row in expected]
    assert [row["train/loss"] for row in rows] == pytest.approx([row["train/loss"] for row in expected], abs=1e-3)


def test_a_job_that_wants_three_nodes_of_two_is_rejected_and_ends(runs: Runs) -> None:
    job = Job(runs, "wrong", "trainer.num_nodes=3", "data.streams=6", "trainer.global_batch_size=12")
    assert job.wait_for_end() == "2:0"
    assert job.fact("Restarts") == "0"
    assert "trainer.num_nodes=3, but slurm has 2 nodes for this run: ask for --nodes=3" in job.log
    assert not runs.folder("wrong").exists()


def test_one_job_at_a_time_trains_in_a_folder(runs: Runs) -> None:
    first = Job(runs, "shared", nodes=1)
    first.wait((runs.folder("shared") / ATTEMPTS).exists, "no start")
    second = Job(runs, "shared", "trainer.max_steps=2", nodes=1)
    assert second.wait_for_end() == "2:0", second.log
    assert f"attempt 0 of job {first.number} trains in runs/shared" in second.log
    assert load(runs.folder("shared") / "config.yaml").trainer.max_steps == STEPS
    run("scancel", first.number)


def test_a_job_is_not_requeued_for_ever(runs: Runs) -> None:
    job = Job(runs, "capped", "launcher.max_requeues=0", "launcher.preflight=false", nodes=1)
    job.wait((runs.folder("capped") / ATTEMPTS).exists, "no start")

    def signalled_to_the_end() -> bool:
        run("scancel", "--signal=USR1", job.number, check=False)  # lost if srun has no tasks yet
        return job.fact("JobState") != "RUNNING"

    job.wait(signalled_to_the_end, "no end")
    assert job.wait_for_end() == "75:0", job.log
    assert "is not requeued: it was requeued launcher.max_requeues=0 times" in job.log


def test_a_job_whose_rank_is_killed_names_it_and_is_requeued(runs: Runs) -> None:
    job = Job(runs, "killed", "launcher.preflight=false", "checkpoint.every_steps=1")
    job.let_it_train()
    os.kill(rank_pids(runs.folder("killed"), rank=1)[0], signal.SIGKILL)
    job.wait_for_requeue(1)
    assert re.search(r"rank 1 on \S+: killed by signal 9 \(out of memory\?\)", job.log), job.log
    assert "Traceback" not in job.log
    run("scancel", job.number)


def test_an_element_of_an_array_is_requeued_without_the_others(runs: Runs) -> None:
    """The last element has the array's own number."""
    script = runs.root / "array.sh"
    arguments = shlex.join([*runs.settings, *SETTINGS, "launcher.preflight=false"])
    train = f"set -- {arguments} run.name=element-$SLURM_ARRAY_TASK_ID; . {LAUNCH / 'train.sbatch'}"
    script.write_text(f"#!/bin/bash\n{train}\n")
    array = submit(runs, "--array=0-1", "--nodes=1", "--time=20", "--signal=B:USR1@300", "--requeue", str(script))
    elements = [Job.of(runs, f"element-{number}", f"{array}_{number}") for number in (0, 1)]
    for job in elements:
        job.let_it_train()
    run("scancel", "--batch", "--signal=USR1", elements[1].number)
    elements[1].wait_for_requeue(1)
    assert (elements[0].fact("JobState"), elements[0].fact("Restarts")) == ("RUNNING", "0")
    run("scancel", array)


def jobs_of(sweep: Path) -> dict[str, str]:
    """The job of each trial."""
    return {path.parent.name: json.loads(path.read_text())["job"] for path in sweep.glob(f"*/{JOB_FILE}")}


def test_a_sweep_submits_a_job_of_two_nodes_per_trial_and_resumes_after_an_interrupt(runs: Runs) -> None:
    arguments = [
        "train", "-m", *runs.settings, *SETTINGS, "run.name=sweep", "trainer.max_steps=2", "launcher=slurm",
        "launcher.preflight=false", "launcher.parallel=2", "launcher.sbatch=--nodes=2 --ntasks-per-node=1 --time=20",
        "seed=1,2,3",
    ]  # fmt: skip
    left = runs.start_command(*arguments)
    ids = runs.root / "runs/sweep"
    deadline = time.monotonic() + STATE_SECONDS
    while len(submitted := jobs_of(ids)) < 2:
        assert time.monotonic() < deadline
        assert left.poll() is None, left.communicate()[0]
        time.sleep(0.1)
    left.send_signal(signal.SIGINT)
    assert "in the queue: job" in left.communicate(timeout=60)[0]
    assert left.returncode == Interrupted.exit_code

    again = runs.start_command(*arguments)
    shown = again.communicate(timeout=2 * STATE_SECONDS)[0]
    assert again.returncode == 0, shown
    with (ids / TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["seed"], row["state"]) for row in rows) == [(seed, "done") for seed in ("1", "2", "3")], shown
    jobs = jobs_of(ids)
    assert submitted.items() <= jobs.items()  # nothing was submitted twice
    assert len(set(jobs.values())) == len(rows)
    for row in rows:
        config = load(Path(runs.root / row["folder"]) / "config.yaml")
        assert (config.world_size, config.trainer.num_nodes) == (2, 2)
