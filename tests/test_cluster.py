"""Decisions of a launcher before ranks run: devices, requeues, rank environments; preflight and torchrun."""

import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import processes
from support.runs import Runs, environment, trained, weights_hash

from clippy_train.compose import LAUNCH, compose
from clippy_train.config import TrainConfig, save
from clippy_train.errors import CheckpointError, ConfigError, Interrupted, MachineFault
from clippy_train.launch import ending, preflight, resources, slurm, start
from clippy_train.launch.agent import (
    PREFLIGHT,
    Place,
    here,
    rank_environment,
    run_ranks,
)
from clippy_train.launch.lock import lock_folder
from clippy_train.plan import make_plan, plan_rows
from clippy_train.run.folder import CONFIG
from clippy_train.tokenizer import load_tokenizer
from clippy_train.train.callbacks.progress import fresh_cursors
from clippy_train.train.data import DataModule

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
ON_TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
DIVIDES = ["data.streams=48", "trainer.global_batch_size=96", "trainer.micro_batch_size=1"]  # by 1, 2, 3, 4, 6, 8 ranks


@pytest.fixture
def launcher_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the environment variables of a launcher and the number of visible GPUs."""

    def set_environment(variables: dict[str, str], gpus: int = 0) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(resources, "_visible_gpus", lambda: gpus)

    return set_environment


@pytest.mark.parametrize(
    ("variables", "gpus", "expected"),
    [
        ({}, 0, ("local", "cpu", 1, 1)),
        ({}, 4, ("local", "cuda", 1, 4)),
        (JOB, 0, ("slurm", "cpu", 2, 1)),
        ({**JOB, "SLURM_NTASKS_PER_NODE": "3"}, 0, ("slurm", "cpu", 2, 3)),
        ({**JOB, "SLURM_GPUS_ON_NODE": "4"}, 0, ("slurm", "cuda", 2, 4)),
        ({**JOB, "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "1"}, 0, ("slurm", "cuda", 2, 4)),
        (JOB, 2, ("slurm", "cuda", 2, 2)),
        (ON_TORCHRUN, 0, ("torchrun", "cpu", 2, 4)),
        ({**JOB, **ON_TORCHRUN}, 4, ("torchrun", "cuda", 2, 4)),
    ],
)
def test_devices_come_from_the_launcher(
    launcher_environment: Callable[..., None], variables: dict[str, str], gpus: int, expected: tuple[str, str, int, int]
) -> None:
    launcher_environment(variables, gpus)
    config = compose(TrainConfig, ["experiment=code_clippy_125m", *DIVIDES])
    trainer = config.trainer
    assert (config.launcher.name, trainer.accelerator, trainer.num_nodes, trainer.devices) == expected
    assert not list(resources.resource_problems(config))


@pytest.mark.parametrize(
    ("variables", "overrides", "said"),
    [
        ({}, ["launcher=slurm"], "launcher=slurm, but this command does not run under it: use launch/train.sbatch"),
        ({}, ["launcher=torchrun"], "use launch/torchrun.sh"),
        ({}, ["trainer.num_nodes=3"], "trainer.num_nodes=3: launcher=local starts ranks on this machine only"),
        (JOB, ["trainer.num_nodes=3"], "trainer.num_nodes=3, but slurm has 2 nodes for this run: ask for --nodes=3"),
        (JOB, ["launcher=local"], "trainer.num_nodes=2: launcher=local"),
        ({**JOB, "SLURM_NTASKS_PER_NODE": "2"}, ["trainer.devices=4"], "slurm has 2 processes per node"),
        ({**JOB, "SLURM_GPUS_ON_NODE": "2"}, ["trainer.devices=4"], "this machine has 2 visible CUDA devices"),
        ({**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, [], "run it once, without srun"),
        ({**JOB, "SLURM_HET_SIZE": "2"}, [], "a heterogeneous job"),
        ({**JOB, "PATH": "/none"}, [], "launcher=slurm needs srun and scontrol on the PATH"),
        (ON_TORCHRUN, ["trainer.devices=2"], "torchrun has 4 processes per node"),
    ],
)
def test_a_run_that_does_not_fit_its_launcher_is_rejected(
    launcher_environment: Callable[..., None], variables: dict[str, str], overrides: list[str], said: str
) -> None:
    launcher_environment(variables)
    if overrides == ["launcher=local"]:
        overrides = [*overrides, "trainer.num_nodes=2"]
    (error,) = resources.resource_problems(compose(TrainConfig, ["experiment=code_clippy_125m", *DIVIDES, *overrides]))
    assert said in str(error)
    assert isinstance(error, ConfigError)


@pytest.mark.parametrize(
    ("requeues", "steps", "stops"),
    [
        (1, [0, 10], False),
        (1, [0, 0], False),  # interrupted before the first step: allowed once
        (2, [0, 0, 0], True),
        (2, [0, 5, 5], False),
        (3, [0, 5, 5, 5], True),
        (4, [0, 5, 5, 6, 6], False),
        (5, [0, 1, 2, 3, 4, 5], False),
        (6, [0, 1, 2, 3, 4, 5, 6], True),  # more than the 5 allowed
    ],
)
def test_a_job_is_requeued_only_while_it_makes_progress(requeues: int, steps: list[int], stops: bool) -> None:
    assert bool(slurm.why_stop(requeues, steps, max_requeues=5)) == stops


def test_attempts_are_recorded_separately_for_each_job(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    assert slurm.begin_attempt(tmp_path, "7") == [0]
    (checkpoints / "step-00000004").mkdir(parents=True)
    assert slurm.begin_attempt(tmp_path, "7") == [0, 4]
    assert slurm.begin_attempt(tmp_path, "8") == [4]


SRUN_FAILED = -1


@pytest.mark.processes
@pytest.mark.parametrize(
    ("srun", "probe", "changed", "code", "said"),
    [
        (0, 0, {}, 0, ""),
        (75, 0, {}, 75, "job 7 is requeued"),
        (75, 0, {"JobState": "COMPLETING"}, 75, "not requeued: Slurm is ending it (COMPLETING)"),
        (75, 0, {"Requeue": "0"}, 75, "not requeued: it was submitted with --no-requeue"),
        (75, 0, {"BatchFlag": "0"}, 75, "not requeued: only batch jobs can be"),
        (75, 0, {"TimeLimit": "00:03:00"}, 75, "not requeued: its time limit of 180 s is shorter than the warning"),
        (75, 0, {"TimeLimit": "00:06:00"}, 75, "job 7 is requeued"),
        (71, 0, {}, 71, "job 7 is requeued"),
        (71, 0, {"TimeLimit": "00:03:00"}, 71, "job 7 is requeued"),
        (71, 0, {"Requeue": "0"}, 71, "not requeued: it was submitted with --no-requeue"),
        (1, 0, {}, 1, ""),
        (2, 1, {}, 2, ""),
        (SRUN_FAILED, 0, {}, 1, ""),
        (SRUN_FAILED, 1, {"node": "n2:down*"}, 71, "job 7 has lost n2:down*"),  # before Slurm ends the job itself
        (SRUN_FAILED, 1, {"node": "n2:mixed*"}, 71, "job 7 is requeued"),
        (SRUN_FAILED, 1, {}, 2, "srun starts nothing in job 7, though its nodes are up"),
    ],
)
def test_when_a_job_is_requeued(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    srun: int,
    probe: int,
    changed: dict[str, str],
    code: int,
    said: str,
) -> None:
    """With a fake `srun` whose tasks have this exit code, fakes of what shows such a job, and a probe of the nodes."""
    srun = 1 if srun == SRUN_FAILED else ending.task_code(srun)
    facts = {"JobState": "RUNNING", "Requeue": "1", "BatchFlag": "1", **changed}
    shown = "JobId=7 JobName=x " + " ".join(f"{name}={value}" for name, value in facts.items())
    commands = {
        "srun": f'for last; do :; done; [ "$last" = true ] && exit {probe} || exit {srun}',
        "sinfo": f"echo n1:mixed {facts.pop('node', 'n2:mixed')}",
        "scontrol": f'case "$2" in job) echo "{shown}";; hostnames) echo n1 n2;; *) echo "called $*";; esac',
    }
    for name, content in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / name).chmod(0o755)
    for name, value in {**JOB, "SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(signal, "signal", lambda *ignored: None)  # a requeued job ignores signals from then on
    overrides = ["experiment=demo", "trainer.num_nodes=2", "trainer.devices=1", f"run.root={tmp_path}"]
    config = compose(TrainConfig, overrides)
    config.run_dir.mkdir()
    assert slurm.run_nodes(config) == code
    output = capfd.readouterr().out
    assert said in output
    again = code in (Interrupted.exit_code, MachineFault.exit_code) and "not requeued" not in said
    assert ("called requeue 7" in output) == again


@pytest.mark.parametrize(
    ("srun", "run"),
    [(0, 0), (1, None), (128 + signal.SIGUSR1, 75), (-signal.SIGTERM, 75), (128 + signal.SIGKILL, 71)],
)
def test_the_exit_code_of_srun_determines_that_of_the_run(srun: int, run: int | None) -> None:
    assert slurm.exit_code(srun) == run
    assert (Interrupted.exit_code, MachineFault.exit_code) == (75, 71)


@given(st.lists(st.sampled_from([0, 75, 71, 1, 2, 3, 4]), min_size=1))
def test_the_strongest_exit_code_of_all_nodes_reaches_the_job(codes: list[int]) -> None:
    """srun returns the largest code of its tasks."""
    assert slurm.exit_code(max(map(ending.task_code, codes))) == ending.strongest(codes)


@pytest.mark.parametrize(
    ("codes", "run"),
    [([71, 2], 2), ([71, 1], 1), ([75, 71], 71), ([0, 75], 75), ([-9, 71], 71), ([-9, 4], 4), ([75, 99], 1)],
)
def test_a_rank_that_knows_why_decides_the_exit_code(codes: list[int], run: int) -> None:
    assert ending.strongest(codes) == run


def test_an_element_of_an_array_is_a_job_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last element's SLURM_JOB_ID is that of the array: `scontrol requeue` would take all of them."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert slurm.job_id() == "7_3"
    assert slurm.attempt_name() == "attempt 0 of job 7_3"
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert slurm.job_id() == "7"


@pytest.mark.parametrize(
    ("shown", "seconds"),
    [("00:03:00", 180), ("1-02:00:00", 93_600), ("UNLIMITED", None), ("Partition_Limit", None), ("", None)],
)
def test_a_time_limit_is_read_as_slurm_writes_it(shown: str, seconds: int | None) -> None:
    assert slurm.time_limit({"TimeLimit": shown}) == seconds


def test_the_warning_before_a_time_limit_is_that_of_the_script() -> None:
    assert f"#SBATCH --signal=B:USR1@{slurm.WARNING_SECONDS}\n" in (LAUNCH / "train.sbatch").read_text()


def test_how_a_job_asked_for_tasks_does_not_reach_the_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = ["SLURM_NTASKS_PER_GPU", "SLURM_NTASKS", "SLURM_GPUS_PER_TASK", "SLURM_EXPORT_ENV", "SRUN_CPUS_PER_TASK"]
    for name in [*dropped, "SLURM_JOB_NUM_NODES", "NCCL_SOCKET_IFNAME"]:
        monkeypatch.setenv(name, "1")
    kept = slurm._environment()
    assert not kept.keys() & set(dropped)
    assert kept["NCCL_SOCKET_IFNAME"] == kept["SLURM_JOB_NUM_NODES"] == "1"


@pytest.mark.parametrize("name", ["train", "evaluate", "export"])
@pytest.mark.processes
def test_a_job_without_the_command_says_so(name: str) -> None:
    done = subprocess.run(
        ["/bin/bash", LAUNCH / f"{name}.sbatch"], env={"PATH": "/none"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "clippy is not on the PATH of this job" in done.stderr


@given(st.integers(1, 10**7), st.integers(0, 200))
def test_neighbouring_jobs_and_attempts_have_separate_ports(job: int, restarts: int) -> None:
    ports = {(number, attempt): slurm.first_port(number, attempt) for number in (job, job + 1) for attempt in range(10)}
    pairs = {port + i for port in ports.values() for i in (0, 1)}
    assert len(pairs) == 2 * len(ports)
    assert pairs <= set(slurm.PORTS)
    assert slurm.first_port(job, restarts) == slurm.first_port(job, restarts % 10)


LARGE = ["trainer.num_nodes=64", "trainer.devices=8", "trainer.accelerator=cuda", "trainer.micro_batch_size=2"]


@pytest.mark.slow
def test_512_ranks_get_consecutive_numbers_and_separate_streams(
    train_config: Callable[..., TrainConfig], tiny_tokenizer: Path
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    config = train_config(*LARGE, "trainer.global_batch_size=1024", "data.streams=512")
    place = [Place(node, "n1", 12345) for node in range(64)]
    ranks = [rank_environment(config, local_rank, place[node]) for node in range(64) for local_rank in range(8)]
    assert [int(rank["RANK"]) for rank in ranks] == list(range(512))
    assert {(rank["GROUP_RANK"], rank["LOCAL_RANK"]) for rank in ranks} == {
        (str(node), str(local_rank)) for node in range(64) for local_rank in range(8)
    }
    for name, value in {"WORLD_SIZE": "512", "MASTER_ADDR": "n1", "MASTER_PORT": "12345"}.items():
        assert {rank[name] for rank in ranks} == {value}

    cursors = fresh_cursors(config.data.streams)
    modules = [DataModule(config, tokenizer, int(rank["RANK"]), cursors) for rank in ranks]
    owned = [reader.number for module in modules for reader in module.train_dataloader().readers]
    assert owned == list(range(512))
    assert config.micro_steps * config.trainer.micro_batch_size * 512 == config.trainer.global_batch_size


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.global_batch_size=1024", "data.streams=64"], "for a new run, set data.streams=512"),
        (
            ["trainer.global_batch_size=1000", "data.streams=500"],
            "is not a multiple of trainer.micro_batch_size",
        ),
        (["trainer.global_batch_size=2048", "data.streams=1536"], "is not a multiple of data.streams=1536"),
    ],
)
def test_settings_that_512_ranks_cannot_share_are_rejected(
    train_config: Callable[..., TrainConfig], overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        train_config(*LARGE, *overrides)


def test_torch_reads_the_variables_that_jobs_set() -> None:
    """A renamed variable would have no effect, and nobody would notice before a collective hangs."""
    set_ones = re.findall(r"^export (\w*TORCH\w+)=", (LAUNCH / "env.sh").read_text(), re.MULTILINE)
    assert {"TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT"} <= set(set_ones)
    torch_files = Path(torch.__file__).parent
    headers = b"".join(path.read_bytes() for path in torch_files.glob("include/**/*.h*") if "c10" in str(path))
    with (torch_files / "lib" / "libtorch_cpu.so").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert [each for each in set_ones if each.encode() not in headers and library.find(each.encode()) < 0] == []


@pytest.mark.slow
def test_a_plan_estimates_large_runs(train_config: Callable[..., TrainConfig]) -> None:
    card = ["experiment=code_clippy_125m", "trainer.devices=8", "trainer.accelerator=cuda"]
    sizes = {
        nodes: compose(TrainConfig, [*card, f"trainer.num_nodes={nodes}", *more])
        for nodes, more in {1: [], 8: [], 64: ["trainer.micro_batch_size=2", "data.streams=512"]}.items()
    }
    estimates = {nodes: make_plan(config).estimate for nodes, config in sizes.items()}
    speeds = {nodes: each.tokens_per_second for nodes, each in estimates.items() if each}
    for fewer, more in ((1, 8), (8, 64)):
        for slow, fast in zip(speeds[fewer], speeds[more], strict=True):
            assert slow < fast <= slow * more / fewer  # never better than in proportion
    rows = dict(plan_rows(sizes[64], make_plan(sizes[64])))
    assert "512 ranks x 2 x 1 accumulated" in rows["step"]
    assert {name for name in rows if name.endswith("(estimate)")} == {
        f"{name} (estimate)" for name in ("speed", "time", "communication", "seconds to save", "reading", "tokenizing")
    }


@pytest.mark.processes
def test_a_preflight_of_two_ranks_reports_the_bandwidth(
    train_config: Callable[..., TrainConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = train_config(f"run.root={tmp_path}")
    config.run_dir.mkdir()
    save(config, config.run_dir / CONFIG)
    assert run_ranks(config, here(), PREFLIGHT) == 0
    assert "preflight: 1 nodes x 2 cpu, gloo: all-reduce of 64 MB in " in capfd.readouterr().out


def test_a_preflight_that_loses_the_others_says_so_in_one_line(
    train_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lose(config: TrainConfig) -> str:
        raise RuntimeError("gloo/x: connection closed\nmore")

    config = train_config(f"run.root={tmp_path}")
    config.run_dir.mkdir()
    save(config, config.run_dir / CONFIG)
    monkeypatch.setattr(preflight, "check", lose)
    monkeypatch.setattr(signal, "signal", lambda *ignored: None)
    monkeypatch.setenv("RANK", "1")
    assert preflight.main(str(config.run_dir)) == MachineFault.exit_code
    said = f"preflight: rank 1 on {socket.gethostname()}: lost the others or its device: gloo/x: connection closed\n"
    assert capsys.readouterr().err == said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("cluster"), tiny_corpus, tiny_tokenizer)


LOCK_AND_EXEC = """
import os, sys
from pathlib import Path
from clippy_train.launch.lock import lock_folder
lock_folder(Path(sys.argv[1]), "run.name=x")
os.execv(sys.executable, [sys.executable, "-c", "print(flush=True); input()"])
"""


@pytest.mark.processes
def test_a_lock_on_a_folder_survives_exec(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    command = [sys.executable, "-c", LOCK_AND_EXEC, folder]
    process = processes.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline()
    with pytest.raises(ConfigError, match=rf"run\.name=x: process {process.pid} on .* trains in"):
        lock_folder(folder, "run.name=x")
    process.communicate(b"\n")
    lock_folder(folder, "run.name=x")


def test_a_checkpoint_is_chosen_while_the_folder_is_locked(
    train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(f"run.root={tmp_path}", "resume=must")

    def found(run_dir: Path) -> None:
        with pytest.raises(ConfigError, match="trains in"):
            lock_folder(config.run_dir, "run.name=x")

    monkeypatch.setattr(start, "find_checkpoint", found)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        start.prepare(config)
    assert not config.run_dir.exists()


@pytest.mark.parametrize(
    ("who", "state", "ended"),
    [
        ("process 12 on n1", "COMPLETED", False),
        ("another command", "COMPLETED", False),
        ("attempt 0 of job 6", "RUNNING", False),
        ("attempt 3 of job 6", "COMPLETING", False),
        ("attempt 0 of job 6", "COMPLETED", True),
        ("attempt 0 of job 6", None, True),  # Slurm has forgotten it
        ("attempt 2 of job 7", "RUNNING", False),  # this job, twice
        ("attempt 1 of job 7", "RUNNING", True),  # this job, before its node died
    ],
)
def test_whether_the_holder_of_a_lock_has_ended(
    monkeypatch: pytest.MonkeyPatch, who: str, state: str | None, ended: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(slurm, "job_facts", lambda job: {"JobState": state} if state else {})
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert slurm.has_ended(who) == ended
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not slurm.has_ended(who)


def test_processes_started_by_torchrun_become_the_ranks_of_one_run(runs: Runs) -> None:
    settings = ["trainer.audit=true", "trainer.max_steps=2", "trainer.val_samples=2", "data.num_workers=0"]
    runs.train("local", *settings)
    script = [str(LAUNCH / "torchrun.sh"), *runs.settings, *settings, "trainer.devices=null", "run.name=torchrun"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    nodes = {"PATH": path, "NODES": "1", "DEVICES": "2", "MASTER": f"localhost:{here().port}"}
    started = subprocess.run(
        script, cwd=runs.root, env={**environment(runs.root), **nodes}, capture_output=True, text=True, timeout=150,
        check=False,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    assert started.stdout.count("starting runs/torchrun") == 1
    assert list(map(trained, runs.rows("torchrun"))) == list(map(trained, runs.rows("local")))
    assert weights_hash(runs.folder("torchrun")) == weights_hash(runs.folder("local"))
    assert json.loads((runs.folder("torchrun") / "environment.json").read_text())["clippy_train"]
