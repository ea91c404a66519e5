"""Hydra plugins of `clippy train -m`. Hydra loads plugins from packages of `hydra_plugins` only, at every start.

The launcher only composes; `clippy_train.sweep` defines what a trial is and runs it. The Optuna sweeper replaces
hydra-optuna-sweeper 1.3.0, which needs Optuna 2 and therefore cannot store a study beside SQLAlchemy 2 (2026-11-23).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext
from omegaconf import MISSING, DictConfig

from clippy_train.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

STUDY = "optuna.log"  # in the sweep's folder


class TrialLauncher(Launcher):
    """Composes the jobs of a batch and passes them to the task function together; it returns one value per job."""

    def setup(self, *, hydra_context: HydraContext, task_function: Callable[..., Any], config: DictConfig) -> None:
        self.loader, self.task_function, self.config = hydra_context.config_loader, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)
            for overrides, value in zip(job_overrides, self.run(job_overrides), strict=True)
        ]

    def run(
        self, job_overrides: Sequence[Sequence[str]], prune: Callable[[int, int, float], bool] | None = None
    ) -> list[float | None]:
        """Run a batch; `prune` gets the number of a job, a step and its validation, and decides whether to end it."""
        jobs = [self.loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
        values: list[float | None] = self.task_function(jobs, prune)
        return values


class OptunaSweeper(Sweeper):
    """Has Optuna choose the values that minimise what the task function returns.

    The study is a file in the sweep's folder, with a state for every trial: done, pruned or failed. A trial that was
    interrupted stays open; the next sweep runs it first. A failed one does not count there: another is chosen.

    Args:
        trials: number of trials that are done or pruned in the end, if none fails.
        parallel: number of trials chosen at a time, all from the same results.
        seed: seed of Optuna's sampler.
        pruner: `none`, `median` or `halving`.
    """

    def __init__(self, trials: int, parallel: int, seed: int, pruner: str) -> None:
        self.trials, self.parallel, self.seed, self.pruner = trials, parallel, seed, pruner

    def setup(self, *, hydra_context: HydraContext, task_function: Callable[..., Any], config: DictConfig) -> None:
        self.folder = Path(config.hydra.sweep.dir)
        self.trial_launcher = TrialLauncher()
        self.trial_launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        overrides = OverridesParser.create().parse_overrides(arguments)
        self.fixed = [str(each.input_line) for each in overrides if not each.is_sweep_override()]
        space = {each.get_key_element(): distribution(each) for each in overrides if each.is_sweep_override()}
        study = self._study()
        require_same_space(study, space)
        finished, opened = _trials(study, "COMPLETE"), _trials(study, "RUNNING")
        self.trial_launcher.run([self._job(trial) for trial in finished])  # done: not run again, only listed
        for first in range(len(finished) + len(_trials(study, "PRUNED")), self.trials, self.parallel):
            size = min(self.parallel, self.trials - first)
            self._run(study, [opened.pop(0) if opened else study.ask(space) for _ in range(size)])

    def _run(self, study: "optuna.Study", batch: "list[optuna.Trial]") -> None:
        """Run a batch, and tell the study what became of each trial; if interrupted, they stay open."""
        from optuna.trial import TrialState

        pruned = set()

        def prune(number: int, step: int, value: float) -> bool:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a trial that continues repeats its validations
                batch[number].report(value, step)
            if batch[number].should_prune():
                pruned.add(number)
            return number in pruned

        try:
            results = self.trial_launcher.run([self._job(trial) for trial in batch], prune)
        except Interrupted:
            raise
        except Exception:
            for trial in batch:
                study.tell(trial, state=TrialState.FAIL)
            raise
        for number, (trial, result) in enumerate(zip(batch, results, strict=True)):
            if result is not None and math.isfinite(result):
                study.tell(trial, result)
            else:
                study.tell(trial, state=TrialState.PRUNED if number in pruned else TrialState.FAIL)

    def _study(self) -> "optuna.Study":
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruners = {
            "none": optuna.pruners.NopPruner,
            "median": optuna.pruners.MedianPruner,
            "halving": optuna.pruners.SuccessiveHalvingPruner,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(self.folder / STUDY)))
        study = optuna.create_study(
            study_name="sweep", storage=storage, pruner=pruners[self.pruner](), load_if_exists=True
        )
        # A seed per call: with the same one, the sampler would repeat its first choices.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.get_trials(deepcopy=False)))
        return study

    def _job(self, trial: "optuna.Trial") -> list[str]:
        chosen = {key: short_value(value, trial.distributions[key]) for key, value in trial.params.items()}
        return [*self.fixed, *(f"{key}={value}" for key, value in chosen.items())]


def short_value(value: Any, chosen_from: "BaseDistribution") -> Any:
    """A float of an interval with four digits, which keep folder names readable, unless that leaves the interval."""
    from optuna.distributions import FloatDistribution

    if not isinstance(chosen_from, FloatDistribution):
        return value
    short = f"{value:.4g}"
    return short if chosen_from.low <= float(short) <= chosen_from.high else value


def require_same_space(study: "optuna.Study", space: "dict[str, BaseDistribution]") -> None:
    """Give up trials that were opened with other keys.

    Raises:
        ConfigError: the study's results are of other keys, or of other kinds of values.
    """
    from optuna.distributions import check_distribution_compatibility
    from optuna.trial import Trial, TrialState

    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING and trial.params.keys() != space.keys():
            study.tell(Trial(study, trial._trial_id), state=TrialState.FAIL)
            continue
        try:
            if trial.state != TrialState.FAIL and trial.params.keys() != space.keys():
                raise ValueError(f"it varied {', '.join(trial.params)}")
            for key in trial.params.keys() & space.keys():
                check_distribution_compatibility(trial.distributions[key], space[key])
        except ValueError as error:
            raise ConfigError(f"run.name: its study chooses from other values ({error}); choose another one") from error


def _trials(study: "optuna.Study", state: str) -> "list[optuna.Trial]":
    """The trials of a study that are in a state, in the order in which they were chosen."""
    from optuna.trial import Trial, TrialState

    return [Trial(study, each._trial_id) for each in study.get_trials(deepcopy=False, states=[TrialState[state]])]


def distribution(override: Override) -> "BaseDistribution":
    """The Optuna distribution of an interval, a range of integers (both may be tagged `log`), or a list of values.

    Raises:
        ConfigError: Optuna cannot choose from them.
    """
    try:
        return _distribution(override, override.value())
    except ValueError as error:
        raise ConfigError(f"{override.input_line}: {error}") from error


def _distribution(override: Override, values: Any) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if override.is_interval_sweep():
        kind = IntDistribution if isinstance(values.start, int) else FloatDistribution
        return kind(values.start, values.end, log="log" in values.tags)
    if isinstance(values, RangeSweep) and isinstance(values.range(), range):
        numbers: Any = values.range()
        return IntDistribution(min(numbers), max(numbers), log="log" in values.tags, step=abs(numbers.step))
    return CategoricalDistribution(list(map(str, override.sweep_string_iterator())))


_STORE = ConfigStore.instance()
_STORE.store(group="hydra/launcher", name="trials", node={"_target_": f"{__name__}.{TrialLauncher.__name__}"})
_STORE.store(
    group="hydra/sweeper",
    name="trials",
    node={
        "_target_": f"{__name__}.{OptunaSweeper.__name__}",
        **dict.fromkeys(("trials", "parallel", "seed", "pruner"), MISSING),
    },
)
