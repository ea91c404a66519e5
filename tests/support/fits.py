"""Training in this process, or in processes forked from it (`run_distributed`), without a command line.

Uses the callbacks, module and data of a real rank. Takes one second; a command that imports everything takes ten.
"""

import os
from typing import Any, TypeVar
from unittest import mock

import lightning.pytorch as pl

from clippy_train.config import TrainConfig
from clippy_train.data.mixture import open_sources
from clippy_train.model.build import build_model
from clippy_train.run.folder import METRICS
from clippy_train.run.rows import read_rows
from clippy_train.run.start import Start
from clippy_train.tokenizer import token_bytes
from clippy_train.train import collective
from clippy_train.train.callbacks.order import build_callbacks
from clippy_train.train.callbacks.preemption import SignalFlag
from clippy_train.train.callbacks.progress import fresh_cursors
from clippy_train.train.callbacks.watchdog import Watchdog
from clippy_train.train.data import DataModule
from clippy_train.train.loggers import build_loggers
from clippy_train.train.module import CodeLM
from clippy_train.train.rank import train_rank
from clippy_train.train.strategy import build_trainer

C = TypeVar("C", bound=pl.Callback)

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
SINGLE = ["strategy=single", "trainer.devices=1"]
SETTINGS = [
    "trainer.precision=fp32", "trainer.watchdog_seconds=0",
    "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "model.max_position_embeddings=32",
    "data.seq_len=16", "data.streams=2", "data.num_workers=0", "data.window=4",
    "trainer.global_batch_size=4", "trainer.micro_batch_size=2", "trainer.eval_micro_batch_size=2",
    "trainer.val_samples=2", "trainer.max_steps=3", "trainer.val_every_steps=3", "trainer.log_every_steps=1",
    "checkpoint.every_steps=1", "checkpoint.asynchronous=false", "logger.sample_prompts=[]", "logger.tensorboard=false",
    "trainer.audit=true",
]  # fmt: skip


def run_rank(config: TrainConfig, start: Start, *callbacks: pl.Callback) -> None:
    """Train as a rank of a real run does, with more callbacks; in a process of `run_distributed`."""

    def build(*args: Any, **kwargs: Any) -> list[pl.Callback]:
        return [*build_callbacks(*args, **kwargs), *callbacks]

    with mock.patch("clippy_train.train.rank.build_callbacks", build):
        train_rank(config, start, SignalFlag())


class Fit:
    """One rank of a small new run."""

    def __init__(self, config: TrainConfig) -> None:
        rank = collective.rank()
        if not os.environ.get("RANK"):
            os.environ |= ALONE
        config.run_dir.mkdir(parents=True, exist_ok=True)
        model, tokenizer = build_model(config)
        cursors = fresh_cursors(config.data.streams)
        self.callbacks = build_callbacks(
            config,
            rank,
            watchdog=Watchdog(config.run_dir, rank, config.trainer.watchdog_seconds),
            flag=SignalFlag(),
            tokenizer=tokenizer,
            sources=open_sources(config.data, "train"),
            identity={},
            cursors=cursors,
            resumed=None,
            native=None,
            base=None,
        )
        self.config, self.data = config, DataModule(config, tokenizer, rank, cursors)
        self.module = CodeLM(config, model, token_bytes(tokenizer, model.config.vocab_size))

    def fit(self) -> None:
        loggers = build_loggers(self.config, -1) if collective.rank() == 0 else False
        trainer = build_trainer(self.config, callbacks=self.callbacks, logger=loggers)
        trainer.fit(self.module, self.data)

    def callback(self, kind: type[C]) -> C:
        (found,) = (each for each in self.callbacks if isinstance(each, kind))
        return found

    def rows(self) -> list[dict[str, Any]]:
        return [row for row in read_rows(self.config.run_dir / METRICS) if "train/loss" in row]
