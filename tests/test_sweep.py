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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend, JournalStorage
from support import forks, processes
from support.runs import Runs, command, environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from clippy_train.cli import main
from clippy_train.compose import composition, parse_overrides, shortened, sweep_values
from clippy_train.config import TrainConfig
from clippy_train.errors import ConfigError, Interrupted
from clippy_train.launch.lock import lock_folder
from clippy_train.run.folder import (
    CONFIG,
    JOB_FILE,
    METRICS,
    OUTPUT,
    checkpoint_folder,
)
from clippy_train.sweep import table
from clippy_train.sweep.sweep import Prune, Sweep, _multirun, _plugins, _runner, trial_name
from clippy_train.sweep.table import FOLDER, RESULT, TABLE, seed_means, update
from clippy_train.sweep.table import SETTINGS as OF
from clippy_train.sweep.trials import FOLLOWS, OBJECTIVE, Local, Slurm, Trial
from clippy_train.train.loggers import BEST, CHARTS
from hydra_plugins.clippy_sweep import STUDY, distribution, short_value

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
    """A sweep: interrupted in its first trial, continued two at a time, once more, and with other settings."""

    interrupted: Outcome
    continued: Outcome
    again: Outcome
    other: str  # standard error


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
    again = outcome(runs, start(runs))
    changed = ["optim.weight_decay=0.5", "model.num_layers=2", "logger.tensorboard=false", "trainer.log_every_steps=5"]
    other = runs.clippy("train", "-m", *runs.settings, *SETTINGS, *changed, code=2)
    return Swept(interrupted, continued, again, other.stderr)


def start(runs: Runs, *overrides: str) -> forks.Command:
    return runs.start_clippy("train", "-m", *runs.settings, *SETTINGS, *overrides)


def outcome(runs: Runs, process: forks.Command) -> Outcome:
    output = process.communicate(timeout=150)[0]
    assert process.returncode is not None
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


def test_results_of_other_settings_are_refused(swept: Swept) -> None:
    changed = "model.num_layers was 1, is 2; optim.weight_decay was 0.1, is 0.5"
    assert f"runs/{FIRST} has results of other settings: {changed}." in swept.other


def test_the_table_names_the_settings_of_its_trials(swept: Swept) -> None:
    _, output, rows = swept.continued
    (settings,) = {row["settings"] for row in rows}
    assert f"trainer.max_steps={STEPS}" in settings.split()
    assert not re.search(r"optim\.lr=|run\.name=|data\.num_workers=", settings)
    assert settings.split() == sorted(settings.split())
    assert "settings: data.path=" in " ".join(output.split())


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
        events = EventAccumulator(str(runs.folder(name)))
        events.Reload()
        written = events.PluginTagToContent(metadata.PLUGIN_NAME)
        start_info = metadata.parse_session_start_info_plugin_data(written[metadata.SESSION_START_INFO_TAG])
        assert start_info.hparams["optim.lr"].number_value == lr
        assert start_info.hparams["trainer.max_steps"].number_value == STEPS
        assert metadata.SESSION_END_INFO_TAG in written
        compared = metadata.parse_experiment_plugin_data(written[metadata.EXPERIMENT_TAG])
        assert [info.name for info in compared.hparam_infos] == ["optim.lr"]
        assert {info.name.tag for info in compared.metric_infos} <= set(events.Tags()["scalars"])
        validations = {row["step"]: row["val/bits_per_byte"] for row in runs.rows(name, "val/loss")}
        shown = {event.step: event.value for event in events.Scalars("val/bits_per_byte")}
        assert shown == pytest.approx(validations)
        best = [min(validations[step] for step in range(20, last + 1, 20)) for last in range(20, STEPS + 1, 20)]
        assert [event.value for event in events.Scalars(BEST)] == pytest.approx(best)


def test_every_number_that_a_run_logs_is_in_a_chart(runs: Runs, swept: Swept) -> None:
    patterns = [name for charts in CHARTS.values() for names in charts.values() for name in names]
    names = {name for row in runs.rows(FIRST, "step") for name in row} - {"step", "train/epoch"}
    assert [name for name in sorted(names) if not any(re.match(pattern, name) for pattern in patterns)] == []


def test_a_trial_that_fails_is_marked_and_does_not_end_the_sweep(runs: Runs) -> None:
    """The learning rate is given twice: the last one counts, under its own heading."""
    sweep = ["train", "-m", *runs.settings, "run.name=failing", "data.path=nowhere"]
    output = runs.clippy(*sweep, "optim.lr=1e-2", "seed=choice(7)", "optim.lr=1e-3,2e-3", code=3).stdout
    assert re.search(r"exit code 3 \(0 of 2 done, about 0:00:\d\d left\)\n", output)
    assert "exit code 3 (0 of 2 done)\n" in output
    with (runs.folder("failing") / TABLE).open() as file:
        found = list(csv.DictReader(file))
    assert not any("optim.lr" in row["settings"] for row in found)
    rows = [(row["optim.lr"], row["seed"], row["state"]) for row in found]
    assert rows == [("0.001", "7", "failed: exit code 3"), ("0.002", "7", "failed: exit code 3")]


