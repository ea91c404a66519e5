"""Faults in ranks: `forks` calls `inject` in each, whose variable CLIPPY_FAULT names faults: NAME:NUMBER:NUMBER,...

What they did is in the file CLIPPY_FAULT_LOG, a JSON object in each line.
"""

import errno
import io
import json
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clippy_train.run.checkpoint import find_checkpoint
from clippy_train.train.callbacks import checkpointer as saving
from clippy_train.train.callbacks.health import require_equal_replicas
from clippy_train.train.module import CodeLM

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO)
SMALL_FILE = 512  # bytes: the kernel refuses writes beyond them
OPERATIONS_OF_RANK_ONE = 4  # in a save: write and flush its optimizer state, write and flush its random state


def nan(rank: int, micro_step: int) -> None:
    """Make the loss of one micro-batch (counted from 1 in this attempt) NaN."""
    calls, original = 0, CodeLM.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal calls
        calls += 1
        loss = original(self, batch, batch_idx)
        if calls != micro_step or rank != own_rank():
            return loss
        record({"spans": batch["spans"].tolist(), "step": self.trainer.global_step + 1})
        self.step.losses[-1] = self.step.losses[-1] * float("nan")
        return loss * float("nan")

    CodeLM.training_step = training_step  # type: ignore[method-assign]  # the fault


def oom(rank: int, micro_step: int) -> None:
    """Run out of memory on one micro-batch (counted from 1 in this attempt) of one rank."""
    calls, original = 0, CodeLM.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == micro_step and rank == own_rank():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice.")
        return original(self, batch, batch_idx)

    CodeLM.training_step = training_step  # type: ignore[method-assign]  # the fault


def diverge(rank: int, at: int) -> None:
    """Change one weight of one rank after step `at`."""

    def changed(module: CodeLM, step: int) -> None:
        if step == at and rank == own_rank():
            next(module.model.parameters()).data.view(-1)[0] += 1
        require_equal_replicas(module, step)

    saving.require_equal_replicas = changed  # type: ignore[attr-defined]  # replaces its import


@dataclass
class Save:
    """Progress of the `disk` fault."""

    number: int = 0
    done: int = 0  # disk operations of this save
    fails_at: int = 0  # the operation that fails; 0: none
    failed: str = ""  # its name
    before: int | None = None  # step of the newest checkpoint before this save


def disk(last_save: int) -> None:
    """Fail every second save, and all after `last_save`.

    Each failing save fails one disk operation later than the one before: first those of rank 1, then those of rank 0.
    """
    save = Save()

    def broken(
        name: str, original: Callable[..., Any], matters: Callable[..., bool] = lambda *_: True
    ) -> Callable[..., Any]:
        def operation(*arguments: Any, **keywords: Any) -> Any:
            if not matters(*arguments):
                return original(*arguments, **keywords)
            save.done += 1
            if save.done != save.fails_at:
                return original(*arguments, **keywords)
            save.failed = name
            if name == "torch.save":
                return limited(original, *arguments, **keywords)
            code = ERRORS[save.done % len(ERRORS)]
            raise OSError(code, os.strerror(code))

        return operation

    os.mkdir = broken("mkdir", os.mkdir, lambda path, *_: not os.path.exists(path))  # noqa: PTH110
    os.rename, os.fsync = broken("rename", os.rename), broken("fsync", os.fsync)
    torch.save = broken("torch.save", torch.save)
    io.open = broken("open", io.open, lambda path, mode="r", *_: "w" in mode and ".writing" in str(path))
    original_start, original_fail = saving.Checkpointer._start, saving.Checkpointer._fail

    def start(self: Any, trainer: Any, called: float, last: bool) -> None:
        save.number += 1
        turn = save.number // 2 if save.number % 2 == 0 else 0
        turn = turn - OPERATIONS_OF_RANK_ONE if own_rank() == 0 else turn
        save.fails_at = 1 if save.number > last_save and own_rank() == 0 else turn
        save.done, save.failed, save.before = 0, "", newest(self)
        original_start(self, trainer, called, last)

    def fail(self: Any, trainer: Any, step: int, staging: Path, failures: list[str], last: bool) -> None:
        save.fails_at = 0
        if save.failed:
            seen = [save.before, newest(self)]
            record({"operation": save.failed, "step": step, "failures": failures, "newest": seen})
        original_fail(self, trainer, step, staging, failures, last)

    def newest(self: Any) -> int | None:
        found = find_checkpoint(self.config.run_dir)
        return found.manifest.step if found else None

    saving.Checkpointer._start, saving.Checkpointer._fail = start, fail  # type: ignore[method-assign]  # the fault


def limited(work: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call `work` while no file may grow beyond SMALL_FILE."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, before[1]))
    try:
        return work(*arguments, **keywords)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def record(row: dict[str, Any]) -> None:
    with Path(os.environ["CLIPPY_FAULT_LOG"]).open("a") as file:
        file.write(json.dumps({"rank": own_rank(), **row}) + "\n")


def own_rank() -> int:
    return int(os.environ["RANK"])


FAULTS: dict[str, Callable[..., None]] = {"nan": nan, "oom": oom, "diverge": diverge, "disk": disk}


def inject() -> None:
    for each in filter(None, os.environ.get("CLIPPY_FAULT", "").split(",")):
        name, *numbers = each.split(":")
        FAULTS[name](*map(int, numbers))
