"""Start a run: check what it needs, lock its folder, freeze its configuration, choose its checkpoint, start its ranks.

All of this happens once, in one process, before any rank trains. Ranks read the frozen files: `config.yaml`, and
`start.json` with what was decided here. `launcher` says what starts them: `launch.agent` on this machine,
`launch.slurm` on the nodes of a job, or torchrun, which has started them already.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from clippy_train.config import TrainConfig, save
from clippy_train.data.mixture import data_ended, open_sources, shards_read, sources_found
from clippy_train.errors import CheckpointError, ConfigError, DataError
from clippy_train.files import atomic_write, looks_local
from clippy_train.launch import slurm, torchrun
from clippy_train.launch.agent import here, interrupt, run_ranks
from clippy_train.launch.lock import lock_folder
from clippy_train.launch.resources import resource_problems
from clippy_train.report import say
from clippy_train.run.changes import changes
from clippy_train.run.checkpoint import Checkpoint, Manifest, checkpoint_layout, find_checkpoint, open_checkpoint
from clippy_train.run.environment import environment
from clippy_train.run.folder import (
    CONFIG,
    CORPUS,
    ENVIRONMENT,
    HF_FOLDER,
    LOST,
    MANIFEST,
    METRICS,
    STACKS,
    STATE,
    checkpoint_folders,
    run_of,
)
from clippy_train.run.history import record
from clippy_train.run.identity import data_identity, identity_changes
from clippy_train.run.moments import BaseState, open_base_state
from clippy_train.run.rows import validated
from clippy_train.run.start import Start, write_start
from clippy_train.shards.problems import read_references
from clippy_train.shards.sources import require_text
from clippy_train.signals import handling_signals


def train(config: TrainConfig) -> int:
    """Start a run, or resume it; wait for its end and return its exit code.

    Raises:
        ConfigError, DataError, CheckpointError, Interrupted: before any rank starts.
    """
    with handling_signals(interrupt):
        if config.launcher.name == "torchrun":
            return torchrun.run_rank(config, prepare)
        if config.launcher.name == "slurm" and not list(resource_problems(config)):
            slurm.announce(config)
        if not prepare(config):
            return 0
        if config.launcher.name == "slurm":
            return slurm.run_nodes(config)
        return run_ranks(config, here())


def prepare(config: TrainConfig) -> bool:
    """Do what is done once per attempt and write what ranks read. False if the run has already finished.

    Raises:
        ConfigError, DataError, CheckpointError: the run cannot start.
    """
    problems = preflight_problems(config)
    if problems:
        raise problems[0] if len(problems) == 1 else type(problems[0])("\n".join(map(str, problems)))
    new = not config.run_dir.exists()
    attempt = slurm.attempt_name() if config.launcher.name == "slurm" else ""
    lock_folder(config.run_dir, f"run.name={config.run.name}", attempt)
    try:
        checkpoint = choose_checkpoint(config)
    except (CheckpointError, ConfigError):
        if new:
            shutil.rmtree(config.run_dir)
        raise
    if checkpoint and is_finished(config, checkpoint.manifest):
        say(f"{config.run_dir}: finished, step {checkpoint.manifest.step} of {config.trainer.max_steps}")
        return False
    start = _resume(config, checkpoint) if checkpoint else _begin(config)
    _freeze(config, checkpoint, start)
    return True


def is_finished(config: TrainConfig, saved: Manifest) -> bool:
    """Whether nothing is left to do after a checkpoint, not even its validation."""
    sources = open_sources(config.data, "train")
    ended = saved.step >= config.trainer.max_steps or data_ended(config, sources, np.array(saved.cursors))
    return ended and validated(config.run_dir / METRICS, saved.step)


def _freeze(config: TrainConfig, checkpoint: Checkpoint | None, start: Start) -> None:
    base = None if checkpoint else base_state(config)
    step = checkpoint.manifest.step if checkpoint else base.step if base else 0
    try:
        for name in (STACKS, LOST):  # the agent would take old ones for new ones
            shutil.rmtree(config.run_dir / name, ignore_errors=True)
        record(config.run_dir, step, config, run_of(checkpoint.path) if checkpoint else config.run_dir)
        save(config, config.run_dir / CONFIG)
        for name, content in ((ENVIRONMENT, environment()), (CORPUS, about_data(config))):
            with atomic_write(config.run_dir / name) as file:
                file.write(json.dumps(content, indent=1) + "\n")
        write_start(config.run_dir, start)
    except OSError as error:
        raise ConfigError(f"run.root: cannot write the run's folder: {error}") from error


def about_data(config: TrainConfig) -> dict[str, Any]:
    """What the corpus's manifest says about it; of a mixture, as `sources`, also their names and streams."""
    sources = open_sources(config.data, "train")
    if not config.data.sources:
        return sources[0].corpus.about()
    found = [{"name": each.name, "streams": each.streams, "manifest": each.corpus.about()} for each in sources]
    return {"sources": found}