def test_a_pruned_trial_saves_and_ends(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.root)
    for name, value in environment(runs.root).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("clippy_train.sweep.trials.subprocess", forks.SUBPROCESS)
    arguments = [
        *runs.settings, *SETTINGS[:-1], "run.name=pruned", "seed=choice(1)", "trainer.max_steps=100000",
        "trainer.val_every_steps=2",
    ]  # fmt: skip
    run = Sweep(parse_overrides(TrainConfig, arguments, sweep=True), None, Local(1))
    asked: list[tuple[int, int]] = []

    def prune(number: int, step: int, value: float) -> bool:
        asked.append((number, step))
        return len(asked) == 2

    batches: list[list[float | None]] = []

    def task(jobs: list[DictConfig], _: object) -> list[float | None]:
        batches.append(run.batch(jobs, prune))
        return batches[-1]

    _multirun(task, ["hydra/launcher=trials", *arguments])
    assert batches == [[None]]
    assert asked == [(0, 2), (0, 4)]
    assert run.end() == 0
    with (runs.folder("pruned") / TABLE).open() as file:
        (row,) = csv.DictReader(file)
    assert row["state"] == "pruned"
    assert 4 <= int(row["step"]) < 100000


def test_rows_of_other_trials_stay_in_the_table(tmp_path: Path) -> None:
    def found(folder: str, settings: str, result: float | None, **varied: str) -> table.Row:
        return {**varied, **dict.fromkeys(table.COLUMNS), RESULT: result, OF: settings, FOLDER: folder}

    update(tmp_path, ["seed"], [found("a", "x=1", 2.5, seed="1"), found("b", "x=1", None, seed="2")])
    rows = update(tmp_path, ["seed"], [found("b", "x=1", 1.5, seed="2"), found("c", "x=2", 2.0, seed="1")])
    assert [(each[FOLDER], each[OF], each[RESULT]) for each in rows] == [
        ("b", "x=1", 1.5), ("c", "x=2", 2.0), ("a", "x=1", 2.5)
    ]  # fmt: skip
    with (tmp_path / TABLE).open() as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["2", "1", "1"]


def test_trials_that_vary_other_keys_are_not_mixed_into_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def swept(key: str, value: str, result: float) -> list[table.Row]:
        return [
            {key: value, "seed": seed, **dict.fromkeys(table.COLUMNS), OF: "", RESULT: result, FOLDER: value + seed}
            for seed in "12"
        ]

    update(tmp_path, ["optim.lr", "seed"], [*swept("optim.lr", "0.1", 1.5), *swept("optim.lr", "0.2", 2.5)])
    for _ in range(2):  # the second time its columns are in the file
        rows = update(tmp_path, ["data.window", "seed"], swept("data.window", "8", 3.5))
        table.show(tmp_path, ["data.window", "seed"], rows, "")
        shown = capsys.readouterr().out
        assert "3.5000" in shown
        assert not any(mixed in shown for mixed in ("1.5000", "2.5000", "2.0000"))


def test_means_over_seeds_have_a_spread() -> None:
    points = [("a", "1", 1.0), ("b", "1", 0.5), ("a", "2", 3.0), ("c", "1", 0.1), ("b", "2", None), ("b", "3", 0.7)]
    rows = [{"optim": optim, "seed": seed, RESULT: result} for optim, seed, result in points]
    assert seed_means(["optim", "seed"], rows) == [
        ["b", 2, pytest.approx(0.6), pytest.approx(math.sqrt(0.02))], ["a", 2, 2.0, pytest.approx(math.sqrt(2))]
    ]  # fmt: skip
    assert seed_means(["optim"], rows) == []


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("optim.lr=range(1e-4,5e-4,1e-4)", ["0.0001", "0.0002", "0.0003", "0.0004"]),
        ("optim.lr=range(0.1,0.35,0.1)", ["0.1", "0.2", "0.3"]),
        ("seed=range(1,4)", ["1", "2", "3"]),
        ("optim.lr=1e-3,2e-3", ["0.001", "0.002"]),
    ],
)
def test_values_have_no_rounding_errors(typed: str, values: list[str]) -> None:
    (override,) = parse_overrides(TrainConfig, [typed], sweep=True)
    assert sweep_values(shortened(override)) == values


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where stand-ins of Slurm's commands write what they were given."""
    answers = {
        "sbatch": 'env > "$HERE/env"; printf "%s\\n" "$@" > "$HERE/arguments"; echo 42',
        "squeue": "echo 42 RUNNING",
        "scontrol": 'echo "$@" >> "$HERE/scontrol.log"; echo BatchFlag=1 Requeue=1 JobState=RUNNING',
    }
    for name, answer in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path))
    return tmp_path


