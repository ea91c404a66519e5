"""`clippy train -m`: a sweep. Hydra or Optuna chooses the values; each trial is a run in `run.root`/`run.name`/VALUES.

The same command again continues the trials that are not done. A trial that failed, was pruned or interrupted has a
state and no result. A trial whose folder has results of other settings is refused. `sweep.csv` is updated while trials
run. Costs a composition per trial, and no torch.
"""

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
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
    ADDED,
    CONF,
    checked,
    composition,
    explanation,
    input_line,
    parse_overrides,
    quoted,
    register_schema,
    search_path,
    shortened,
    sweep_values,
)
from clippy_train.config import TrainConfig
from clippy_train.errors import ConfigError, Interrupted
from clippy_train.launch.lock import lock_folder
from clippy_train.launch.resources import JOB
from clippy_train.launch.slurm import requeue, why_stop
from clippy_train.run.folder import METRICS
from clippy_train.signals import handling_signals
from clippy_train.sweep import table
from clippy_train.sweep.trials import DONE, PRUNED, Local, Slurm, Trial, matters, settings_that_matter

FOLDER_KEYS = {"run.name", "run.root"}  # of a sweep; each trial has its own
OF_SWEEPS = re.compile(r"\+*(sweep\.|launcher\.(parallel|sbatch)=)")  # overrides that a run does not read
LONGEST_NAME = 120  # characters of a trial's folder name, before the hash

Prune = Callable[[int, int, float], bool]  # number of a job in its batch, step, validation -> whether to end it


def sweep(overrides: list[str], plan: Callable[[TrainConfig], int] | None = None) -> int:
    """Run every trial that is not done; print and write the table. With `plan`, call it for each trial instead.

    Returns:
        The exit code of the first failed trial; else that of an interruption if a trial is not done; else 0.

    Raises:
        ConfigError: a trial's configuration is wrong; no trial has started.
    """
    parsed = [shortened(override) for override in parse_overrides(TrainConfig, overrides, sweep=True)]
    _require_one_folder(parsed)
    firsts = [composition(TrainConfig, first) for first in first_values(parsed)]
    settings = firsts[0]
    try:
        _require_sweepable(parsed, settings)
        run = Sweep(parsed, settings.sweep.trials, Local(1) if plan else _runner(settings.launcher), plan)
    except OmegaConfBaseException as error:  # an interpolation that has no value or the wrong type
        raise ConfigError(explanation(error)) from error
    for first in firsts:
        run.check(first)
    if isinstance(run.runner, Local) and not plan:
        run.runner.lock = lock_folder(Path(settings.run.root) / settings.run.name, f"run.name={settings.run.name}")
    arguments = [*search_path(), *_plugins(settings, run.runner.parallel), *map(input_line, parsed)]
    with suppress(Interrupted), TemporaryDirectory() as scratch:
        if plan:  # Hydra writes multirun.yaml
            arguments.append(f"hydra.sweep.dir={quoted(scratch)}")
        _multirun(run.batch, arguments)
    code = run.end()
    if run.stopped and isinstance(run.runner, Slurm) and JOB in os.environ:  # the sweep is a job itself
        attempts = int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1
        requeue(why_stop(attempts, [], settings.launcher.max_requeues))
    return code


def require_run(overrides: Sequence[str]) -> None:
    """Raise ConfigError if one run, not a sweep, is given a key that only sweeps read."""
    for each in overrides:
        if OF_SWEEPS.match(each):
            raise ConfigError(f"{each}: only a sweep reads it; add -m, or leave it out")


def _runner(settings: DictConfig) -> "Local | Slurm":
    """Jobs with launcher=slurm; inside an allocation only if `launcher.sbatch` asks for them."""
    if _submits(settings):
        return Slurm(settings.parallel, settings.sbatch)
    parallel = settings.parallel or 1
    if settings.name == "slurm" and parallel > 1:
        raise ConfigError(
            f"launcher.parallel={parallel}: in an allocation each trial uses all nodes; leave it out, or set "
            "launcher.sbatch, so that trials become jobs"
        )
    return Local(parallel)


def _submits(launcher: DictConfig) -> bool:
    """Whether each trial becomes a job."""
    return bool(launcher.name == "slurm" and (launcher.sbatch or JOB not in os.environ))


