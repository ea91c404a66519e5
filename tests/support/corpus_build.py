"""A corpus build of many small tasks, which ends at a chosen moment as `kill -9` ends it.

    python corpus_build.py SRC OUT WORKERS [MOMENT]
    python corpus_build.py SRC OUT slurm PARTITION

MOMENT is a stage, whose first task is killed when its files are written but not yet its result; `move`, between two
shards on their way to OUT; or `clean`, when OUT is complete but the results are not yet removed.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from clippy_train import files
from clippy_train.config import CorpusConfig, CorpusSlurmConfig, DedupConfig
from clippy_train.corpus import build, tasks
from clippy_train.corpus.slurm import submit_corpus
from clippy_train.corpus.stages import Sizes

SMALL = Sizes(files=40, part=30_000, table=12_000, range=60_000)


def settings(src: Path, out: Path, workers: int = 1) -> CorpusConfig:
    dedup = DedupConfig(near=True, permutations=64, threshold=0.5)
    return CorpusConfig(src=[str(src)], out=str(out), dedup=dedup, shard_bytes=3000, workers=workers)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Have the process die at a moment."""
    moved: list[int] = []
    if moment == "clean":
        shutil.rmtree = die  # type: ignore[assignment]
    elif moment == "move":
        move = build._moved
        build._moved = lambda *file: moved.append(1) or (move(*file) if len(moved) < 4 else die())  # type: ignore
    else:
        setattr(tasks, "fsync", lambda path: die() if moment in path.parts else files.fsync(path))  # noqa: B010


if __name__ == "__main__":
    src, out, workers, *moments = sys.argv[1:]
    if workers == "slurm":
        submitted = settings(Path(src), Path(out))
        submitted.slurm = CorpusSlurmConfig(moments[0], tasks=3, hours=1, memory_gb=1)
        print(json.dumps(submit_corpus(submitted, SMALL)))
    else:
        for moment in moments:
            arm(moment)
        build.build_corpus(settings(Path(src), Path(out), int(workers)), SMALL)
