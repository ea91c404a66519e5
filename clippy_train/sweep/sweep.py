"""`clippy train -m`: a sweep. Hydra or Optuna chooses the values; each trial is a run in `run.root`/`run.name`/VALUES.

The same command again continues the trials that are not done. A trial that failed or was interrupted has a state and no
result. `sweep.csv` is updated while trials run. Costs a composition per trial, and no torch.
"""

import csv
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import hydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from clippy_train.compose import (
    CONF,
    checked,
    composition,
    explanation,
    input_line,
    parse_overrides,
    quoted,
    register_schema,
    sweep_values,
)
from clippy_train.config import TrainConfig
from clippy_train.errors import ConfigError, Interrupted
from clippy_train.files import atomic_write
from clippy_train.launch.lock import lock_folder
from clippy_train.launch.resources import JOB
from clippy_train.report import print_columns
from clippy_train.run.folder import last_step
from clippy_train.signals import handling_signals
from clippy_train.sweep.trials import (
    OBJECTIVE,
    Local,
    Slurm,
    Trial,
)

TABLE = "sweep.csv"
LONGEST_NAME = 120  # characters of a trial's folder name, before the hash
COLUMNS = ["state", "step", "bits per byte", "at step", "at the end", "folder"]


def sweep(overrides: list[str], plan: Callable[[TrainConfig], int] | None = None) -> int:
    """Run every trial that is not done; print and write the table. With `plan`, call it for each trial instead.

    Returns:
        The exit code of the first failed trial; else that of an interruption if a trial is not done; else 0.

    Raises:
        ConfigError: a trial's configuration is wrong; no trial has started.
    """
    parsed = parse_overrides(TrainConfig, overrides, sweep=True)
    _require_one_folder(parsed)
    firsts = [composition(TrainConfig, first) for first in first_values(parsed)]
    settings = firsts[0]
    varied = [override.key_or_group for override in parsed if override.is_sweep_override()]
    try:
        _require_sweepable(parsed, settings)
        run = Sweep(varied, Local(1) if plan else _runner(settings.launcher), plan)
    except OmegaConfBaseException as error:  # an interpolation that has no value or the wrong type
        raise ConfigError(explanation(error)) from error
    for first in firsts:
        run.check(first)
    if isinstance(run.runner, Local) and not plan:
        lock_folder(Path(settings.run.root) / settings.run.name, f"run.name={settings.run.name}")
    arguments = [*_plugins(settings, run.runner.parallel), *map(input_line, parsed)]
    with suppress(Interrupted), TemporaryDirectory() as scratch:
        if plan:  # Hydra writes multirun.yaml
            arguments.append(f"hydra.sweep.dir={quoted(scratch)}")
        _multirun(run.batch, arguments)
    return run.end()


def _runner(settings: DictConfig) -> "Local | Slurm":
    if settings.name == "slurm" and JOB not in os.environ:
        return Slurm(settings.parallel, settings.sbatch)
    return Local(settings.parallel or 1)


def _require_one_folder(parsed: list[Override]) -> None:
    """Raises ConfigError if the trials would not share one folder."""
    varied = {override.key_or_group: override for override in parsed if override.is_sweep_override()}
    for name in {"run.name", "run.root"} & varied.keys():
        raise ConfigError(f"{varied[name].input_line}: a sweep has one folder; give one value")
    if "experiment" in varied and "run.name" not in (override.key_or_group for override in parsed):
        raise ConfigError("a sweep over experiment needs run.name=NAME: the folder of its trials")


def _require_sweepable(parsed: list[Override], settings: DictConfig) -> None:
    """Raises ConfigError if Optuna (with `sweep.trials`) or Hydra (without) cannot choose from the values given."""
    varied, trials = [override for override in parsed if override.is_sweep_override()], settings.sweep.trials
    if trials is not None and not varied:
        raise ConfigError(f"sweep.trials={trials}: no key has several values, as in 'optim.lr=interval(1e-5,1e-3)'")
    if trials is not None and settings.launcher.name == "slurm" and settings.launcher.parallel is None:
        raise ConfigError(
            f"sweep.trials={trials} on Slurm: set launcher.parallel, the number of trials chosen at a time"
        )
    for override in filter(Override.is_interval_sweep, varied):
        interval: Any = override.value()
        if trials is None:
            raise ConfigError(f"{override.input_line}: an interval needs sweep.trials=N; or list the values")
        if interval.start > interval.end or ("log" in interval.tags and interval.start <= 0):
            raise ConfigError(f"{override.input_line}: write interval(LOW,HIGH), with LOW above 0 for tag(log,...)")


def first_values(parsed: list[Override]) -> list[list[str]]:
    """One list of overrides per value of a sweep, so that a wrong value is rejected before the first trial runs."""
    fixed = [input_line(override) for override in parsed if not override.is_sweep_override()]
    sweeps = {override.key_or_group: sweep_values(override) for override in parsed if override.is_sweep_override()}
    firsts = {key: values[0] for key, values in sweeps.items()}
    return [
        [*fixed, *(f"{k}={value if k == key else first}" for k, first in firsts.items())]
        for key, values in sweeps.items()
        for value in values
    ] or [fixed]


def _plugins(settings: DictConfig, parallel: int) -> list[str]:
    """Hydra's own overrides: the sweeper, which chooses the values, and the launcher, which receives them."""
    launcher = "hydra/launcher=trials"
    if settings.sweep.trials is None:
        return [launcher]
    return [
        launcher,
        "hydra/sweeper=trials",
        f"hydra.sweeper.trials={settings.sweep.trials}",
        f"hydra.sweeper.parallel={min(parallel, settings.sweep.trials)}",
        f"hydra.sweeper.seed={settings.seed}",
    ]


