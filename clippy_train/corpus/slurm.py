"""A corpus build as Slurm jobs: an array for each stage, which begins when the one before has succeeded.

Job `rank` of the `world_size` jobs of an array performs every `world_size`-th task of the stage from `rank` on, so the
arrays can be submitted before the number of tasks is known. datatrove submits: it writes the scripts, chains the arrays
and has Slurm requeue what a dead node interrupts. Its own record of finished ranks is not used, since the results are
the record: when the jobs have ended, the same command submits the stages that are left. All nodes must share the
sources, `out` and the environment. Scripts and logs stay in a folder beside `out`.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import Any

from clippy_train.config import CorpusConfig
from clippy_train.corpus.build import SETTINGS, begin_build, publish
from clippy_train.corpus.stages import SIZES, STAGES, Build, Sizes, Stage, one
from clippy_train.corpus.tasks import perform, unfinished
from clippy_train.errors import ConfigError

JOBS = ".jobs"  # suffix of the folder of scripts and logs


def submit_corpus(config: CorpusConfig, sizes: Sizes = SIZES) -> list[tuple[str, str]]:
    """Submit what is left of a build; returns the stages and their jobs' numbers.

    Raises:
        ConfigError: as `begin_build`; or datatrove or Slurm is missing, or refuses the jobs.
    """
    if not shutil.which("sbatch"):
        raise ConfigError(f"slurm.partition={config.slurm.partition}: no sbatch on the PATH")
    executor_class = _datatrove()
    build = begin_build(config, sizes)
    submitted: list[tuple[str, str]] = []
    last = None
    for name, jobs, function in _arrays(build):
        last = _executor(executor_class, build, name, jobs, function, last)
        try:
            last.run()
        except subprocess.CalledProcessError as error:  # sbatch has said why
            if not submitted:
                _remove_if_empty(build)
            raise ConfigError(f"slurm.partition={config.slurm.partition}: sbatch refuses the stage {name}") from error
        submitted.append((name, str(last.job_id)))
    return submitted


def _remove_if_empty(build: Build) -> None:
    """Leave nothing of a build that has neither results nor jobs."""
    if [path.name for path in build.folder.iterdir()] == [SETTINGS]:
        shutil.rmtree(build.folder)
        shutil.rmtree(_jobs_folder(build))


def _jobs_folder(build: Build) -> Path:
    return Path(f"{Path(build.config.out).resolve()}{JOBS}")


def _arrays(build: Build) -> Iterator[tuple[str, int, Callable[..., None]]]:
    """The name, the number of jobs and the work of each array, from the first stage on that lacks results."""
    wanted = [stage for stage in STAGES if stage.is_wanted(build.config)]
    for stage in dropwhile(partial(_is_complete, build), wanted):
        yield stage.name, 1 if stage.count is one else build.config.slurm.tasks, partial(_share, build, stage.name)
    yield "publish", 1, partial(_finish, build)


def _is_complete(build: Build, stage: Stage) -> bool:
    """Whether a stage has all its results, if all before it have theirs."""
    return not any(True for _ in unfinished(build, stage))


def _datatrove() -> Any:
    try:
        from datatrove.executor import SlurmPipelineExecutor
        from datatrove.utils.logging import logger
    except ImportError:
        raise ConfigError("slurm.partition needs datatrove: pip install 'clippy_train[corpus]'") from None
    logger.remove()
    return SlurmPipelineExecutor


def _executor(
    executor_class: Any, build: Build, name: str, jobs: int, function: Callable[..., None], depends: Any
) -> Any:
    settings, folder = build.config.slurm, _jobs_folder(build) / name
    executor = executor_class(
        [function],
        tasks=jobs,
        time=f"{settings.hours}:00:00",
        partition=settings.partition,
        mem_per_cpu_gb=settings.memory_gb,
        job_name=f"clippy-corpus-{name}",
        qos=None,
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        sbatch_args={"kill-on-invalid-dep": "yes", "chdir": str(Path.cwd())},
        depends=depends,
        logging_dir=str(folder),
        slurm_logs_folder=str(folder / "logs"),
        skip_completed=False,
        requeue_signals=None,
    )
    executor.launch_merge_stats = _nothing  # a job for each stage, to add up figures that it does not have
    return executor


def _nothing() -> None:
    pass


def _share(build: Build, name: str, _: Any, rank: int, world_size: int) -> None:
    """The tasks of one job of an array."""
    stage = next(stage for stage in STAGES if stage.name == name)
    for task in unfinished(build, stage, rank, world_size):
        perform(build, name, task)


def _finish(build: Build, *_: Any) -> None:
    publish(build)
    shutil.rmtree(build.folder)
