"""One rank's files of a checkpoint: copied to host memory while training waits, written and hashed while it goes on.

Promises: what is written is the state at the time of the copy. An error is reported at the end of a save, never raised
in the middle of it, where the other ranks would wait for this one. Costs as much host memory as the rank's state, which
is kept for the next save.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from clippy_train.run.checkpoint import flush_and_hash

T = TypeVar("T")


class Writer:
    """Takes the files of a save, then writes them.

    Args:
        asynchronous: copy what is taken and write it in a thread; otherwise write it as it is taken.
    """

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._snapshot = Snapshot()
        self._files: dict[Path, Any] = {}  # their content; None once they are written
        self._error: Exception | None = None

    def take(self, state_dict: Any, path: str | Path, storage_options: Any = None) -> None:
        """Take a file of the save under way. Strategies call this in place of `torch.save`."""
        if self.asynchronous:
            self._files[Path(path)] = self._snapshot.of(state_dict)
            return
        self._files[Path(path)] = None
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
            self._error = self._error or error

    def start(self, folder: Path) -> "Future[dict[str, list[Any]]]":
        """Write what was taken. The result: size and SHA-256 of each file, by its path in `folder`."""
        self._snapshot.wait()
        files, self._files = self._files, {}
        error, self._error = self._error, None

        def write() -> dict[str, list[Any]]:
            if error:
                raise error
            for path, state in files.items():
                if state is not None:
                    torch.save(state, path)
            return flush_and_hash(folder, files)

        return self.submit(write)

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Other work for the save under way, in the same thread."""
        future = self._thread.submit(work)
        if not self.asynchronous:
            future.exception()  # waits
        return future


class Snapshot:
    """Copies of states in host memory. The memory of one is reused by the next that has tensors of the same shapes."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._used: dict[tuple[Any, ...], Tensor] = {}  # copies of this snapshot, by what they are copies of

    def of(self, state: Any) -> Any:
        """A copy of nested dictionaries, lists and tuples whose tensors are in host memory. Anything else is shared."""
        if isinstance(state, Tensor):
            return self._copied(state.detach())
        if isinstance(state, dict):
            copied = copy.copy(state)  # keeps its type and attributes
            for key, value in state.items():
                copied[key] = self.of(value)
            return copied
        if isinstance(state, list):
            return [self.of(each) for each in state]
        if type(state) is tuple:
            return tuple(self.of(each) for each in state)
        return state

    def wait(self) -> None:
        """Until all copies are complete; the memory is free for the next snapshot once this one is written."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        for each in self._used.values():
            self._memory[each.shape, each.dtype].append(each)
        self._used = {}

    def _copied(self, tensor: Tensor) -> Tensor:
        """Tied tensors stay tied."""
        source = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if source not in self._used or not tensor.numel():
            free = self._memory[tensor.shape, tensor.dtype]
            target = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._used[source] = target.copy_(tensor, non_blocking=True)
        return self._used[source]
