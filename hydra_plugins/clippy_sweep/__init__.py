"""Hydra plugins of `clippy train -m`. Hydra loads plugins from packages of `hydra_plugins` only, at every start.

The launcher only composes; `clippy_train.sweep` defines what a trial is and runs it. The Optuna sweeper replaces
hydra-optuna-sweeper 1.3.0, which needs Optuna 2 and therefore cannot store a study beside SQLAlchemy 2 (2026-11-23).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext
from omegaconf import MISSING, DictConfig

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

STUDY = "optuna.log"  # in the sweep's folder


class TrialLauncher(Launcher):
    """Composes the jobs of a batch and passes them to the task function together; it returns one value per job."""

    def setup(self, *, hydra_context: HydraContext, task_function: Callable[[Any], Any], config: DictConfig) -> None:
        self.loader, self.task_function, self.config = hydra_context.config_loader, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        jobs = [self.loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
        return [
            JobReturn(overrides=overrides, cfg=job, status=JobStatus.COMPLETED, _return_value=value)
            for overrides, job, value in zip(job_overrides, jobs, self.task_function(jobs), strict=True)
        ]


class OptunaSweeper(Sweeper):
    """Has Optuna choose the values that minimise what the task function returns.

    The study is a file in the sweep's folder. A trial without a value stays open in it; the next sweep runs it first.

    Args:
        trials: number of trials that have a value in the end.
        parallel: number of trials chosen at a time, all from the same results.
        seed: seed of Optuna's sampler.
    """

    def __init__(self, trials: int, parallel: int, seed: int) -> None:
        self.trials, self.parallel, self.seed = trials, parallel, seed

    def setup(self, *, hydra_context: HydraContext, task_function: Callable[[Any], Any], config: DictConfig) -> None:
        self.folder = Path(config.hydra.sweep.dir)
        self.trial_launcher = TrialLauncher()
        self.trial_launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        overrides = OverridesParser.create().parse_overrides(arguments)
        fixed = [str(each.input_line) for each in overrides if not each.is_sweep_override()]
        space = {each.get_key_element(): distribution(each) for each in overrides if each.is_sweep_override()}
        study = self._study()
        finished, opened = _trials(study, "COMPLETE"), _trials(study, "RUNNING")
        self.trial_launcher.launch([_job(fixed, trial) for trial in finished], 0)  # done: not run again, only listed
        for first in range(len(finished), self.trials, self.parallel):
            size = min(self.parallel, self.trials - first)
            batch = [opened.pop(0) if opened else study.ask(space) for _ in range(size)]
            results = self.trial_launcher.launch([_job(fixed, trial) for trial in batch], first)
            for trial, result in zip(batch, results, strict=True):
                if result.return_value is not None:
                    study.tell(trial, result.return_value)

    def _study(self) -> "optuna.Study":
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(self.folder / STUDY)))
        study = optuna.create_study(study_name="sweep", storage=storage, load_if_exists=True)
        # A seed per call: with the same one, the sampler would repeat its first choices.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.get_trials(deepcopy=False)))
        return study


def _trials(study: "optuna.Study", state: str) -> "list[optuna.Trial]":
    """The trials of a study that are in a state, in the order in which they were chosen."""
    from optuna.trial import Trial, TrialState

    return [Trial(study, each._trial_id) for each in study.get_trials(deepcopy=False, states=[TrialState[state]])]


def _job(fixed: list[str], trial: "optuna.Trial") -> list[str]:
    """The overrides of a trial. Floats are cut to four digits, which keeps folder names readable."""
    chosen = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in trial.params.items()}
    return [*fixed, *(f"{key}={value}" for key, value in chosen.items())]


def distribution(override: Override) -> "BaseDistribution":
    """The Optuna distribution of `interval(a,b)`, `tag(log,interval(a,b))`, or any list of values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not override.is_interval_sweep():
        return CategoricalDistribution(list(map(str, override.sweep_string_iterator())))
    interval: Any = override.value()
    return FloatDistribution(interval.start, interval.end, log="log" in interval.tags)


_STORE = ConfigStore.instance()
_STORE.store(group="hydra/launcher", name="trials", node={"_target_": f"{__name__}.{TrialLauncher.__name__}"})
_STORE.store(
    group="hydra/sweeper",
    name="trials",
    node={"_target_": f"{__name__}.{OptunaSweeper.__name__}", "trials": MISSING, "parallel": MISSING, "seed": MISSING},
)
