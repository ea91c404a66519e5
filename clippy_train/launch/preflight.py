"""Before a run on several nodes: does every rank have a device, do the ranks reach each other, and how fast?

    python -m clippy_train.launch.preflight RUN_DIR

in one process per rank, started as a rank is. Costs the import of torch and an all-reduce.
"""

import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from clippy_train.config import TrainConfig, load
from clippy_train.errors import ClippyError, ConfigError, Interrupted, MachineFault, first_line
from clippy_train.report import say
from clippy_train.run.folder import CONFIG
from clippy_train.signals import SIGNALS

MEGABYTES = 64  # of the all-reduce


def check(config: TrainConfig) -> str:
    """Join all ranks, count their devices, and time an all-reduce; returns the result as a sentence. Collective.

    Raises:
        ConfigError: a node has too few devices.
        MachineFault: a rank does not come, or cannot be reached.
    """
    cuda = config.trainer.accelerator == "cuda"
    join_ranks("cpu:gloo,cuda:nccl" if cuda else "gloo", config.launcher.start_seconds)
    (nodes, devices), world = config.nodes_and_devices, config.world_size
    visible = torch.cuda.device_count() if cuda else devices
    seen: list[tuple[str, int]] = [("", 0)] * world
    dist.all_gather_object(seen, (socket.gethostname(), visible))
    short = sorted({f"{host} has {count}" for host, count in seen if count < devices})
    if short:
        raise ConfigError(
            f"trainer.devices={devices}, but too few CUDA devices are visible: {', '.join(short)}. Ask Slurm for "
            f"--gpus-per-node={devices}"
        )
    seconds = time_all_reduce(torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu"))
    rate = 2 * (world - 1) / world * MEGABYTES / 1e3 / seconds
    return (
        f"preflight: {nodes} nodes x {devices} {config.trainer.accelerator}, {'nccl' if cuda else 'gloo'}: all-reduce "
        f"of {MEGABYTES} MB in {1e3 * seconds:.1f} ms, {rate:.2f} GB/s in and out of each rank"
    )


def join_ranks(backend: str, seconds: int) -> None:
    """Join the process group; wait at most `seconds` for the slowest rank.

    Raises:
        MachineFault: not all ranks joined in time.
    """
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    except (dist.DistError, RuntimeError) as error:
        rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
        raise MachineFault(
            f"{socket.gethostname()}: rank {rank} has not met the others at {address}:{port} within "
            f"launcher.start_seconds={seconds} ({first_line(error)}). If no node was slow, name the network interface "
            "that the nodes share in launch/env.sh"
        ) from error


def time_all_reduce(device: torch.device) -> float:
    """Seconds of the second of two all-reduces; the first one opens the connections. Collective."""
    ranks = dist.get_world_size()
    for _ in range(2):
        values = torch.full((MEGABYTES * 250_000,), float(dist.get_rank() + 1), device=device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        reduced = values[-1].item()  # waits for the device
        seconds = time.perf_counter() - started
        assert reduced == ranks * (ranks + 1) / 2
    return seconds


def main(run_dir: str) -> int:
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(Interrupted.exit_code))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the agent blocked them during start-up
    leads = os.environ["RANK"] == "0"
    try:
        config = load(Path(run_dir) / CONFIG)
        if config.trainer.accelerator == "cuda" and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        result = check(config)
        if leads:
            say(result)
        dist.barrier()
    except ClippyError as error:
        if leads or not dist.is_initialized():
            print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except RuntimeError as error:  # torch's and its backends'
        lost = f"rank {os.environ['RANK']} on {socket.gethostname()}: lost the others or its device"
        print(f"preflight: {lost}: {first_line(error)}", file=sys.stderr, flush=True)
        return MachineFault.exit_code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