def _multirun(task: Callable[[list[DictConfig]], list[float | None]], arguments: list[str]) -> None:
    """Have Hydra choose the trials and call `task` with each batch of them; errors of `task` pass through."""
    register_schema(TrainConfig)
    argv, sys.argv = sys.argv, ["clippy train", "--multirun", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise it prints them and exits
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explanation(error)) from error
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise ConfigError("sweep.trials: optuna is not installed; pip install 'clippy_train[optuna]'") from error
    finally:
        sys.argv = argv


class Sweep:
    """The trials of one command, in batches: one for a grid, several with Optuna."""

    def __init__(
        self, varied: list[str], runner: "Local | Slurm", plan: Callable[[TrainConfig], int] | None = None
    ) -> None:
        self.varied, self.runner, self.plan = varied, runner, plan
        self._trials: dict[Path, Trial] = {}  # by folder
        self.stopped = False

    def check(self, composed: DictConfig) -> TrainConfig | None:
        """The configuration of a trial; None for a Slurm job, whose devices are known inside the job only.

        Raises:
            ConfigError: the configuration is wrong.
        """
        return None if isinstance(self.runner, Slurm) else checked(composed, TrainConfig)

    def batch(self, jobs: list[DictConfig]) -> list[float | None]:
        """Run those of these trials that are not done; return each trial's result, None where it has none.

        Raises:
            ConfigError: a configuration is wrong; none of these trials has started.
            Interrupted: a signal arrived; no other batch may follow.
        """
        trials = [self._trial(job) for job in jobs]
        if self.plan:
            return [None for _ in trials]
        trials = [self._trials.setdefault(trial.run_dir, trial) for trial in trials]  # Optuna may choose one twice
        self._run(list({trial.run_dir: trial for trial in trials if not trial.done}.values()))
        if self.stopped:
            raise Interrupted("the sweep was interrupted: the same command continues it")
        return [trial.result for trial in trials]

    def _trial(self, job: DictConfig) -> Trial:
        task = [item.lstrip("+") for item in job.hydra.overrides.task]
        varied = dict(item.split("=", 1) for item in task if item.split("=")[0] in self.varied)
        folder, name = Path(job.run.root) / job.run.name, trial_name(varied)
        compared = ",".join(quoted(f"{key}={value}") for key, value in varied.items())
        arguments = [item for item in task if item.split("=")[0] not in ("run.root", "run.name")]
        arguments += [f"run.root={quoted(str(folder))}", f"run.name={quoted(name)}", f"logger.hparams=[{compared}]"]
        with open_dict(job):
            del job["hydra"]
        job.run.root, job.run.name = str(folder), name
        config = self.check(job)
        if self.plan and config:
            self.plan(config)
        return Trial(varied, arguments, folder / name, job.trainer.max_steps)

    def _run(self, pending: list[Trial]) -> None:
        running: list[Trial] = []

        def stop(signal_number: int, frame: FrameType | None) -> None:
            self.stopped = True
            self.runner.stop(signal_number)

        with handling_signals(stop):
            while running or (pending and not self.stopped):
                while pending and not self.stopped and len(running) < self.runner.parallel:
                    running.append(pending.pop(0))
                    self.runner.start(running[-1])
                time.sleep(self.runner.poll_seconds)
                running = self._poll(running)

    def _poll(self, running: list[Trial]) -> list[Trial]:
        """The trials that are still running; the others are reported, and the table updated."""
        still_running = self.runner.poll(running)
        for trial in running:
            if trial not in still_running:
                print(f"{trial.run_dir}: {trial.state}", flush=True)
                self.write()
        return still_running

    @property
    def _folder(self) -> Path:
        return next(iter(self._trials)).parent

    def write(self) -> None:
        """Write the current table, the best trial first."""
        with atomic_write(self._folder / TABLE) as file:
            csv.writer(file).writerows([[*self.varied, *COLUMNS], *(row(trial) for trial in self._ranked())])

    def _ranked(self) -> list[Trial]:
        """Trials with a result, best first, then the others in the order in which they were chosen."""
        return sorted(self._trials.values(), key=lambda trial: inf if trial.result is None else trial.result)

    def end(self) -> int:
        """Print and write the table; return the exit code of the sweep."""
        if not self._trials:
            return 0
        self.write()
        rows = [["" if cell is None else _shown(cell) for cell in row(trial)[:-1]] for trial in self._ranked()]
        title = f"{self._folder}, by the lowest {OBJECTIVE}"
        print_columns(title, [*self.varied, *COLUMNS[:-1]], rows)
        unfinished = [trial.code for trial in self._trials.values() if not trial.done]
        failed = [code for code in unfinished if code not in (None, Interrupted.exit_code)]
        return failed[0] or 1 if failed else Interrupted.exit_code if unfinished else 0


def trial_name(varied: dict[str, str]) -> str:
    """The folder name of a trial: its values; if no path can hold them, an approximation with a hash."""
    text = ",".join(f"{key}={value}" for key, value in varied.items()) or "trial"
    name = re.sub(r"[^\w.=,+-]+", "_", text)[:LONGEST_NAME]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def row(trial: Trial) -> list[Any]:
    """A trial's row of the table: the values that it varies, then `COLUMNS`."""
    shown: list[Any] = [*trial.varied.values(), trial.state, last_step(trial.run_dir)]
    if trial.result is None:
        return [*shown, None, None, None, trial.run_dir]
    validations = trial.validations()
    return [*shown, *min(validations), validations[-1][0], trial.run_dir]


def _shown(cell: Any) -> str:
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)
