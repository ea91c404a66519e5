"""Sweeps as a user runs them: `clippy train -m` with trials that are processes, and Optuna's choice without any."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig
from support import processes
from support.runs import Runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from clippy_train.compose import composition
from clippy_train.config import TrainConfig
from clippy_train.errors import Interrupted
from clippy_train.run.folder import (
    CONFIG,
    METRICS,
    OUTPUT,
    TENSORBOARD,
    checkpoint_folder,
)
from clippy_train.sweep.sweep import TABLE, _multirun, _plugins, trial_name
from clippy_train.sweep.trials import (
    FOLLOWS,
    OBJECTIVE,
    Trial,
)
from clippy_train.train.loggers import CHARTS

STEPS = 80
Outcome = tuple[int, str, list[dict[str, str]]]  # exit code, output, table
SETTINGS = [
    "run.name=swept", "strategy=single", "trainer.devices=1", f"trainer.max_steps={STEPS}", "trainer.val_samples=2",
    "trainer.val_every_steps=20", "checkpoint.every_steps=1000", "trainer.log_every_steps=1", "data.num_workers=0",
    "model.num_layers=1", "optim.lr=1e-4,1e-3",
]  # fmt: skip
FIRST, SECOND = "swept/optim.lr=0.0001", "swept/optim.lr=0.001"  # the second is the better one


@dataclass
class Swept:
    """The same sweep three times: interrupted in its first trial, continued two at a time, and once more."""

    interrupted: Outcome
    continued: Outcome
    again: Outcome
    seconds_again: float


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("sweep"), tiny_corpus, tiny_tokenizer)


@pytest.fixture(scope="module")
def swept(runs: Runs) -> Swept:
    process = start(runs)
    runs.wait_for_step(FIRST, 2, process)
    process.send_signal(signal.SIGTERM)  # at once: the trial takes its 80 steps in seconds
    interrupted = outcome(runs, process)
    process = start(runs, "launcher.parallel=2")
    while not (runs.folder(SECOND) / CONFIG).exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    refused = runs.clippy("train", "-m", *runs.settings, *SETTINGS, code=2)
    assert f"run.name=swept: process {process.pid} on " in refused.stderr
    continued = outcome(runs, process)
    started = time.monotonic()
    again = outcome(runs, start(runs))
    return Swept(interrupted, continued, again, time.monotonic() - started)


def start(runs: Runs, *overrides: str) -> subprocess.Popen[str]:
    return runs.start_command("train", "-m", *runs.settings, *SETTINGS, *overrides)


def outcome(runs: Runs, process: subprocess.Popen[str]) -> Outcome:
    output = process.communicate(timeout=150)[0]
    with (runs.folder("swept") / TABLE).open() as file:
        return process.returncode, output, list(csv.DictReader(file))


def test_an_interrupted_sweep_stops_its_trial_and_starts_no_other(runs: Runs, swept: Swept) -> None:
    code, output, (first, second) = swept.interrupted
    assert code == Interrupted.exit_code, output
    assert (first["optim.lr"], first["state"]) == ("0.0001", "interrupted")
    assert 2 <= int(first["step"]) < STEPS
    assert (second["state"], second["step"]) == ("not started", "0")
    assert first["bits per byte"] == second["bits per byte"] == ""  # no result, and not 0


def test_the_same_command_continues_what_is_not_done(runs: Runs, swept: Swept) -> None:
    code, output, rows = swept.continued
    assert code == 0, output
    assert [row["state"] for row in rows] == ["done", "done"]
    log = (runs.folder(FIRST) / OUTPUT).read_text()
    assert f"resuming runs/{FIRST} from step {swept.interrupted[2][0]['step']}" in log
    assert f"starting runs/{SECOND}" in (runs.folder(SECOND) / OUTPUT).read_text()


def test_a_finished_sweep_starts_nothing(runs: Runs, swept: Swept) -> None:
    code, output, rows = swept.again
    assert code == 0
    assert not re.search("start|resum|finished", output)
    assert rows == swept.continued[2]


def test_the_table_has_the_best_trial_first_by_its_lowest_validation(runs: Runs, swept: Swept) -> None:
    _, output, rows = swept.continued
    for row in rows:
        validations = [(each["val/bits_per_byte"], each["step"]) for each in runs.rows(row["folder"][5:], "val/loss")]
        best, step = min(validations[1:])  # the first one is before any step
        assert (float(row["bits per byte"]), int(row["at step"])) == (best, step)
        assert float(row["at the end"]) == validations[-1][0]
    assert float(rows[0]["bits per byte"]) < float(rows[1]["bits per byte"])
    shown = re.findall(r"│\s*(0\.\d+)\s*│ done", output)
    assert shown == [row["optim.lr"] for row in rows] == ["0.001", "0.0001"]


def test_the_lowest_validation_after_a_step_counts_and_only_of_a_trial_that_is_done(tmp_path: Path) -> None:
    values = {0: 1.0, 2: 3.0, 4: 2.0, 6: 2.5}
    (tmp_path / METRICS).write_text(
        "".join(json.dumps({"step": step, OBJECTIVE: value}) + "\n" for step, value in values.items())
    )
    trial = Trial({}, [], tmp_path, max_steps=6)
    checkpoint_folder(tmp_path, 4).mkdir(parents=True)
    assert trial.result is None
    checkpoint_folder(tmp_path, 6).mkdir()
    assert trial.result == 2.0


def test_tensorboard_compares_the_trials_by_what_they_vary(runs: Runs, swept: Swept) -> None:
    for name, lr in ((FIRST, 1e-4), (SECOND, 1e-3)):
        events = EventAccumulator(str(runs.folder(name) / TENSORBOARD))
        events.Reload()
        written = events.PluginTagToContent(metadata.PLUGIN_NAME)
        start_info = metadata.parse_session_start_info_plugin_data(written[metadata.SESSION_START_INFO_TAG])
        assert {key: value.number_value for key, value in start_info.hparams.items()} == {"optim.lr": lr}
        assert metadata.SESSION_END_INFO_TAG in written
        compared = metadata.parse_experiment_plugin_data(written[metadata.EXPERIMENT_TAG])
        assert {info.name.tag for info in compared.metric_infos} <= set(events.Tags()["scalars"])
        last = runs.rows(name, "val/loss")[-1]["val/bits_per_byte"]
        assert events.Scalars("val/bits_per_byte")[-1].value == pytest.approx(last)


def test_every_number_that_a_run_logs_is_in_a_chart(runs: Runs, swept: Swept) -> None:
    patterns = [name for charts in CHARTS.values() for names in charts.values() for name in names]
    names = {name for row in runs.rows(FIRST, "step") for name in row} - {"step", "train/epoch"}
    assert [name for name in sorted(names) if not any(re.match(pattern, name) for pattern in patterns)] == []


def test_a_trial_that_fails_is_marked_and_does_not_end_the_sweep(runs: Runs) -> None:
    sweep = ["train", "-m", *runs.settings, "run.name=failing", "data.path=nowhere", "seed=1,2"]
    output = runs.clippy(*sweep, code=3).stdout
    assert output.count("failed: exit code 3") == 4  # when it ends, and in the table


@pytest.mark.processes
def test_a_trial_ends_when_its_sweep_was_killed() -> None:
    follow = "from clippy_train.sweep.trials import follow_sweep; follow_sweep()"
    code = f"import time; {follow}; print(flush=True); time.sleep(60)"
    trial = processes.start(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, FOLLOWS: "1"},
    )
    assert cast(IO[bytes], trial.stdout).read(1)
    assert trial.poll() is None
    cast(IO[bytes], trial.stdin).close()  # what the kernel does for a process that was killed
    assert trial.wait(20) == -signal.SIGTERM


@given(st.lists(st.dictionaries(st.sampled_from(["a.b", "c"]), st.text(max_size=200), min_size=1), unique_by=str))
def test_trials_have_folders_of_their_own_that_any_file_system_takes(points: list[dict[str, str]]) -> None:
    names = [trial_name(point) for point in points]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.=,+-]{1,200}", name) for name in names)


@pytest.mark.slow
def test_optuna_approaches_the_best_value_and_continues_its_study(tmp_path: Path) -> None:
    """A quadratic in the logarithm of the learning rate; the third trial is interrupted, the fifth fails once."""
    trials, tried = 8, []

    def objective(jobs: list[DictConfig]) -> list[float | None]:
        results = []
        for job in jobs:
            tried.append(job.optim.lr)
            if len(tried) == 3:
                raise Interrupted
            failed = len(tried) == 3 + 1 + 2 + 2  # two finished ones are shown again, the interrupted one runs again
            results.append(None if failed else math.log10(job.optim.lr / 3e-4) ** 2)
        return results

    arguments = [
        "experiment=demo", f"run.root={tmp_path}", f"sweep.trials={trials}", "optim.lr=tag(log,interval(1e-6,1e-1))"
    ]  # fmt: skip
    settings = composition(TrainConfig, arguments[:-1])
    with pytest.raises(Interrupted):
        _multirun(objective, [*_plugins(settings, 1), *arguments])
    assert len(tried) == 3
    _multirun(objective, [*_plugins(settings, 1), *arguments])
    assert tried[3:5] == tried[:2]  # done: looked up
    assert tried[5] == tried[2]
    assert all(1e-6 <= lr <= 1e-1 for lr in tried)
    failed = tried[7]
    before = len(tried)
    _multirun(objective, [*_plugins(settings, 1), *arguments])
    assert tried[before:][-1] == failed  # the only one without a value
    assert len(tried) == before + trials
    assert len(set(tried)) == trials  # none was chosen twice
    assert min(abs(math.log10(lr / 3e-4)) for lr in tried) < 1