@pytest.mark.processes
def test_a_sweep_inside_a_job_submits_jobs_that_inherit_nothing_of_it(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "9", "SLURM_CONF": "/etc/slurm.conf"}.items():
        monkeypatch.setenv(name, value)
    runner = _runner(OmegaConf.create({"name": "slurm", "sbatch": "--nodes=2 --time=9", "parallel": None}))
    assert isinstance(runner, Slurm)
    trial = Trial({}, ["seed=1"], slurm / "50%j", 1, {"optim.lr": 1.0})
    runner.start(trial)
    assert trial.job == "42"
    variables = set((slurm / "env").read_text().splitlines())
    assert "SLURM_CONF=/etc/slurm.conf" in variables
    assert not any(each.startswith(("SLURM_JOB_ID", "SLURM_NTASKS")) for each in variables)
    arguments = (slurm / "arguments").read_text().splitlines()
    assert f"--output={slurm}/50%%j/slurm-%j.out" in arguments
    assert {"--nodes=2", "--time=9", "seed=1"} <= set(arguments)

    again = Trial({}, ["seed=1"], slurm / "50%j", 1, {"optim.lr": 2.0})
    runner.start(again)
    assert again.state == "failed: exit code 2"
    assert "job 42 in the queue has other settings: optim.lr was 1.0, is 2.0" in capsys.readouterr().err


@pytest.mark.processes
def test_a_sweep_that_is_a_job_is_requeued_and_its_trials_go_on(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    options = ["launcher=slurm", "launcher.sbatch=--nodes=1", "seed=choice(1)", "run.name=job"]
    sweep = processes.start(
        command("train", "-m", "experiment=demo", *options), cwd=slurm, env=environment(slurm), stdout=subprocess.PIPE
    )
    while not (slurm / "runs" / "job" / "seed=1" / JOB_FILE).exists():
        assert sweep.poll() is None
        time.sleep(0.02)
    sweep.send_signal(signal.SIGUSR1)
    sweep.communicate(timeout=30)
    assert sweep.returncode == Interrupted.exit_code
    assert "in the queue: job 42" in (slurm / "runs" / "job" / TABLE).read_text()
    assert (slurm / "scontrol.log").read_text().splitlines()[-1] == "requeue 7"


def test_a_sweep_uses_the_allocation_that_it_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert isinstance(_runner(OmegaConf.create({"name": "slurm", "sbatch": "", "parallel": None})), Local)


def test_trials_do_not_share_the_nodes_of_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ConfigError, match=r"launcher\.parallel=2: in an allocation"):
        _runner(OmegaConf.create({"name": "slurm", "sbatch": "", "parallel": 2}))


