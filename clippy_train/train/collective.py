"""Small values exchanged between ranks through host memory, so that the accelerator never waits for bookkeeping."""

from datetime import timedelta
from functools import cache
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(days=365)  # the watchdog ends a rank that waits too long


@cache
def _group() -> dist.ProcessGroup:
    """A gloo group beside the training group; all ranks create it together, on first use."""
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def total(values: np.ndarray) -> np.ndarray:
    """Element-wise sum over all ranks, in the type of `values`."""
    if alone():
        return values
    tensor = torch.from_numpy(values.copy())
    dist.all_reduce(tensor, group=_group())
    return tensor.numpy()


def gather(value: T) -> list[T]:
    """The value of every rank, in rank order."""
    if alone():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_group())
    return values


def anyone(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return bool(total(np.array([int(flag)]))[0])
