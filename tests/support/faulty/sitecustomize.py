"""Breaks ranks from inside, for tests: Python runs this at its start when this folder is on PYTHONPATH.

CLIPPY_FAULT holds faults as NAME:NUMBER:NUMBER, separated by commas. Processes that are not ranks are left alone.
"""

import errno
import io
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO)
SMALL_FILE = 512  # bytes: where the kernel stops a file that torch writes
OPERATIONS_OF_RANK_ONE = 4  # in a save: to write and to flush its part of the optimizer and its random state


def nan(rank: int, micro_step: int) -> None:
    """The loss of one micro-batch (counted from 1 in this attempt) is not a number."""
    from clippy_train.train.module import CodeLM

    calls, original = 0, CodeLM.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal calls
        calls += 1
        loss = original(self, batch, batch_idx)
        if calls != micro_step or rank != RANK:
            return loss
        record({"spans": batch["spans"].tolist(), "step": self.trainer.global_step + 1})
        self.step.losses[-1] = self.step.losses[-1] * float("nan")
        return loss * float("nan")

    CodeLM.training_step = training_step  # type: ignore[method-assign]


def oom(rank: int, micro_step: int) -> None:
    """One rank has no memory for a micro-batch (counted from 1 in this attempt)."""
    import torch

    from clippy_train.train.module import CodeLM

    calls, original = 0, CodeLM.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == micro_step and rank == RANK:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice.")
        return original(self, batch, batch_idx)

    CodeLM.training_step = training_step  # type: ignore[method-assign]


def diverge(rank: int, step: int) -> None:
    """One bit of one weight of one rank changes after a step."""
    from clippy_train.train.callbacks import checkpointer as saving

    original = saving.require_equal_replicas

    def require_equal_replicas(module: Any, now: int) -> None:
        if now == step and rank == RANK:
            next(module.model.parameters()).data.view(-1)[0] += 1
        original(module, now)

    saving.require_equal_replicas = require_equal_replicas


def disk(last_save: int) -> None:
    """Every second save fails, first on rank 1, then on rank 0, each time one operation on; after `last_save` all."""
    import torch

    from clippy_train.run.checkpoint import find_checkpoint
    from clippy_train.train.callbacks import checkpointer as saving

    state = {"save": 0, "done": 0, "fails_at": 0, "failed": ""}

    def broken(name: str, original: Callable, matters: Callable = lambda *_: True) -> Callable:
        def operation(*arguments: Any, **keywords: Any) -> Any:
            if not matters(*arguments):
                return original(*arguments, **keywords)
            state["done"] += 1
            if state["done"] != state["fails_at"]:
                return original(*arguments, **keywords)
            state["failed"] = name
            if name == "torch.save":
                return limited(original, *arguments, **keywords)
            code = ERRORS[state["done"] % len(ERRORS)]
            raise OSError(code, os.strerror(code))

        return operation

    os.mkdir = broken("mkdir", os.mkdir, lambda path, *_: not os.path.exists(path))  # noqa: PTH110
    os.rename, os.fsync = broken("rename", os.rename), broken("fsync", os.fsync)
    torch.save = broken("torch.save", torch.save)
    io.open = broken("open", io.open, lambda path, mode="r", *_: "w" in mode and ".writing" in str(path))
    original_start, original_fail = saving.Checkpointer._start, saving.Checkpointer._fail

    def start(self: Any, trainer: Any, called: float, last: bool) -> None:
        state["save"] += 1
        turn = state["save"] // 2 if state["save"] % 2 == 0 else 0
        turn = turn - OPERATIONS_OF_RANK_ONE if RANK == 0 else turn
        state.update(done=0, fails_at=1 if state["save"] > last_save and RANK == 0 else turn, failed="")
        state["before"] = newest(self)
        original_start(self, trainer, called, last)

    def fail(self: Any, trainer: Any, step: int, staging: Path, failures: list[str], last: bool) -> None:
        state["fails_at"] = 0
        if state["failed"]:
            seen = [state["before"], newest(self)]
            record({"operation": state["failed"], "step": step, "failures": failures, "newest": seen})
        original_fail(self, trainer, step, staging, failures, last)

    def newest(self: Any) -> int | None:
        found = find_checkpoint(self.config.run_dir)
        return found and found.manifest.step

    saving.Checkpointer._start, saving.Checkpointer._fail = start, fail  # type: ignore[method-assign]


def limited(work: Callable, *arguments: Any, **keywords: Any) -> Any:
    """Do work while the kernel refuses to let a file grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, before[1]))
    try:
        return work(*arguments, **keywords)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def record(row: dict[str, Any]) -> None:
    with Path(os.environ["CLIPPY_FAULT_LOG"]).open("a") as file:
        file.write(json.dumps({"rank": RANK, **row}) + "\n")


RANK = int(os.environ.get("RANK", "-1"))
if RANK >= 0:
    for fault in os.environ["CLIPPY_FAULT"].split(","):
        function, *numbers = fault.split(":")
        globals()[function](*map(int, numbers))
