"""Feed a recorded run of the original to the framework's own training step: Lightning, strategy, optimizer, schedule.

    python -m support.replay TRACE OUT KEY=VALUE,KEY=VALUE...

runs one rank of it (RANK, WORLD_SIZE, ... in the environment), once for each list of settings, and writes what it
computed to OUT.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clippy_train.compose import compose
from clippy_train.config import TrainConfig
from clippy_train.launch.agent import (
    here,
    rank_environment,
)
from clippy_train.model.score import new_sums
from clippy_train.train.module import CodeLM
from clippy_train.train.strategy import build_trainer
from support import processes
from support.flax_trace import FlaxTrace

TIMEOUT = 900


@dataclass
class Replay:
    """What was computed on the recorded micro-batches; losses are those of whole micro-batches, over all ranks."""

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    evals: dict[int, list[float]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Recorder(pl.Callback):
    def __init__(self) -> None:
        self.seen = Replay()
        self._sums = new_sums(1)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = pl_module.step
        if step.ended:
            self.seen.losses += [loss.item() for loss in step.losses]
            self.seen.learning_rates.append(step.lr)
            self.seen.grad_norms.append(step.grad_norm)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._sums = new_sums(1)
        self.seen.evals[trainer.global_step] = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        nats, targets, _ = (pl_module.val_sums - self._sums)[1].tolist()
        self._sums = pl_module.val_sums.clone()
        self.seen.evals[trainer.global_step].append(nats / targets)


class RecordedData(pl.LightningDataModule):
    """The recorded batches; a rank takes its share of the rows of each."""

    def __init__(self, trace: FlaxTrace, rank: int, world_size: int) -> None:
        super().__init__()
        self.languages = ["any"]
        self.train = [ids.chunk(world_size)[rank] for ids in trace.train_ids]
        self.eval = [ids.chunk(world_size)[rank] for ids in trace.eval_ids]

    def train_dataloader(self) -> DataLoader:
        return DataLoader([{"input_ids": ids} for ids in self.train], batch_size=None)

    def val_dataloader(self) -> DataLoader:
        batches = [{"input_ids": ids, "group": torch.ones_like(ids)} for ids in self.eval]
        return DataLoader(batches, batch_size=None)


def configuration(trace: FlaxTrace, *overrides: str) -> TrainConfig:
    """The trace's settings as a configuration of ours."""
    args, optim = trace.args, trace.optim_config()
    batch, world_size = args["per_device_train_batch_size"], 2 if "trainer.devices=2" in overrides else 1
    return compose(
        TrainConfig,
        [
            "experiment=demo",
            *(f"optim.{name}={value}" for name, value in asdict(optim).items() if name in FROM_TRACE),
            f"data.seq_len={args['block_size']}",
            f"model.max_position_embeddings={max(args['block_size'], 2)}",
            f"data.streams={world_size}",
            f"trainer.max_steps={args['max_steps']}",
            f"trainer.global_batch_size={batch * trace.accumulation}",
            f"trainer.micro_batch_size={batch // world_size}",
            f"trainer.val_every_steps={args['eval_steps']}",
            "trainer.devices=1",
            *overrides,
        ],
    )


FROM_TRACE = {"lr", "betas", "eps", "weight_decay", "warmup_steps", "decay_steps", "min_lr_ratio", "grad_clip"}


def train(trace: FlaxTrace, config: TrainConfig, rank: int = 0) -> Replay:
    """Train on this rank's share of the recorded micro-batches."""
    model, recorder = trace.initial_model(), Recorder()
    trainer = build_trainer(config, callbacks=[recorder], logger=False, num_sanity_val_steps=0)
    module = CodeLM(config, model, np.ones(model.config.vocab_size, dtype=np.int32))
    trainer.fit(module, RecordedData(trace, rank, config.world_size))
    recorder.seen.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return recorder.seen


def train_on_two_ranks(folder: Path, out: Path, *layouts: list[str]) -> list[Replay]:
    """Train once in each layout, one after another on the same two real processes; losses are averaged over them."""
    trace = FlaxTrace(folder)
    config, place = configuration(trace, "trainer.devices=2"), here()
    ranks = [
        processes.start(
            [sys.executable, "-m", "support.replay", str(folder), str(out / f"{rank}.pt"), *map(",".join, layouts)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **rank_environment(config, rank, place), "OMP_NUM_THREADS": "1", "CLIPPY_LAUNCHED": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=TIMEOUT)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], json.dumps(said)
    seen = [[Replay(**each) for each in torch.load(out / f"{rank}.pt", weights_only=True)] for rank in range(2)]
    return [joined(first, second) for first, second in zip(*seen, strict=True)]


def joined(first: Replay, second: Replay) -> Replay:
    """What two ranks computed together."""
    assert first.grad_norms == second.grad_norms
    return Replay(
        losses=mean(first.losses, second.losses),
        learning_rates=first.learning_rates,
        grad_norms=first.grad_norms,
        evals={update: mean(losses, second.evals[update]) for update, losses in first.evals.items()},
        weights=first.weights,
    )


def mean(first: list[float], second: list[float]) -> list[float]:
    return [(a + b) / 2 for a, b in zip(first, second, strict=True)]


if __name__ == "__main__":
    recorded, rank = FlaxTrace(Path(sys.argv[1])), int(os.environ["RANK"])
    settings = [["trainer.devices=2", *each.split(",")] for each in sys.argv[3:]]
    torch.save([asdict(train(recorded, configuration(recorded, *each), rank)) for each in settings], sys.argv[2])