def _begin(config: TrainConfig) -> Start:
    base = base_state(config)
    if base is None:
        say(f"starting {config.run_dir}")
        return Start()
    say(
        f"starting {config.run_dir} at step {base.step} with the moments in {base.path}; the base did not record its "
        "position in the data, so the data start from the beginning"
    )
    return Start(base_moments=base.path.parent)


def _resume(config: TrainConfig, checkpoint: Checkpoint) -> Start:
    step = checkpoint.manifest.step
    say(f"resuming {config.run_dir} from step {step} ({checkpoint.path})")
    found = changes(run_of(checkpoint.path), config, step)
    for line in found:
        say(line)
    own = config.run_dir / HF_FOLDER
    needed = not own.is_dir() or any(line.startswith("tokenizer.base was") for line in found)
    gone = [] if needed else [f"{key}={name}" for key, name in _bases(config) if not Path(name).is_dir()]
    if gone:
        say(f"{'; '.join(gone)}: not read, since the run has its own description of the model")
    start = Start(checkpoint.path, description=own if gone else None)
    changed = layout_changes(checkpoint, config)
    if not changed:
        return start
    from clippy_train.run.consolidate import consolidate

    say(f"resharding: {'; '.join(changed)}")
    description = run_of(checkpoint.path) / HF_FOLDER
    if not description.is_dir():
        raise CheckpointError(f"{checkpoint.path} cannot be resharded: {description}, which describes it, is missing")
    return replace(start, consolidated=consolidate(checkpoint, description, config.run_dir))


def preflight_problems(config: TrainConfig) -> list[ConfigError | DataError]:
    """What the run needs and this machine lacks: devices, corpus, base model. Reads listings and first lines only."""
    return [*resource_problems(config), *_corpus_problems(config), *_base_problems(config), *_wandb_problems(config)]


def _corpus_problems(config: TrainConfig) -> Iterator[ConfigError | DataError]:
    try:
        for split in ("train", "validation"):
            for section, source in zip(config.data.corpora, open_sources(config.data, split), strict=True):
                require_text(source.corpus, section)
    except (ConfigError, DataError) as error:
        yield error
        return
    try:
        if config.data.val_problems is not None:
            read_references(config.data.val_problems, "data.val_problems")
    except (ConfigError, DataError) as error:
        yield error


def corpus_warnings(config: TrainConfig) -> Iterator[str]:
    """What makes a corpus slow to read, if it can be read at all."""
    for source in sources_found(config.data):
        streams = len(source.streams)
        shards, read = shards_read(source)
        if read > shards:
            of = f"its {streams} of the data.streams" if source.name else "data.streams"
            yield (
                f"{f'{source.name}: ' if source.name else ''}{shards} training shards do not divide into "
                f"{of}={config.data.streams}: every stream reads {shards % streams} of them, so an epoch reads {read} "
                f"shards. Make the number of shards a multiple of {'these' if source.name else 'data.streams'}"
            )


