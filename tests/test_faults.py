"""Disk errors, non-finite numbers, hangs and memory errors: two real ranks with faults of `support.faults`."""

import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import processes
from support.distributed import run_distributed
from support.runs import Runs, command, end, environment, rank_pids

from clippy_train.config import DataConfig, TrainConfig, save
from clippy_train.errors import Diverged, Interrupted, MachineFault, NonFinite
from clippy_train.files import STAGING
from clippy_train.launch import agent
from clippy_train.model.build import build_model
from clippy_train.run.checkpoint import open_checkpoint
from clippy_train.run.folder import (
    CONFIG,
    checkpoint_folders,
    checkpoint_step,
    lost_file,
)
from clippy_train.run.rows import (
    RowFile,
    read_rows,
)
from clippy_train.shards.sources import open_corpus
from clippy_train.train import collective
from clippy_train.train.callbacks.health import require_equal_replicas
from clippy_train.train.loggers import EventLogger
from clippy_train.train.module import CodeLM

LAST_SAVE = 54  # more than twice the disk operations of a save; every later one fails
POISONED = LAST_SAVE + 2  # the step whose loss is NaN
SETTINGS = [
    "checkpoint.every_steps=1", "checkpoint.keep_last=100", "checkpoint.max_failed_saves=2", "data.num_workers=0",
    "trainer.max_steps=100", "trainer.log_every_steps=1000", "trainer.val_every_steps=1000", "model.num_layers=1",
    "trainer.val_samples=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("faults"), tiny_corpus, tiny_tokenizer)


@contextmanager
def faults(runs: Runs, faults: str) -> Iterator[Path]:
    """Inject faults into ranks that start now; yields the file in which they record what happened."""
    record = runs.root / "faults.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"CLIPPY_FAULT": faults, "CLIPPY_FAULT_LOG": str(record)}.items():
            patch.setenv(name, value)
        yield record


@pytest.fixture(scope="module")
def broken(runs: Runs) -> tuple[str, list[dict[str, Any]]]:
    """The output of a run whose saves fail at one disk operation after another, and the recorded faults."""
    with faults(runs, f"disk:{LAST_SAVE}") as record:
        return runs.train("broken", *SETTINGS, code=4).stdout, list(read_rows(record))


def test_a_failed_save_keeps_the_previous_checkpoint_and_training_continues(
    runs: Runs, broken: tuple[str, list[dict[str, Any]]]
) -> None:
    said, rows = broken
    tried = [row for row in rows if row["step"] <= LAST_SAVE]
    assert len(tried) < LAST_SAVE // 2, "LAST_SAVE is too small for all operations of a save"
    assert [row["operation"] for row in tried if row["rank"] == 1] == ["torch.save"] * 2 + ["fsync"] * 2
    assert {row["operation"] for row in tried if row["rank"] == 0} == {"mkdir", "open", "torch.save", "fsync", "rename"}
    for row in tried[:-1]:
        assert row["newest"] == [row["step"] - 1, row["step"] - 1]
    assert tried[-1]["newest"][1] == tried[-1]["step"]  # failed after the rename: exists, but may not be on disk
    for row in rows:
        assert row["failures"][0].startswith(f"rank {row['rank']}: ")
        assert f"the checkpoint of step {row['step']} could not be written: {row['failures'][0]}" in said

    unsaved = {row["step"] for row in rows if row is not tried[-1]}
    steps = [open_checkpoint(path).manifest.step for path in reversed(checkpoint_folders(runs.folder("broken")))]
    assert steps == [step for step in range(1, LAST_SAVE + 1) if step not in unsaved]
    assert not list((runs.folder("broken") / "checkpoints").glob(f"*{STAGING}"))
    assert [row["checkpoint/step"] for row in runs.rows("broken", "checkpoint/failed")] == [row["step"] for row in rows]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("size", "place", "code", "said"),
    [
        ("12k", "runs", 2, "run.root: cannot write the run's folder: [Errno 28] No space left on device"),
        ("28k", "runs", 2, "rank 0: no space left on {runs}/small ("),
        ("700k", "runs", 4, "could not be written: rank 0: no space left on {runs}/small: "),
        ("4k", "/dev/shm", 2, "rank 0: no space left on /dev/shm ([Errno 28]"),
    ],
)
def test_a_full_disk_is_named(runs: Runs, tmp_path: Path, size: str, place: str, code: int, said: str) -> None:
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    loaders = "data.num_workers=1" if place == "/dev/shm" else "data.num_workers=0"
    training = command(
        "train", *runs.settings, f"run.root={tmp_path / 'runs'}", "run.name=small", "strategy=single",
        "trainer.devices=1", "checkpoint.every_steps=1", "checkpoint.max_failed_saves=1", loaders,
    )  # fmt: skip
    result = in_small_file_system(folder, size, training, environment(tmp_path))
    assert said.format(runs=tmp_path / "runs") in result.stderr
    assert result.returncode == code
    assert "rank 0: Traceback" not in result.stderr


