"""Hydra's plugins for `clippy train -m`; Hydra looks for them in packages of `hydra_plugins` only, at every start.

The launcher only composes: what a trial is and how it runs is `clippy_train.sweep`'s. The Optuna sweeper takes the
place of hydra-optuna-sweeper 1.3.0, which needs Optuna 2, and so can store no study beside SQLAlchemy 2 (2026-11-23).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext
from omegaconf import MISSING, DictConfig

STUDY = "optuna.log"  # in the sweep's folder


class TrialLauncher(Launcher):
    """Composes each job of a batch once, and gives them to the task function together: it returns a value for each."""

    def setup(self, *, hydra_context: HydraContext, task_function: Callable[[Any], Any], config: DictConfig) -> None:
        self.loader, self.task_function, self.config = hydra_context.config_loader, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        jobs = [self.loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
        return [
            JobReturn(overrides=overrides, cfg=job, status=JobStatus.COMPLETED, _return_value=value)
            for overrides, job, value in zip(job_overrides, jobs, self.task_function(jobs), strict=True)
        ]


class OptunaSweeper(Sweeper):
    """Has Optuna choose the values, by the lowest value that the task function returns.

    The study lies in the sweep's folder. A trial without a value stays open in it: the next sweep runs it again first.

    Args:
        trials: how many are to have a value in the end.
        parallel: how many are chosen at a time, all from the same knowledge.
        seed: of Optuna's choice.
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
        self.trial_launcher.launch([_job(fixed, trial) for trial in finished], 0)  # they have run: for the table
        for first in range(len(finished), self.trials, self.parallel):
            size = min(self.parallel, self.trials - first)
            batch = [opened.pop(0) if opened else study.ask(space) for _ in range(size)]
            results = self.trial_launcher.launch([_job(fixed, trial) for trial in batch], first)
            for trial, result in zip(batch, results, strict=True):
                if result.return_value is not None:
                    study.tell(trial, result.return_value)

    def _study(self) -> Any:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(self.folder / STUDY)))
        study = optuna.create_study(study_name="sweep", storage=storage, load_if_exists=True)
        # Another seed each time: a sampler that began anew would choose the first values once more.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.get_trials(deepcopy=False)))
        return study


def _trials(study: Any, state: str) -> list[Any]:
    """A study's trials in a state, in the order in which they were chosen."""
    from optuna.trial import Trial, TrialState

    return [Trial(study, each._trial_id) for each in study.get_trials(deepcopy=False, states=[TrialState[state]])]


def _job(fixed: list[str], trial: Any) -> list[str]:
    """The overrides of a trial; four digits of a number are enough, and make names of folders that can be read."""
    chosen = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in trial.params.items()}
    return [*fixed, *(f"{key}={value}" for key, value in chosen.items())]


def distribution(override: Override) -> Any:
    """What Optuna may choose from: `interval(a,b)`, `tag(log,interval(a,b))`, or any list of values."""
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