def _require_one_folder(parsed: list[Override]) -> None:
    """Raises ConfigError if the trials would not share one folder."""
    varied = {override.key_or_group: override for override in parsed if override.is_sweep_override()}
    for name in FOLDER_KEYS & varied.keys():
        raise ConfigError(f"{varied[name].input_line}: a sweep has one folder; give one value")
    if "experiment" in varied and "run.name" not in (override.key_or_group for override in parsed):
        raise ConfigError("a sweep over experiment needs run.name=NAME: the folder of its trials")


def _require_sweepable(parsed: list[Override], settings: DictConfig) -> None:
    """Raises ConfigError if Optuna (with `sweep.trials`) or Hydra (without) cannot choose from the values given."""
    varied, trials = [override for override in parsed if override.is_sweep_override()], settings.sweep.trials
    launcher = settings.launcher
    if launcher.sbatch and launcher.name != "slurm":
        raise ConfigError(f"launcher.sbatch={launcher.sbatch} needs launcher=slurm, which submits a job for each trial")
    if settings.sweep.pruner != "none" and trials is None:
        raise ConfigError(f"sweep.pruner={settings.sweep.pruner} needs sweep.trials=N: Optuna prunes trials")
    if trials is not None and not varied:
        raise ConfigError(f"sweep.trials={trials}: no key has several values, as in 'optim.lr=interval(1e-5,1e-3)'")
    if trials is not None and _submits(launcher) and launcher.parallel is None:
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
        f"hydra.sweeper.pruner={settings.sweep.pruner}",
    ]


def _multirun(task: Callable[..., list[float | None]], arguments: list[str]) -> None:
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
    """The trials of one command, in batches: one for a grid, several with Optuna.

    Args:
        parsed: the overrides of the command.
        total: number of trials; None for those of the first batch.
        plan: called for each trial instead of running it.
    """

    def __init__(
        self,
        parsed: list[Override],
        total: int | None,
        runner: "Local | Slurm",
        plan: Callable[[TrainConfig], int] | None = None,
    ) -> None:
        self.varied = [each.key_or_group for each in parsed if each.is_sweep_override()]
        fixed = [each for each in parsed if not each.is_sweep_override() and matters(each.key_or_group)]
        self.settings = " ".join(sorted(map(input_line, fixed)))
        self.total, self.runner, self.plan = total, runner, plan
        self._trials: dict[Path, Trial] = {}  # by folder
        self._clock = Clock()
        self.stopped = False

    def check(self, composed: DictConfig) -> TrainConfig | None:
        """The configuration of a trial; None for a Slurm job, whose devices are known inside the job only.

        Raises:
            ConfigError: the configuration is wrong.
        """
        return None if isinstance(self.runner, Slurm) else checked(composed, TrainConfig)

    def batch(self, jobs: list[DictConfig], prune: Prune | None = None) -> list[float | None]:
        """Run those of these trials that are not done; return each trial's result, None where it has none.

        Args:
            prune: asked after each validation of a trial.

        Raises:
            ConfigError: a configuration is wrong; none of these trials has started.
            Interrupted: a signal arrived; no other batch may follow.
        """
        trials = [self._trial(job) for job in jobs]
        if self.plan:
            return [None for _ in trials]
        trials = [self._trials.setdefault(trial.run_dir, trial) for trial in trials]  # Optuna may choose one twice
        self._run(list({trial.run_dir: trial for trial in trials if not trial.done}.values()), Judge(trials, prune))
        if self.stopped:
            raise Interrupted("the sweep was interrupted: the same command continues it")
        return [trial.result for trial in trials]

    def _trial(self, job: DictConfig) -> Trial:
        task = [item.lstrip("+") for item in job.hydra.overrides.task]
        given = dict(item.split("=", 1) for item in task)
        varied = {name: given[name] for name in self.varied}
        folder, name = Path(job.run.root) / job.run.name, trial_name(varied)
        compared = ",".join(quoted(f"{key}={value}") for key, value in varied.items())
        arguments = [f"--config-dir={each}" for each in ADDED]
        arguments += [item for item in task if not OF_SWEEPS.match(item) and item.split("=")[0] not in FOLDER_KEYS]
        arguments += [f"run.root={quoted(str(folder))}", f"run.name={quoted(name)}", f"logger.hparams=[{compared}]"]
        with open_dict(job):
            del job["hydra"]
        job.run.root, job.run.name = str(folder), name
        settings = settings_that_matter(job)
        config = self.check(job)
        trial = Trial(varied, arguments, folder / name, job.trainer.max_steps, settings)
        trial.require_same_settings()
        if self.plan and config:
            self.plan(config)
        return trial

    def _run(self, pending: list[Trial], judge: "Judge") -> None:
        running: list[Trial] = []

        def stop(signal_number: int, frame: FrameType | None) -> None:
            self.stopped = True
            self.runner.stop(signal_number)

        with handling_signals(stop):
            while running or (pending and not self.stopped):
                while pending and not self.stopped and len(running) < self.runner.parallel:
                    running.append(pending.pop(0))
                    running[-1].code, running[-1].pruned = None, False  # Optuna may choose one again
                    self.runner.start(running[-1])
                time.sleep(self.runner.poll_seconds)
                running = self._poll(running)
                for trial in filter(judge.prunes, running):
                    self.runner.end(trial)

    def _poll(self, running: list[Trial]) -> list[Trial]:
        """The trials that are still running; the others are reported, and the table updated."""
        still_running = self.runner.poll(running)
        for trial in running:
            if trial not in still_running:
                self._clock.ended += 1
                print(f"{trial.run_dir}: {trial.state} ({self._progress()})", flush=True)
                self.write()
        return still_running

    def _progress(self) -> str:
        """How many trials are done, and how long the others will take if they take as long."""
        total, trials = max(self.total or 0, len(self._trials)), self._trials.values()
        over = sum(trial.over for trial in trials)
        text = f"{sum(trial.done for trial in trials)} of {total} done"
        return f"{text}, about {self._clock.left(total - over)} left" if over < total else text

    @property
    def _folder(self) -> Path:
        return next(iter(self._trials)).parent

    def write(self) -> list[table.Row]:
        """Update the table; return its rows."""
        rows = [table.row(trial, self.settings) for trial in self._trials.values()]
        return table.update(self._folder, self.varied, rows)

    def end(self) -> int:
        """Print and write the table; return the exit code of the sweep."""
        if not self._trials:
            return 0
        table.show(self._folder, self.varied, self.write(), self.settings)
        unfinished = [trial.code for trial in self._trials.values() if trial.state not in (DONE, PRUNED)]
        failed = [code for code in unfinished if code not in (None, Interrupted.exit_code)]
        return failed[0] or 1 if failed else Interrupted.exit_code if unfinished else 0


