"""The order of the callbacks: each promise holds in the order of `callbacks.order`, and breaks when two are swapped."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest

from clippy_train.config import TrainConfig
from clippy_train.errors import NonFinite
from clippy_train.model.build import build
from clippy_train.run.checkpoint import find_checkpoint
from clippy_train.run.folder import METRICS, last_step
from clippy_train.run.rows import read_rows
from clippy_train.shards.sources import open_corpus
from clippy_train.tokenizer import token_bytes
from clippy_train.train.callbacks.checkpointer import Checkpointer
from clippy_train.train.callbacks.health import Health
from clippy_train.train.callbacks.ledger import Ledger
from clippy_train.train.callbacks.monitor import Monitor
from clippy_train.train.callbacks.order import build_callbacks
from clippy_train.train.callbacks.preemption import Preemption, SignalFlag
from clippy_train.train.callbacks.progress import Progress, fresh_cursors
from clippy_train.train.callbacks.watchdog import Watchdog
from clippy_train.train.data import DataModule
from clippy_train.train.loggers import build_loggers
from clippy_train.train.module import CodeLM
from clippy_train.train.strategy import build_trainer

SETTINGS = [
    "strategy=single", "trainer.devices=1", "trainer.precision=fp32", "trainer.watchdog_seconds=0",
    "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "model.max_position_embeddings=32",
    "data.seq_len=16", "data.streams=2", "data.num_workers=0", "data.window=4",
    "trainer.global_batch_size=4", "trainer.micro_batch_size=2", "trainer.eval_micro_batch_size=2",
    "trainer.val_samples=2", "trainer.max_steps=3", "trainer.val_every_steps=3", "trainer.log_every_steps=1",
    "checkpoint.every_steps=1", "logger.sample_prompts=[]", "logger.tensorboard=false", "trainer.audit=true",
]  # fmt: skip


class Run:
    """A run of three steps in this process, with two of its callbacks swapped."""

    def __init__(self, config: TrainConfig, swapped: tuple[type, type] | None) -> None:
        config.run_dir.mkdir(parents=True)
        model, tokenizer = build(config)
        cursors = fresh_cursors(config.data.streams)
        self.callbacks = build_callbacks(
            config,
            0,
            watchdog=Watchdog(config.run_dir, 0, config.trainer.watchdog_seconds),
            flag=SignalFlag(),
            tokenizer=tokenizer,
            shards=open_corpus(config.data, "train").shards,
            identity={},
            cursors=cursors,
            resumed=None,
            native=None,
            base=None,
        )
        self.order = [type(each) for each in self.callbacks]
        if swapped:
            first, second = map(self.order.index, swapped)
            self.callbacks[first], self.callbacks[second] = self.callbacks[second], self.callbacks[first]
        self.config, self.data = config, DataModule(config, tokenizer, 0, cursors)
        self.module = CodeLM(config, model, token_bytes(tokenizer, model.config.vocab_size))

    def fit(self) -> None:
        trainer = build_trainer(self.config, callbacks=self.callbacks, logger=build_loggers(self.config, -1))
        trainer.fit(self.module, self.data)

    def callback(self, kind: type) -> pl.Callback:
        (found,) = (each for each in self.callbacks if isinstance(each, kind))
        return found

    def rows(self) -> list[dict[str, float]]:
        return [row for row in read_rows(self.config.run_dir / METRICS) if "train/loss" in row]


@pytest.fixture
def run(
    train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return lambda *swapped: Run(train_config(*SETTINGS, f"run.root={tmp_path}", "run.name=run"), swapped or None)


def test_the_order_is_the_documented_one(run: Callable[..., Run]) -> None:
    assert run().order == [Progress, Watchdog, Health, Monitor, Ledger, Checkpointer, Preemption]


def cursors_are_those_after_the_step(run: Run) -> bool:
    progress, after = run.callback(Progress), {}
    assert isinstance(progress, Progress)

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if run.module.step.ended:
                after[trainer.global_step] = progress.cursors.copy()

    run.callbacks.append(Record())
    run.fit()
    checkpoint = find_checkpoint(run.config.run_dir, step=2)
    assert checkpoint
    return np.array_equal(checkpoint.manifest.cursors, after[2])


def what_a_step_logs_is_on_disk_before_its_checkpoint(run: Run) -> bool:
    seen: list[bool] = []
    checkpointer = run.callback(Checkpointer)
    assert isinstance(checkpointer, Checkpointer)
    save = checkpointer.save

    def saved(trainer: pl.Trainer, last: bool = False) -> None:
        save(trainer, last)
        seen.append(last_step(run.config.run_dir) == run.rows()[-1]["step"] if run.rows() else False)

    checkpointer.save = saved  # type: ignore[method-assign]
    run.fit()
    assert len(seen) == 3
    return all(seen)


def a_step_that_is_not_finite_is_not_logged(run: Run) -> bool:
    step = type(run.module).training_step

    def poisoned(batch: dict[str, object], batch_idx: int) -> object:
        loss = step(run.module, batch, batch_idx)  # type: ignore[arg-type]
        if batch_idx == 3:  # the last micro-batch of step 2
            run.module.step.losses[-1] = loss.detach() * math.nan
        return loss

    run.module.training_step = poisoned  # type: ignore[assignment]
    with pytest.raises(NonFinite):
        run.fit()
    return [row["step"] for row in run.rows()] == [1]


@pytest.mark.parametrize(
    ("holds", "swapped"),
    [
        (cursors_are_those_after_the_step, (Progress, Checkpointer)),
        (what_a_step_logs_is_on_disk_before_its_checkpoint, (Monitor, Checkpointer)),
        (a_step_that_is_not_finite_is_not_logged, (Health, Monitor)),
    ],
)
def test_swapping_two_callbacks_breaks_a_promise(
    run: Callable[..., Run], tmp_path: Path, holds: Callable[[Run], bool], swapped: tuple[type, type]
) -> None:
    assert holds(run())
    (tmp_path / "run").rename(tmp_path / "ordered")
    assert not holds(run(*swapped))
