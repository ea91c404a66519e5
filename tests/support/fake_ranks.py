"""One rank of any number, in a process forked from this one: the other ranks exist only in its process group.

The group answers every collective as if all ranks sent what this one sends, and records it. Lightning, DeepSpeed and
our own code run as they do on a cluster; the numbers that come from other ranks are copies of this rank's.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import deepspeed.runtime.zero.partitioned_param_coordinator as zero3
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.distributed.optim import zero_redundancy_optimizer
from torch.futures import Future

from clippy_train.train import collective
from support.distributed import run_distributed

T = TypeVar("T")
BACKEND = "fake-ranks"
RANKS_OF_A_NODE = 8


class Call(NamedTuple):
    """A collective; its bytes are those of the whole tensor, which is the larger one where input and output differ."""

    name: str
    dtype: torch.dtype
    num_bytes: int


class FakeGroup(dist.ProcessGroup):
    """A rank's end of a process group without other ranks.

    Attributes:
        calls: what was sent through all of them but the one that our bookkeeping uses, which has its own.
    """

    calls: list[Call] = []  # noqa: RUF012 # shared: DeepSpeed makes groups of its own

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)  # type: ignore[call-arg]
        self._world_size = world_size

    def size(self) -> int:
        return self._world_size

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        self._record("all_reduce", tensors)
        if opts is not None and opts.reduceOp == dist.ReduceOp.SUM:
            for each in tensors:
                each.mul_(self._world_size)
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        self._record("broadcast", tensors)
        return _done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        self._record("all_gather", outputs[0])
        for each in outputs[0]:
            each.copy_(inputs[0])
        return _done(outputs)

    def all_gather_single(self, output: Tensor, part: Tensor, opts: Any = None) -> Any:
        self._record("all_gather", [output])
        # A rank whose part is padding alone holds uninitialised memory, which would be everybody's weights here
        output.view(self._world_size, -1).copy_(part.nan_to_num().clamp(-1, 1).view(1, -1))
        return _done(output)

    def reduce_scatter_single(self, part: Tensor, whole: Tensor, opts: Any = None) -> Any:
        self._record("reduce_scatter", [whole])
        part.copy_(whole.view(self._world_size, -1)[self.rank()].view_as(part) * self._world_size)
        return _done(part)

    def barrier(self, opts: Any = None) -> Any:
        return _done([])

    def _record(self, name: str, tensors: list[Tensor]) -> None:
        num_bytes = sum(each.numel() * each.element_size() for each in tensors)
        self.calls.append(Call(name, tensors[0].dtype, num_bytes))

    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single  # type: ignore[assignment]


def run_as(function: Callable[[FakeGroup], T], rank: int, world_size: int, timeout: float = 60) -> T:
    """What `function` returns in a process that is `rank` of `world_size`. It gets the training group."""

    def as_rank() -> T:
        dist.destroy_process_group()
        return function(join(rank, world_size))

    (result,) = run_distributed(as_rank, 1, timeout)
    return result


def join(rank: int, world_size: int) -> FakeGroup:
    """Make this process that rank, for good."""
    places = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % RANKS_OF_A_NODE}
    os.environ |= {name: str(value) for name, value in places.items()}
    dist.init_process_group(BACKEND, rank=rank, world_size=world_size, store=dist.HashStore())  # type: ignore[attr-defined]
    bookkeeping = dist.new_group(backend=BACKEND)
    bookkeeping.calls = []
    collective._group = lambda: bookkeeping  # type: ignore[assignment]  # gloo, which would wait for the others
    # What other ranks would send: objects, of which this rank keeps its own; and DeepSpeed's check of their modules
    zero_redundancy_optimizer._broadcast_object = lambda own, *args, **kwargs: own  # type: ignore[attr-defined]
    dist.broadcast_object_list = lambda *args, **kwargs: None
    zero3.assert_ints_same_as_other_ranks = lambda ints: None
    group = dist.group.WORLD
    assert isinstance(group, FakeGroup)
    return group


def _create(store: Any, rank: int, world_size: int, timeout: timedelta) -> FakeGroup:
    return FakeGroup(rank, world_size)


def _done(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    return _create_work_from_future(future)


dist.Backend.register_backend(BACKEND, _create, devices=["cpu"])