class Clock:
    """Estimates the time that trials will take from that of the trials that `ended` since it was made."""

    def __init__(self) -> None:
        self.started, self.ended = time.monotonic(), 0

    def left(self, trials: int) -> timedelta:
        return timedelta(seconds=round((time.monotonic() - self.started) / self.ended * trials))


class Judge:
    """Asks `prune` about each new validation of the trials of a batch."""

    def __init__(self, trials: list[Trial], prune: Prune | None) -> None:
        self.numbers = {trial.run_dir: number for number, trial in reversed(list(enumerate(trials)))}
        self.prune = prune
        self.seen: dict[Path, int] = {}  # the last step that was judged
        self.sizes: dict[Path, int] = {}  # of the metrics that were read

    def prunes(self, trial: Trial) -> bool:
        """Whether a running trial is to end now; it is marked as pruned."""
        if self.prune is None or trial.pruned or not self._has_news(trial.run_dir / METRICS):
            return False
        for value, step in trial.validations():
            if step > self.seen.get(trial.run_dir, 0):
                self.seen[trial.run_dir] = step
                trial.pruned = trial.pruned or self.prune(self.numbers[trial.run_dir], step, value)
        return trial.pruned

    def _has_news(self, metrics: Path) -> bool:
        before, self.sizes[metrics] = self.sizes.get(metrics), metrics.stat().st_size if metrics.exists() else 0
        return before != self.sizes[metrics]


def trial_name(varied: dict[str, str]) -> str:
    """The folder name of a trial: its values; if no path can hold them, an approximation with a hash."""
    text = ",".join(f"{key}={value}" for key, value in varied.items()) or "trial"
    name = re.sub(r"[^\w.=,+-]+", "_", text)[:LONGEST_NAME]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