def _base_problems(config: TrainConfig) -> Iterator[ConfigError]:
    if not (config.model.base or config.tokenizer.base):
        yield ConfigError("tokenizer.base: needed when model.base=null (folder or hub name of a tokenizer)")
    if checkpoint_folders(config.run_dir):
        return  # the run has taken from its base what it needs
    for key, name in _bases(config):
        if looks_local(name) and not Path(name).is_dir():
            yield ConfigError(f"{key}={name}: no such folder")
    try:
        base_state(config)
    except ConfigError as error:
        yield error


def _bases(config: TrainConfig) -> list[tuple[str, str]]:
    """The keys that name a base, with its folder or hub name."""
    named = ("model.base", config.model.base), ("tokenizer.base", config.tokenizer.base)
    return [(key, name) for key, name in named if name]


def _wandb_problems(config: TrainConfig) -> Iterator[ConfigError]:
    if config.logger.wandb and find_spec("wandb") is None:
        yield ConfigError("logger.wandb=true: wandb is not installed; pip install 'clippy_train[wandb]'")
    elif config.logger.wandb and not ({"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys()):
        yield ConfigError("logger.wandb=true: set WANDB_API_KEY, or WANDB_MODE=offline, in the environment")


def base_state(config: TrainConfig) -> BaseState | None:
    """The optimizer state that a new run continues; None if `model.base_optimizer` is `ignore`.

    Raises:
        ConfigError: the base model has none, or it is past the run's last step.
    """
    if config.model.base_optimizer == "ignore":
        return None
    state = open_base_state(Path(str(config.model.base)))
    if state.step >= config.trainer.max_steps:
        raise ConfigError(
            f"model.base_optimizer=continue: {config.model.base} is at step {state.step}, so nothing is left to train "
            f"with trainer.max_steps={config.trainer.max_steps}: raise it"
        )
    return state


def choose_checkpoint(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that `resume` asks for, verified.

    Raises:
        CheckpointError: a checkpoint is missing (or present) against `resume`, none is intact, or it belongs to other
            data.
        ConfigError: a setting must not change between two attempts.
    """
    found = None if config.resume == "never" else find_checkpoint(config.run_dir)
    if config.resume == "never" and checkpoint_folders(config.run_dir):
        raise CheckpointError(f"resume=never, but {config.run_dir} has checkpoints: choose another run.name")
    if config.resume == "must" and not found:
        raise CheckpointError(f"resume=must, but {config.run_dir} has no checkpoint")
    if config.resume not in ("auto", "must", "never") and not found:
        if not any((Path(config.resume) / name).exists() for name in (MANIFEST, STATE)):
            raise ConfigError(
                f"resume={config.resume}: not the folder of a checkpoint, as in runs/NAME/checkpoints/step-00000500, "
                "nor auto, must or never"
            )
        found = open_checkpoint(Path(config.resume))
    if found:
        changes(run_of(found.path), config, found.manifest.step)
        require_same_data(found, config)
        layout_changes(found, config)
    return found


def require_same_data(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Raise CheckpointError if the data would not continue where the checkpoint stopped."""
    now = data_identity(config, open_sources(config.data, "train"))
    if changed := identity_changes(checkpoint.manifest.data, now):
        raise CheckpointError(
            f"{checkpoint.path} was trained on other data or in another order: {'; '.join(changed)}. "
            "Restore these settings, or start a new run with another run.name"
        )


def layout_changes(checkpoint: Checkpoint, config: TrainConfig) -> list[str]:
    """Changed settings that the files of a checkpoint depend on: the run must be resharded if there are any.

    Raises:
        ConfigError: and the optimizer's state cannot be resharded.
    """
    then, now = checkpoint.manifest.layout, checkpoint_layout(config)
    changed = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
    if changed and {then.get("optim.name"), config.optim.name} != {"adamw"}:
        raise ConfigError(
            f"{checkpoint.path} was written in another layout: {'; '.join(changed)}. Only AdamW's state can be "
            "resharded; restore these settings"
        )
    return changed
