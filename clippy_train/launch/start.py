"""Start a run: check what it needs, fix its folder, freeze its configuration, choose its checkpoint, start its ranks.

All of that happens once, in one process, before any rank trains; ranks read the frozen file. Who starts them follows
from `launcher`: `launch.agent` on this machine, `launch.slurm` on the nodes of a job, or torchrun, which already has.
"""

import fcntl
import json
import os
import platform
import shutil
import socket
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clippy_train import __version__
from clippy_train.config import SHAPE, TrainConfig, load, save
from clippy_train.errors import CheckpointError, ConfigError, DataError
from clippy_train.launch import slurm, torchrun
from clippy_train.launch.agent import (
    here,
    interrupt,
    run_ranks,
)
from clippy_train.launch.resources import misfits
from clippy_train.run.checkpoint import (
    Checkpoint,
    checkpoint_layout,
    find_checkpoint,
    open_checkpoint,
)
from clippy_train.run.folder import CONFIG, ENVIRONMENT, HF_FOLDER, LOCK, STACKS, checkpoint_folders, run_of
from clippy_train.run.identity import data_identity
from clippy_train.run.moments import BaseState, open_base_state
from clippy_train.shards.sources import open_corpus, require_text
from clippy_train.signals import handling_signals

UNWRITABLE = "run.root: the run's folder cannot be written: {}"
PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "deepspeed", "hydra-core", "numpy", "zstandard")


def train(config: TrainConfig) -> int:
    """Run a training to its end, or continue it; return the exit code.

    Raises:
        ConfigError, DataError, CheckpointError, Interrupted: before any rank starts.
    """
    with handling_signals(interrupt):
        if config.launcher.name == "torchrun":
            return torchrun.run_rank(config, prepare)
        arguments = prepare(config)
        if isinstance(arguments, int):
            return arguments
        if config.launcher.name == "slurm":
            return slurm.run_nodes(config, arguments)
        return run_ranks(config, here(), arguments)


def prepare(config: TrainConfig) -> list[str] | int:
    """Do all that is done once for a run; what its ranks are told beside its folder, or the exit code where it is done.

    Raises:
        ConfigError, DataError, CheckpointError: the run cannot start.
    """
    blocked = obstacles(config)
    if blocked:
        raise blocked[0] if len(blocked) == 1 else type(blocked[0])("\n".join(map(str, blocked)))
    new = not config.run_dir.exists()
    claim(config.run_dir, f"run.name={config.run.name}", slurm.life() if config.launcher.name == "slurm" else "")
    try:
        checkpoint = choose_checkpoint(config)
    except CheckpointError:
        if new:
            shutil.rmtree(config.run_dir)
        raise
    if checkpoint and checkpoint.manifest.step >= config.trainer.max_steps:
        print(f"{config.run_dir}: finished, step {checkpoint.manifest.step} of {config.trainer.max_steps}")
        return 0
    prepare_run_folder(config)
    base, whole = None if checkpoint else base_state(config), None
    if checkpoint:
        print(f"resuming {config.run_dir} from step {checkpoint.manifest.step} ({checkpoint.path})", flush=True)
        changed = relaid(checkpoint, config)
        if changed:
            from clippy_train.run.consolidate import consolidate

            print(f"laying its state out anew: {'; '.join(changed)}", flush=True)
            whole = consolidate(checkpoint, run_of(checkpoint.path) / HF_FOLDER, config.run_dir)
    elif base:
        print(
            f"starting {config.run_dir} at step {base.step} with the moments in {base.path}; "
            "where in its data the base stopped is not recorded, so data start at the beginning",
            flush=True,
        )
    else:
        print(f"starting {config.run_dir}", flush=True)
    return [str(path) for path in (checkpoint and checkpoint.path, whole) if path]