@pytest.mark.processes
def test_a_sweep_that_was_killed_is_refused_until_its_trials_have_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "saves"
    script.write_text("#!/bin/sh\nread wait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    runner = Local(1)
    runner.lock = lock_folder(tmp_path, "run.name=x")
    trial = Trial({}, [], tmp_path / "trial", 1)
    runner.start(trial)
    os.close(runner.lock)  # as if the sweep had ended
    with pytest.raises(ConfigError, match="wait for it"):
        lock_folder(tmp_path, "run.name=x")
    runner.end(trial)
    while runner.poll([trial]):
        time.sleep(0.01)
    os.close(lock_folder(tmp_path, "run.name=x"))


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


def test_a_chosen_value_is_short_and_in_its_interval() -> None:
    assert short_value(0.000123456, FloatDistribution(1e-5, 1e-2)) == "0.0001235"
    assert short_value(0.9999912345, FloatDistribution(0.99991, 0.999995)) == 0.9999912345
    assert short_value(0.000123456, CategoricalDistribution([0.000123456])) == 0.000123456


class Search:
    """A search with Optuna that calls a function instead of training."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.arguments = ["experiment=demo", f"run.root={folder}", "run.name=search", *arguments]
        self.tried: list[float] = []  # learning rates

    def run(self, function: Callable[[float, Callable[[int, float], bool]], float | None]) -> None:
        """Search; `function` gets a learning rate, and what to call with a step and its validation."""

        def task(jobs: list[DictConfig], prune: Prune | None) -> list[float | None]:
            results = []
            for number, job in enumerate(jobs):
                self.tried.append(job.optim.lr)
                results.append(function(job.optim.lr, partial(prune or refused, number)))
            return results

        fixed = [each for each in self.arguments if not each.startswith(("optim.", "seed"))]
        settings = composition(TrainConfig, fixed)
        _multirun(task, [*_plugins(settings, 1), *self.arguments])


def states(folder: Path) -> list[str]:
    """The states of the trials of a study."""
    storage = JournalStorage(JournalFileBackend(str(folder / "search" / STUDY)))
    return [each.state.name for each in optuna.load_study(study_name="sweep", storage=storage).trials]


def refused(*_: Any) -> Any:
    raise ConfigError("wrong")


@pytest.mark.slow
def test_optuna_approaches_the_best_value_and_continues_its_study(tmp_path: Path) -> None:
    """A quadratic in the logarithm of the learning rate; the third trial is interrupted, another one fails."""
    search = Search(tmp_path, "sweep.trials=8", "optim.lr=tag(log,interval(1e-6,1e-1))")
    tried = search.tried

    def objective(lr: float, _: object) -> float | None:
        if len(tried) == 3:
            raise Interrupted
        return None if len(tried) == 8 else math.log10(lr / 3e-4) ** 2

    with pytest.raises(Interrupted):
        search.run(objective)
    assert len(tried) == 3
    search.run(objective)
    assert tried[3:5] == tried[:2]  # done: looked up
    assert tried[5] == tried[2]
    assert len(tried) == 3 + 8
    search.run(objective)
    assert len(tried) == 3 + 8 + 8  # seven that are done, and one more in place of the one that failed
    assert len(set(tried)) == 9
    assert all(1e-6 <= lr <= 1e-1 for lr in tried)
    assert min(abs(math.log10(lr / 3e-4)) for lr in tried) < 1
    assert states(tmp_path).count("FAIL") == 1


@pytest.mark.slow
def test_a_trial_that_fails_or_is_refused_does_not_stay_in_the_study(tmp_path: Path) -> None:
    values = ["optim.lr=1e-3,1e20", "seed=1,2"]
    search = Search(tmp_path, "sweep.trials=4", *values)
    with pytest.raises(ConfigError, match="wrong"):
        search.run(refused)
    assert states(tmp_path) == ["FAIL"]
    search.run(lambda lr, _: None if lr > 1 else 2.0)
    assert len(search.tried) == 1 + 4
    assert states(tmp_path)[1:] == ["COMPLETE" if lr < 1 else "FAIL" for lr in search.tried[1:]]
    for other in (["optim.lr=1e-3,2e-3", "seed=1,2"], ["optim.lr=1e-3,1e20"]):
        with pytest.raises(ConfigError, match="its study chooses from other values"):
            Search(tmp_path, "sweep.trials=9", *other).run(refused)


@pytest.mark.slow
def test_a_trial_that_is_worse_than_the_median_is_pruned(tmp_path: Path) -> None:
    search = Search(tmp_path, "sweep.trials=7", "sweep.pruner=median", "optim.lr=tag(log,interval(1e-6,1e-1))")
    pruned = []

    def objective(lr: float, prune: Callable[[int, float], bool]) -> float | None:
        value = 1.0 if len(search.tried) <= 5 else 9.0
        pruned.append(prune(1, value) or prune(2, value))
        return None if pruned[-1] else value

    search.run(objective)
    assert pruned == [False] * 5 + [True] * 2
    assert states(tmp_path) == ["COMPLETE"] * 5 + ["PRUNED"] * 2
    search.run(lambda lr, _: 1.0)
    assert len(search.tried) == 7 + 5  # the same trials; only those with a result are shown again


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("model.num_layers=int(interval(1,5))", IntDistribution(1, 5)),
        ("model.num_layers=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("model.num_layers=range(1,6)", IntDistribution(1, 5)),
        ("model.num_layers=range(2,9,3)", IntDistribution(2, 8, step=3)),
        ("optim.lr=tag(log,interval(1e-5,1))", FloatDistribution(1e-5, 1.0, log=True)),
        ("optim.lr=1e-3,2e-3", CategoricalDistribution(["0.001", "0.002"])),
    ],
)
def test_optuna_chooses_whole_numbers_from_whole_numbers(typed: str, expected: BaseDistribution) -> None:
    (override,) = parse_overrides(TrainConfig, [typed], sweep=True)
    assert distribution(override) == expected


def test_values_that_optuna_cannot_choose_from_are_refused() -> None:
    (override,) = parse_overrides(TrainConfig, ["model.num_layers=tag(log,range(1,9,2))"], sweep=True)
    with pytest.raises(ConfigError, match=r"range\(1,9,2\)"):
        distribution(override)


@pytest.mark.slow
def test_a_plan_of_a_search_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "-m", "experiment=demo", "sweep.trials=3", "model.num_layers=int(interval(1,4))"]) == 0
    assert capsys.readouterr().out.count("parameters") == 3
    assert list(tmp_path.iterdir()) == []