def in_small_file_system(
    folder: Path, size: str, arguments: list[str], variables: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command that sees a file system of this size at `folder`."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    namespace = ["unshare", *([] if os.getuid() == 0 else ["--map-root-user"]), "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, *mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    script = f"{shlex.join(mount)} && exec {shlex.join(arguments)}"
    return subprocess.run([*namespace, "sh", "-c", script], env=variables, capture_output=True, text=True, timeout=150)


@pytest.mark.processes
def test_a_run_stops_after_max_failed_saves_in_a_row(broken: tuple[str, list[dict[str, Any]]]) -> None:
    said, rows = broken
    assert [row["step"] for row in rows][-2:] == [LAST_SAVE + 1, LAST_SAVE + 2]
    assert said.count("failed saves in a row: 2 of 2") == 1


@pytest.mark.usefixtures("broken")
def test_a_non_finite_loss_stops_the_run_and_names_step_rank_and_text(runs: Runs, tiny_corpus: Path) -> None:
    micro_step = (POISONED - LAST_SAVE - 1) * 2 + 2  # the second of two micro-batches on a rank
    with faults(runs, f"nan:1:{micro_step}") as record:
        result = runs.train("broken", *SETTINGS, "checkpoint.every_steps=1000", "trainer.log_every_steps=58", code=1)
    assert f"from step {LAST_SAVE}" in result.stdout
    (poisoned,) = (row for row in read_rows(record) if "spans" in row)
    assert poisoned["step"] == POISONED
    shards = open_corpus(DataConfig(path=str(tiny_corpus), seq_len=32, streams=4), "train").shards
    texts = ", ".join(f"{shards[shard]} line {line + 1}" for _, _, shard, line, _, _ in poisoned["spans"])
    assert f"step {POISONED}: not finite: the loss of rank 1 on {texts}. " in result.stderr
    assert checkpoint_step(checkpoint_folders(runs.folder("broken"))[0]) == LAST_SAVE


@pytest.mark.usefixtures("broken")
def test_a_run_stops_before_it_saves_weights_that_differ_between_ranks(runs: Runs) -> None:
    with faults(runs, f"diverge:1:{LAST_SAVE + 1}"):
        said = runs.train("broken", *SETTINGS, code=1).stderr
    assert f"step {LAST_SAVE + 1}: the weights of ranks [1] differ from those of the other ranks: 1 tensors" in said
    assert checkpoint_step(checkpoint_folders(runs.folder("broken"))[0]) == LAST_SAVE


@pytest.mark.processes
@pytest.mark.parametrize(("world_size", "odd"), [(4, 0), (4, 3)])
def test_the_rank_whose_weights_differ_is_named(
    train_config: Callable[..., TrainConfig], world_size: int, odd: int
) -> None:
    config = train_config("strategy=ddp", "model.num_layers=1", "model.hidden_size=32", "model.num_heads=2")
    module = CodeLM(config, build_model(config)[0], np.zeros(1))

    def check() -> str:
        require_equal_replicas(module, step=6)
        if collective.rank() == odd:
            module.model.get_parameter("transformer.h.0.mlp.c_fc.bias").data[5] += 2**-20
        with pytest.raises(Diverged) as raised:
            require_equal_replicas(module, step=7)
        return str(raised.value)

    for said in run_distributed(check, world_size):
        assert re.match(rf"step 7: the weights of ranks \[{odd}\] .* 1 tensors, .*h.0.mlp.c_fc.bias", said)


def test_a_weight_that_is_not_finite_is_never_saved(train_config: Callable[..., TrainConfig]) -> None:
    config = train_config("strategy=ddp", "model.num_layers=1", "model.hidden_size=32", "model.num_heads=2")
    module = CodeLM(config, build_model(config)[0], np.zeros(1))
    module.model.transformer.ln_f.weight.data[3] = np.inf
    with pytest.raises(NonFinite, match="step 7"):
        require_equal_replicas(module, step=7)


def pid_of(runs: Runs, name: str, rank: int) -> int:
    return rank_pids(runs.folder(name), rank)[0]


def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_all(runs: Runs) -> None:
    process = runs.start(
        "hangs", *SETTINGS, "trainer.watchdog_seconds=3", "checkpoint.keep_last=2", "checkpoint.every_steps=50",
        "trainer.max_steps=100000",
    )  # fmt: skip
    runs.wait_for_step("hangs", 50, process, "checkpoint/seconds")
    os.kill(pid_of(runs, "hangs", 1), signal.SIGSTOP)
    said = process.communicate(timeout=60)[0]  # in a save the limit is six times as long
    assert process.returncode == MachineFault.exit_code
    assert "no progress for too long: rank 0 is in " in said
    assert "rank 1 does not respond" in said
    stacks = runs.folder("hangs") / "stacks"
    assert "most recent call first" in (stacks / "rank-0.txt").read_text()
    assert not (stacks / "rank-1.txt").read_text()
    assert not rank_pids(runs.folder("hangs"))

    end = runs.rows("hangs", "checkpoint/seconds")[-1]["step"] + 3
    runs.train("hangs", *SETTINGS, "checkpoint.keep_last=2", f"trainer.max_steps={end}")
    assert runs.rows("hangs")[-1]["step"] == end
    assert not stacks.exists()


def test_a_rank_out_of_memory_names_the_micro_batch_and_the_others_stop(runs: Runs) -> None:
    started = time.monotonic()
    with faults(runs, "oom:1:3"):
        said = runs.train("large", *SETTINGS, code=2).stderr
    assert re.search(
        r"rank 1: out of memory with trainer.micro_batch_size=2, for which `clippy plan` expects [\d.]+ GB \(CUDA out",
        said,
    )
    assert "More advice" not in said
    assert time.monotonic() - started < 60


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        (
            ("exit 71", "sleep 0.5; exit 4"),
            4,
            "rank 1 on HOST: ended with exit code 4; rank 0 on HOST: lost the others",
        ),
        (("exit 4", "exit 71"), 4, "rank 0 on HOST: ended with exit code 4"),
        (("kill -9 $$", "exit 4"), 4, "rank 1 on HOST: ended with exit code 4"),
        (("sleep 60", "kill -9 $$"), 71, "rank 1 on HOST: killed by signal 9 (out of memory?)"),
        (
            ("exit 71", "exit 71"),
            71,
            "ranks 0, 1 on HOST: lost the others or its device: RuntimeError: gloo/x (more in",
        ),
    ],
)
def test_of_ranks_that_fail_together_the_one_that_knows_why_is_named_and_decides(
    ends: tuple[str, ...], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank that loses another one may be seen first."""
    lost_file(tmp_path, 0).parent.mkdir()
    lost_file(tmp_path, 0).write_text("Traceback\n  File\nRuntimeError: gloo/x\n")
    ranks = {rank: processes.start(["sh", "-c", how]) for rank, how in enumerate(ends)}
    if "sleep" not in "".join(ends):
        for process in ranks.values():
            process.wait()
    assert agent._wait(ranks, tmp_path) == code
    assert said.replace("HOST", socket.gethostname()) in capsys.readouterr().out


def test_a_killed_rank_is_named_and_nobody_else_complains(runs: Runs) -> None:
    process = runs.start("killed", *SETTINGS, "checkpoint.keep_last=2", "trainer.max_steps=100000")
    runs.wait_for_step("killed", 5, process, "checkpoint/seconds")
    os.kill(pid_of(runs, "killed", 1), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == MachineFault.exit_code
    host = socket.gethostname()
    cause = rf"rank 1 on {host}: killed by signal 9 \(out of memory\?\)"
    lost = rf"; rank 0 on {host}: lost the others or its device: [^\n]*"  # if it is seen to have ended by then
    assert re.search(rf" {cause}({lost})?$", said, re.MULTILINE), said
    assert "Traceback" not in said


def test_a_run_that_is_suspended_for_longer_than_the_watchdog_waits_goes_on(runs: Runs) -> None:
    process = runs.start(
        "suspended", *SETTINGS, "trainer.watchdog_seconds=5", "checkpoint.keep_last=2", "checkpoint.every_steps=1000",
        "trainer.max_steps=100000", "trainer.log_every_steps=1",
    )  # fmt: skip
    runs.wait_for_step("suspended", 5, process)
    everyone = [process.pid, *rank_pids(runs.folder("suspended"))]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in everyone:
            os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(8)  # longer than the watchdog waits
    done = runs.rows("suspended")[-1]["step"]
    time.sleep(5)  # longer than the agent takes to look at the stacks
    runs.wait_for_step("suspended", done + 1, process)
    assert end(process, signal.SIGTERM) == Interrupted.exit_code


@pytest.mark.processes
def test_a_second_interrupt_kills_ranks_that_ignore_signals(
    train_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = train_config(f"run.root={tmp_path}", "trainer.devices=2")
    config.run_dir.mkdir(parents=True)
    save(config, config.run_dir / CONFIG)
    (tmp_path / "deaf.py").write_text("import os, time\nopen(f'pid-{os.getpid()}', 'w')\ntime.sleep(60)\n")
    start = f"""
import sys
from pathlib import Path
from clippy_train.config import load
from clippy_train.launch.agent import here, run_ranks
sys.exit(run_ranks(load(Path({str(config.run_dir / CONFIG)!r})), here(), "deaf"))
"""
    launcher = processes.start([sys.executable, "-c", start], cwd=tmp_path, env=environment(tmp_path))
    while len(ranks := [int(path.name[4:]) for path in tmp_path.glob("pid-*")]) < 2:
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.wait(1)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(10) == 128 + signal.SIGINT
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes: the kernel writes what fits and refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_a_full_disk_rejects_are_written_later_in_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = RowFile(path, resumed_step=0)
    rows = [{"step": step, "train/loss": step / 3} for step in range(1, 9)]
    for row in rows[:2]:
        file.append(row)
    limit = path.stat().st_size + 8
    with full_disk(limit):
        for row in rows[2:6]:
            file.append(row)
    assert "the row of step 4 is not written yet" in caplog.text
    assert path.stat().st_size == limit  # ends in a truncated row
    for row in rows[6:]:
        file.append(row)
    assert list(read_rows(path)) == rows
    assert "cut short" not in caplog.text


@pytest.mark.filterwarnings("ignore:Exception in thread")  # TensorBoard's own
def test_a_full_disk_ends_tensorboard_but_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = EventLogger(tmp_path, resumed_step=0)
    logger.log_metrics({"train/loss": 1.0}, 1)
    logger.save()
    with full_disk(10):
        for step in range(2, 40):
            logger.log_metrics({"train/loss": 1.0}, step)
            logger.save()
    assert "TensorBoard logging stops here" in caplog.text
    logger.log_metrics({"train/loss": 1.0}, 40)
    logger.finalize("success")
