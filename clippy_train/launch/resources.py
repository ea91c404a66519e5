"""What Slurm, torchrun or this machine offers to a run, and whether a configuration fits it.

All of it comes from the environment variables that those set; torch is asked only where Slurm has counted no GPUs.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omegaconf import DictConfig

from clippy_train.config import TrainConfig
from clippy_train.errors import ConfigError

JOB = "SLURM_JOB_ID"
SLURM_COMMANDS = ("srun", "scontrol")
TORCHRUN = "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True)
class Offer:
    """What a launcher offers to a run.

    Attributes:
        launcher: `local`, `slurm` or `torchrun`.
        nodes: number of nodes; 0 for launcher=slurm outside a job.
        processes: per node: torchrun's processes, a Slurm job's tasks (None if the job names none).
        gpus: per node, if Slurm counts them.
    """

    launcher: str
    nodes: int = 1
    processes: int | None = None
    gpus: int | None = None


def offer(launcher: str, variables: Mapping[str, str]) -> Offer:
    """What `launcher` offers to a process with these environment variables."""
    if launcher == "auto":
        launcher = "torchrun" if TORCHRUN in variables else "slurm" if JOB in variables else "local"
    if launcher == "slurm":
        tasks, gpus = variables.get("SLURM_NTASKS_PER_NODE"), variables.get("SLURM_GPUS_ON_NODE")
        return Offer(
            launcher,
            nodes=int(variables.get("SLURM_JOB_NUM_NODES", 0)),
            processes=int(tasks) if tasks else None,
            gpus=int(gpus) if gpus else None,
        )
    if launcher == "torchrun":
        each = int(variables.get("LOCAL_WORLD_SIZE", 1))
        return Offer(launcher, nodes=int(variables.get("WORLD_SIZE", 0)) // each, processes=each)
    return Offer(launcher)


def fill_in(composed: DictConfig) -> None:
    """Fill in what the configuration leaves to the launcher: accelerator, devices, nodes."""
    trainer, offered = composed.trainer, offer(composed.launcher.name, os.environ)
    composed.launcher.name = offered.launcher
    if trainer.accelerator == "auto":
        trainer.accelerator = "cuda" if gpus(offered) else "cpu"
    if trainer.devices is None:
        on_cuda = gpus(offered) if trainer.accelerator == "cuda" and offered.launcher != "torchrun" else 0
        trainer.devices = on_cuda or offered.processes or 1
    if trainer.num_nodes is None:
        trainer.num_nodes = offered.nodes or 1


def resource_problems(config: TrainConfig) -> Iterator[ConfigError]:
    """Why the configuration cannot run where this command runs."""
    offered, (nodes, devices) = offer(config.launcher.name, os.environ), config.nodes_and_devices
    if offered.launcher == "local" and nodes > 1:
        yield ConfigError(
            f"trainer.num_nodes={nodes}: launcher=local starts ranks on this machine only. Submit "
            "launch/train.sbatch to Slurm, run launch/torchrun.sh on every node, or set trainer.num_nodes=1"
        )
    elif offered.nodes == 0:
        yield ConfigError(
            f"launcher={offered.launcher}, but this command does not run under it: use launch/"
            f"{'train.sbatch' if offered.launcher == 'slurm' else 'torchrun.sh'}, or launcher=local"
        )
    elif offered.nodes != nodes:
        yield ConfigError(
            f"trainer.num_nodes={nodes}, but {offered.launcher} has {offered.nodes} nodes for this run: ask for "
            f"--nodes={nodes} there, or leave trainer.num_nodes out"
        )
    elif "SLURM_HET_SIZE" in os.environ:
        yield ConfigError(
            "a heterogeneous job (`:` or #SBATCH hetjob) has nodes of several kinds, and a run needs the same number "
            "of devices on each: ask for nodes of one kind"
        )
    elif _started_by_srun():
        yield ConfigError(
            "srun started this command more than once: run it once, without srun; it starts the ranks of all nodes"
        )
    elif offered.launcher == "slurm" and (missing := [name for name in SLURM_COMMANDS if not shutil.which(name)]):
        yield ConfigError(
            f"launcher=slurm needs {' and '.join(missing)} on the PATH, which a container may hide: make Slurm's "
            "commands, its configuration and munge's socket visible in it, or start the run with launch/torchrun.sh on "
            "every node"
        )
    if offered.processes not in (None, 1, devices) or (offered.launcher == "torchrun" and offered.processes != devices):
        yield ConfigError(
            f"trainer.devices={devices}, but {offered.launcher} has {offered.processes} processes per node: ask "
            "for as many, or leave trainer.devices out"
        )
    if config.trainer.accelerator == "cuda" and offered.nodes and gpus(offered) < devices:
        yield ConfigError(
            f"trainer.accelerator=cuda with trainer.devices={devices}: this machine has {gpus(offered)} visible CUDA "
            "devices; set trainer.devices to that (in a Slurm job, ask for more with --gpus-per-node), or "
            "trainer.accelerator=cpu"
        )


def gpus(offered: Offer) -> int:
    """CUDA devices per node."""
    return _visible_gpus() if offered.gpus is None else offered.gpus


@cache
def _visible_gpus() -> int:
    if not (shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()):
        return 0  # saves the seconds that importing torch takes
    import torch

    return torch.cuda.device_count()


def _started_by_srun() -> bool:
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
