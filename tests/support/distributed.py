"""Run collective code in tests: one function on several ranks, which are forked from this process."""

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch.distributed as dist

from clippy_train.launch.agent import free_port
from clippy_train.train import collective

T = TypeVar("T")


def run_distributed(function: Callable[[], T], world_size: int, timeout: float = 60) -> list[T]:
    """Return the results of `function` on `world_size` gloo ranks, in rank order. It may be a closure.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or did not return within `timeout` seconds.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        context.Process(target=_run, args=(function, rank, world_size, port, sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    for _, sender in pipes:
        sender.close()
    try:
        return [_result(receiver, rank, timeout) for rank, (receiver, _) in enumerate(pipes)]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _result(receiver: Connection, rank: int, timeout: float) -> Any:
    assert wait([receiver], timeout), f"rank {rank} did not return within {timeout} s"
    try:
        failed, value = receiver.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    assert not failed, f"rank {rank}: {value}"
    return value


def _run(function: Callable[[], Any], rank: int, world_size: int, port: int, sender: Connection) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}}
    gc.freeze()  # as ranks do
    collective._group.cache_clear()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may start loaders
    try:
        dist.init_process_group("gloo")
        sender.send((False, function()))
        dist.barrier()  # a rank that exits early would break the others' collectives
    except BaseException:
        sender.send((True, traceback.format_exc()))
    os._exit(0)
