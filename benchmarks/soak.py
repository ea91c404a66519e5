"""Whether the memory of a data pipeline grows over hours: `make soak`.

    python benchmarks/soak.py [MINUTES] [SOURCE]    25 minutes, this Python's standard library

One rank with one loader process tokenises a corpus over and over. Every 10 s the resident memory of both is read. The
least-squares slopes, without the first fifth of the time, are printed in MB/h, as one JSON object.
"""

import json
import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from clippy_train.compose import compose
from clippy_train.config import WHITESPACE_TOKENS, CorpusConfig, TrainConfig
from clippy_train.corpus.build import build_corpus
from clippy_train.shards.sources import open_corpus
from clippy_train.tokenizer import add_whitespace_tokens, train_bpe
from clippy_train.train.callbacks.progress import fresh_cursors
from clippy_train.train.data import DataModule

PERIOD = 10.0  # seconds between two readings
WARM_UP = 0.2  # share of the time
STREAMS = 16


def soak(work: Path, minutes: float, source: str) -> dict[str, Any]:
    corpus = work / "corpus"
    build_corpus(CorpusConfig(src=[source], out=str(corpus), shard_bytes=500_000))
    config = compose(
        TrainConfig,
        [
            "experiment=demo",
            "trainer.devices=1",
            "data.num_workers=1",
            f"data.streams={STREAMS}",
            f"data.path={corpus}",
        ],
    )
    tokenizer = train_bpe(open_corpus(config.data, "train").texts(), vocab_size=4096, model_max_length=10**9)
    add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "longest")
    readings: list[tuple[float, int, int]] = []  # seconds, bytes of the rank, bytes of its loader process
    rank = psutil.Process(os.getpid())
    started = time.monotonic()
    tokens = 0
    for batch in DataModule(config, tokenizer, 0, fresh_cursors(STREAMS)).train_dataloader():
        tokens += batch["input_ids"].numel()
        seconds = time.monotonic() - started
        if seconds >= PERIOD * (len(readings) + 1):
            (loader,) = rank.children()
            readings.append((seconds, rank.memory_info().rss, loader.memory_info().rss))
        if seconds >= 60 * minutes:
            break
    settled = np.array([reading for reading in readings if reading[0] >= WARM_UP * 60 * minutes])
    hours, megabytes = settled[:, 0] / 3600, settled[:, 1:] / 1e6
    slopes = np.polyfit(hours, megabytes, 1)[0]
    return {
        "bench": "soak",
        "minutes": round(seconds / 60, 1),
        "epochs": int(batch["cursor"][:, 1].min()),
        "tokens": tokens,
        "readings": len(settled),
        "rank_mb": round(float(megabytes[-1, 0]), 1),
        "rank_mb_per_hour": round(float(slopes[0]), 2),
        "loader_mb": round(float(megabytes[-1, 1]), 1),
        "loader_mb_per_hour": round(float(slopes[1]), 2),
    }


def main(minutes: str = "25", source: str = sysconfig.get_path("stdlib")) -> None:
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(soak(Path(work), float(minutes), source)))


if __name__ == "__main__":
    main(*sys.argv[1:])
