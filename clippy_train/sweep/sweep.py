"""`clippy train -m`: a sweep. Hydra (or Optuna) chooses the values; each trial is a run in the folder
`run.root`/`run.name`/VALUES.

The same command again runs the trials that are not done, from where they stopped. A trial that failed or was
interrupted has a state and no result. `sweep.csv` is kept up to date while trials run. Costs a composition for each
trial, and no torch.
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
    input_line,
    quoted,
    reason,
    register,
    validated,
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
LONGEST_NAME = 120  # of a trial's folder, in characters
COLUMNS = ["state", "step", "bits per byte", "at step", "at the end", "folder"]


def sweep(overrides: list[str], plan: Callable[[TrainConfig], int] | None = None) -> int:
    """Run every trial that is not done; print and write the table. With `plan`, call that for each trial instead.

    Returns:
        The exit code of the first trial that failed, or else that of an interruption if any trial is not done, or 0.

    Raises:
        ConfigError: a trial's configuration is wrong; no trial has started.
    """
    parsed = checked(TrainConfig, overrides)
    firsts = [composition(TrainConfig, first) for first in first_values(parsed)]
    settings = firsts[0]
    varied = [override.key_or_group for override in parsed if override.is_sweep_override()]
    _require_fit(parsed, settings)
    run = Sweep(varied, Local(1) if plan else _runner(settings.launcher), plan)
    for first in firsts:
        run.check(first)
    if isinstance(run.runner, Local) and not plan:
        lock_folder(Path(settings.run.root) / settings.run.name, f"run.name={settings.run.name}")
    with suppress(Interrupted):
        _multirun(run.batch, [*_plugins(settings, run.runner.parallel), *map(input_line, parsed)])
    return run.end()


def _runner(settings: DictConfig) -> "Local | Slurm":
    if settings.name == "slurm" and JOB not in os.environ:
        return Slurm(settings.parallel, settings.sbatch)
    return Local(settings.parallel or 1)


def _require_fit(parsed: list[Override], settings: DictConfig) -> None:
    """Raises ConfigError where what varies does not fit who chooses the values."""
    varied, trials = [override for override in parsed if override.is_sweep_override()], settings.sweep.trials
    if trials is not None and not varied:
        raise ConfigError(f"sweep.trials={trials}: no key has several values, as in 'optim.lr=interval(1e-5,1e-3)'")
    if trials is not None and settings.launcher.name == "slurm" and settings.launcher.parallel is None:
        raise ConfigError(f"sweep.trials={trials} on Slurm: set launcher.parallel, how many are chosen at a time")
    for override in varied:
        if trials is None and override.is_interval_sweep():
            raise ConfigError(f"{override.input_line}: an interval needs sweep.trials=N; or list the values")


def first_values(parsed: list[Override]) -> list[list[str]]:
    """One override list for each value of each sweep, so that a bad value is refused before the first trial runs."""
    fixed = [input_line(override) for override in parsed if not override.is_sweep_override()]
    sweeps = {override.key_or_group: _values(override) for override in parsed if override.is_sweep_override()}
    firsts = {key: values[0] for key, values in sweeps.items()}
    return [
        [*fixed, *(f"{k}={value if k == key else first}" for k, first in firsts.items())]
        for key, values in sweeps.items()
        for value in values
    ] or [fixed]


def _values(override: Override) -> list[str]:
    if override.is_interval_sweep():
        interval: Any = override.value()
        return [str(interval.start), str(interval.end)]
    return list(map(str, override.sweep_string_iterator()))


def _plugins(settings: DictConfig, parallel: int) -> list[str]:
    """Hydra's own overrides: who chooses the values, and who gets them."""
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
    """Have Hydra choose the trials; errors come out as they are."""
    register(TrainConfig)
    argv, sys.argv = sys.argv, ["clippy train", "--multirun", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise it prints them and exits
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(reason(error)) from error
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise ConfigError("sweep.trials: optuna is not installed; pip install 'clippy_train[optuna]'") from error
    finally:
        sys.argv = argv


class Sweep:
    """The trials of one command, batch by batch: a grid has one batch, Optuna several."""

    def __init__(
        self, varied: list[str], runner: "Local | Slurm", plan: Callable[[TrainConfig], int] | None = None
    ) -> None:
        self.varied, self.runner, self.plan = varied, runner, plan
        self._trials: dict[Path, Trial] = {}  # by their folders
        self.stopped = False

    def check(self, composed: DictConfig) -> TrainConfig | None:
        """The configuration of a trial, if it can be known here: a job finds out by itself what it has.

        Raises:
            ConfigError: it is wrong.
        """
        return None if isinstance(self.runner, Slurm) else validated(composed, TrainConfig)

    def batch(self, jobs: list[DictConfig]) -> list[float | None]:
        """Run what is not done of these trials; the result of each that is done now.

        Raises:
            ConfigError: the configuration of one is wrong; none has started.
            Interrupted: a signal came; no other batch may follow.
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

        def stop(number: int, frame: FrameType | None) -> None:
            self.stopped = True
            self.runner.stop(number)

        with handling_signals(stop):
            while running or (pending and not self.stopped):
                while pending and not self.stopped and len(running) < self.runner.parallel:
                    running.append(pending.pop(0))
                    self.runner.start(running[-1])
                time.sleep(self.runner.poll_seconds)
                running = self._left(running)

    def _left(self, running: list[Trial]) -> list[Trial]:
        """The trials that go on; the others are written down."""
        left = self.runner.left(running)
        for trial in running:
            if trial not in left:
                print(f"{trial.run_dir}: {trial.state}", flush=True)
                self.write()
        return left

    @property
    def _folder(self) -> Path:
        return next(iter(self._trials)).parent

    def write(self) -> None:
        """Write the table as it is now, the best trial first."""
        with atomic_write(self._folder / TABLE) as file:
            csv.writer(file).writerows([[*self.varied, *COLUMNS], *(row(trial) for trial in self._ranked())])

    def _ranked(self) -> list[Trial]:
        """Trials that are done by their result, then the others as they were chosen."""
        return sorted(self._trials.values(), key=lambda trial: inf if trial.result is None else trial.result)

    def end(self) -> int:
        """Print and write the table; the exit code of the sweep."""
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
    """A folder for these values: as they are written, and where a path cannot be, with a hash that tells them apart."""
    text = ",".join(f"{key}={value}" for key, value in varied.items()) or "trial"
    name = re.sub(r"[^\w.=,+-]+", "_", text)[:LONGEST_NAME]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def row(trial: Trial) -> list[Any]:
    """A trial's line of the table: the values that it varies, then `COLUMNS`."""
    shown: list[Any] = [*trial.varied.values(), trial.state, last_step(trial.run_dir)]
    if trial.result is None:
        return [*shown, None, None, None, trial.run_dir]
    validations = trial.validations()
    return [*shown, *min(validations), validations[-1][0], trial.run_dir]


def _shown(cell: Any) -> str:
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)
