"""Tasks of a stage, in this process or in several: each is done once, and its result is a folder, complete or absent.

Promises: a task whose result exists is not repeated; no worker outlives its command, however that ends; a worker that
is killed ends the command with a message (datatrove's local executor waits for it forever). Starting a worker costs a
second, a task in one a millisecond.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from tqdm import tqdm

from clippy_train.corpus.stages import STAGES, Build, Stage
from clippy_train.errors import Interrupted
from clippy_train.files import fsync, new_folder


class Workers:
    """Processes that start when there is work for more than one of them, and end with the block."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        self._others = set(multiprocessing.active_children())
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool:
            if kind:
                for worker in set(multiprocessing.active_children()) - self._others:
                    worker.kill()
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[int], Any], tasks: list[int]) -> Iterable[Any]:
        """Call `function` for every task, in any order.

        Raises:
            Interrupted: a worker was killed.
        """
        if self.number == 1 or len(tasks) < 2:
            yield from map(function, tasks)
            return
        if not self._pool:
            context = multiprocessing.get_context("forkserver")
            self._pool = ProcessPoolExecutor(self.number, context, initializer=_begin)
        try:
            yield from self._pool.map(function, tasks)
        except BrokenProcessPool:
            raise Interrupted(
                "a worker was killed; if memory ran out, use fewer workers. The same command continues from there"
            ) from None


def perform_stage(build: Build, stage: Stage, workers: Workers) -> None:
    """Perform the tasks of a stage that have no result yet."""
    todo = list(unfinished(build, stage))
    done = workers.map(partial(perform, build, stage.name), todo)
    for _ in tqdm(done, stage.name, len(todo), unit=" tasks", leave=False, disable=None):
        pass


def unfinished(build: Build, stage: Stage, first: int = 0, step: int = 1) -> Iterator[int]:
    """Every `step`-th task of a stage, from `first` on, that has no result."""
    return (task for task in range(first, stage.tasks(build), step) if not build.result(stage.name, task).exists())


def perform(build: Build, name: str, task: int) -> None:
    """Perform a task; its files are on the disk when its result appears."""
    stage = next(stage for stage in STAGES if stage.name == name)
    result = build.result(name, task)
    try:
        with new_folder(result, "out") as folder:
            stage.perform(build, task, folder)
            for path in folder.rglob("*"):
                fsync(path)
    except OSError:
        if not result.exists():  # or else another node was faster
            raise


def _begin() -> None:
    """Leave Ctrl-C to the command, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