def obstacles(config: TrainConfig) -> list[ConfigError | DataError]:
    """What this machine lacks for the run: devices, corpus, base model. Reads listings and first lines only."""
    found: list[ConfigError | DataError] = list(misfits(config))
    for split in ("train", "validation"):
        try:
            require_text(open_corpus(config.data, split))
        except DataError as error:
            found.append(error)
            break
    for key, name in (("model.base", config.model.base), ("tokenizer.base", config.tokenizer.base)):
        if name and looks_local(name) and not Path(name).is_dir():
            found.append(ConfigError(f"{key}={name}: no such folder"))
    try:
        base_state(config)
    except ConfigError as error:
        found.append(error)
    if config.logger.wandb and find_spec("wandb") is None:
        found.append(ConfigError("logger.wandb=true: wandb is not installed; pip install 'clippy_train[wandb]'"))
    elif config.logger.wandb and not ({"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys()):
        found.append(ConfigError("logger.wandb=true: set WANDB_API_KEY, or WANDB_MODE=offline, in the environment"))
    if not (config.model.base or config.tokenizer.base):
        found.append(ConfigError("tokenizer.base: needed when model.base=null (folder or hub name of a tokenizer)"))
    return found


def base_state(config: TrainConfig) -> BaseState | None:
    """The state that a new run goes on from, or None where `model.base_optimizer` is `ignore`.

    Raises:
        ConfigError: there is none beside the base model, or it is past the run's last step.
    """
    if config.model.base_optimizer == "ignore":
        return None
    state = open_base_state(Path(str(config.model.base)))
    if state.step >= config.trainer.max_steps:
        raise ConfigError(
            f"model.base_optimizer=continue: {config.model.base} has made {state.step} steps, so there is nothing left "
            f"to do with trainer.max_steps={config.trainer.max_steps}: raise it"
        )
    return state


def looks_local(name: str) -> bool:
    """A hub name is NAME or ORGANISATION/NAME; anything else is a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def choose_checkpoint(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that `resume` asks for, verified.

    Raises:
        CheckpointError: there is none where one must be (or the reverse), none is intact, or it belongs to another
            model, to other data or to another optimizer.
    """
    found = None if config.resume == "never" else find_checkpoint(config.run_dir)
    if config.resume == "never" and checkpoint_folders(config.run_dir):
        raise CheckpointError(f"resume=never, but {config.run_dir} has checkpoints: choose another run.name")
    if config.resume == "must" and not found:
        raise CheckpointError(f"resume=must, but {config.run_dir} has no checkpoint")
    if config.resume not in ("auto", "must", "never") and not found:
        found = open_checkpoint(Path(config.resume))
    if found:
        require_same_model(found, config)
        require_same_data(found, config)
        relaid(found, config)
    return found


def require_same_model(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Raises CheckpointError if the run that wrote the checkpoint trained a model of another shape."""
    recorded = run_of(checkpoint.path) / CONFIG
    then = load(recorded).model if recorded.exists() else config.model
    changed = [
        f"model.{name} was {getattr(then, name)}, is {getattr(config.model, name)}"
        for name in SHAPE
        if getattr(then, name) != getattr(config.model, name)
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint.path} is of another model: {'; '.join(changed)}. Restore these settings, or start a new run "
            "with another run.name"
        )


def require_same_data(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Raises CheckpointError if the data would not continue where the checkpoint stopped."""
    now = data_identity(config, open_corpus(config.data, "train").fingerprint)
    then = checkpoint.manifest.data
    changed = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        raise CheckpointError(
            f"{checkpoint.path} was trained on other data or in another order: {'; '.join(changed)}. "
            "Restore these settings, or start a new run with another run.name"
        )


def relaid(checkpoint: Checkpoint, config: TrainConfig) -> list[str]:
    """What changed since the checkpoint was written that its own files depend on.

    Raises:
        CheckpointError: and the optimizer's state cannot be carried over.
    """
    then, now = checkpoint.manifest.layout, checkpoint_layout(config)
    changed = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
    if changed and {then.get("optim.name"), config.optim.name} != {"adamw"}:
        raise CheckpointError(
            f"{checkpoint.path} was written in another layout: {'; '.join(changed)}. Only AdamW's state can be laid "
            "out anew; restore these settings"
        )
    return changed


def prepare_run_folder(config: TrainConfig) -> None:
    try:
        shutil.rmtree(config.run_dir / STACKS, ignore_errors=True)  # those that an earlier life left end this one
        save(config, config.run_dir / CONFIG)
        (config.run_dir / ENVIRONMENT).write_text(json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(UNWRITABLE.format(error)) from error


def claim(folder: Path, setting: str, life: str = "") -> None:
    """Make the folder of a run, and keep every other command out of it until this process has ended, however it ends.

    The system's lock on a file lets go by itself, and stays with a process of torchrun's when that becomes rank 0. Of a
    Slurm job Slurm knows whether it lives: a lock that a dead node left on a shared file system keeps nobody out.

    Args:
        setting: the key and value that lead to this folder.
        life: this one of a Slurm job's (`slurm.life`).

    Raises:
        ConfigError: another command trains there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(UNWRITABLE.format(error)) from error
    who = os.read(holder, 1000).decode() or "another command"
    if not _locked(holder) and not slurm.has_ended(who):
        os.close(holder)
        raise ConfigError(f"{setting}: {who} trains in {folder}; wait for it, or choose another run.name")
    os.truncate(holder, 0)
    os.pwrite(holder, (life or f"process {os.getpid()} on {socket.gethostname()}").encode(), 0)
    os.set_inheritable(holder, True)


def _locked(file: int) -> bool:
    """Whether the lock on a file is ours now; as good as ours where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, for the record."""
    return {
        "clippy_train": __version__,
        "commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "gpus": _gpu_names(),
    }


def _git_commit() -> str | None:
    """The commit of the source tree that this package runs from, or None when it is installed."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _gpu_names() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return listed.stdout.splitlines() if listed.returncode == 0 else []
