"""What a checkpoint costs at GPT-Neo-125M's shape: `make bench-checkpoint`, minutes, 8 GB of memory and of disk.

    python benchmarks/checkpoint.py [STRATEGY...]       zero1 and zero3 by default, on two ranks

For each strategy a run saves four times; the same command then resumes for one more step. Prints one JSON object per
strategy; seconds are medians:

    bytes, files          of one checkpoint
    stall_seconds         training stops for a save; first_stall_seconds: the first one, which allocates memory
    save_seconds          from the start of a save until the checkpoint is complete
    step_seconds          of a step; during_save_seconds: of the step after a save has begun, while it is written
    write_seconds         to write and flush as many bytes to the same disk
    hash_seconds          to read the files back and hash them, on one core
    verify_seconds        the launcher's check of a checkpoint before ranks start
    fresh_seconds, resumed_seconds      from the command to the first step
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clippy_train.config import WHITESPACE_TOKENS, CorpusConfig, DataConfig
from clippy_train.corpus.build import build_corpus
from clippy_train.run.checkpoint import (
    hash_file,
    open_checkpoint,
)
from clippy_train.run.folder import METRICS, checkpoint_folders
from clippy_train.run.rows import read_rows
from clippy_train.shards.sources import open_corpus
from clippy_train.tokenizer import add_whitespace_tokens, train_bpe

VOCAB_SIZE = 50257  # of GPT-2, before the whitespace tokens
SAVES = 4
EVERY = 4  # steps, so that a save is complete before the next one
SHAPE = [
    "experiment=code_clippy_125m", "model.base=null", "trainer.accelerator=cpu", "trainer.devices=2",
    "trainer.global_batch_size=2", "trainer.micro_batch_size=1", "trainer.eval_micro_batch_size=1",
    "trainer.val_samples=2", "trainer.val_every_steps=1000", "trainer.log_every_steps=1",
    f"checkpoint.every_steps={EVERY}", "data.seq_len=64", "data.streams=2",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategies", nargs="*", default=["zero1", "zero3"])
    with tempfile.TemporaryDirectory() as work:
        settings = [*SHAPE, *prepare(Path(work))]
        for strategy in parser.parse_args().strategies:
            print(json.dumps({"strategy": strategy, **measure(Path(work), strategy, settings)}), flush=True)


def prepare(work: Path) -> list[str]:
    """A small corpus, and a tokenizer with as many tokens as the model's."""
    build_corpus(CorpusConfig(src=[str(Path(json.__file__).parent)], out=str(work / "corpus")))
    tokenizer = train_bpe(open_corpus(DataConfig(path=str(work / "corpus")), "train").texts(), 1024, 10**9)
    tokenizer.add_tokens([f"<unused-{number}>" for number in range(VOCAB_SIZE - len(tokenizer))])
    add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "longest")
    tokenizer.save_pretrained(work / "tokenizer")
    return [f"data.path={work / 'corpus'}", f"tokenizer.base={work / 'tokenizer'}"]


def measure(work: Path, strategy: str, settings: list[str]) -> dict[str, Any]:
    command = ["train", *settings, f"strategy={strategy}", f"run.name={strategy}"]
    run_dir = work / "runs" / strategy
    fresh = seconds_to_step(work, run_dir, 1, [*command, f"trainer.max_steps={SAVES * EVERY}"])
    saves = list(read_rows(run_dir / METRICS, "checkpoint/stall"))
    seconds = {row["step"]: row["throughput/step_time"] for row in read_rows(run_dir / METRICS, "throughput/step_time")}
    newest = checkpoint_folders(run_dir)[0]
    files = [path for path in newest.rglob("*") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    row = {
        "bytes": num_bytes,
        "files": len(files),
        "stall_seconds": statistics.median(row["checkpoint/stall"] for row in saves),
        "first_stall_seconds": saves[0]["checkpoint/stall"],
        "save_seconds": statistics.median(row["checkpoint/seconds"] for row in saves),
        "step_seconds": statistics.median(seconds[step] for step in seconds if step % EVERY in (0, EVERY - 1)),
        "during_save_seconds": statistics.median(seconds[step] for step in seconds if step % EVERY == 1 and step > 1),
        "write_seconds": median_seconds(lambda: write(work / "plain", num_bytes)),
        "hash_seconds": median_seconds(lambda: [hash_file(path) for path in files]),
        "verify_seconds": median_seconds(lambda: open_checkpoint(newest)),
        "fresh_seconds": fresh,
    }
    more = SAVES * EVERY + 1
    row["resumed_seconds"] = seconds_to_step(work, run_dir, more, [*command, f"trainer.max_steps={more}"])
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()}


def seconds_to_step(work: Path, run_dir: Path, step: int, arguments: list[str]) -> float:
    """From the command to the logged row of `step`; returns when the run has ended."""
    started = time.monotonic()
    run = subprocess.Popen([sys.executable, "-m", "clippy_train.cli", *arguments], cwd=work, stdout=subprocess.DEVNULL)
    while not any(row["step"] == step and "train/loss" in row for row in read_rows(run_dir / METRICS)):
        if run.poll():
            sys.exit("the run failed")
        time.sleep(0.05)
    seconds = time.monotonic() - started
    if run.wait():
        sys.exit("the run failed")
    return seconds


def median_seconds(work: Callable[[], Any], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        started = time.monotonic()
        work()
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds)


def write(path: Path, num_bytes: int) -> None:
    chunk = os.urandom(1 << 24)
    with path.open("wb") as file:
        for _ in range(-(-num_bytes // len(chunk))):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
