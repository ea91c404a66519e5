"""Feed a recorded run of the original to the framework's training step: Lightning, strategy, optimizer, schedule."""

import io
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clippy_train.compose import compose
from clippy_train.config import TrainConfig
from clippy_train.data.batches import Batch
from clippy_train.data.scored import Group
from clippy_train.model.score import new_sums
from clippy_train.train.module import CodeLM, code_lm
from clippy_train.train.strategy import build_trainer
from support.distributed import run_distributed
from support.flax_trace import FlaxTrace

TIMEOUT = 900


@dataclass
class Replay:
    """Results on the recorded batches; losses are means over a whole batch, whatever rank computed its parts."""

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    evals: dict[int, list[float]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Recorder(pl.Callback):
    """Collects a `Replay` during training, and ends it after a step at which `enough`."""

    def __init__(self, enough: Callable[[Replay], bool]) -> None:
        self.seen, self._enough = Replay(), enough
        self._sums = new_sums(1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = code_lm(pl_module).step
        if step.ended:
            self.seen.losses += [loss.item() for loss in step.losses]
            self.seen.learning_rates.append(step.lr)
            self.seen.grad_norms.append(float(step.grad_norm))
            if self._enough(self.seen):
                trainer.should_stop = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sums = new_sums(1)
        self.seen.evals[trainer.global_step] = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, CodeLM)
        nats, targets, _ = (pl_module.val_sums - self._sums)[1].tolist()
        self._sums = pl_module.val_sums.clone()
        self.seen.evals[trainer.global_step].append(nats / targets)


class RecordedData(pl.LightningDataModule):
    """The recorded batches. Each rank trains on its share of every micro-batch, and validates on whole batches, whose
    size need not be that of a micro-batch nor divisible by the number of ranks."""

    def __init__(self, trace: FlaxTrace, rank: int, world_size: int) -> None:
        super().__init__()
        self.groups = [Group("any")]
        self.train = [ids.chunk(world_size)[rank] for ids in trace.train_ids]
        self.eval = list(trace.eval_ids)

    def train_dataloader(self) -> DataLoader[Batch]:
        return loader([{"input_ids": ids} for ids in self.train])

    def val_dataloader(self) -> DataLoader[Batch]:
        return loader([{"input_ids": ids, "group": torch.ones_like(ids)} for ids in self.eval])


def loader(batches: list[Batch]) -> DataLoader[Batch]:
    """A loader of ready batches; torch accepts any sequence as a dataset."""
    return DataLoader(cast("Dataset[Batch]", batches), batch_size=None)


def configuration(trace: FlaxTrace, *overrides: str) -> TrainConfig:
    """The trace's settings as a configuration of the project."""
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
            f"trainer.eval_micro_batch_size={args['per_device_eval_batch_size']}",
            f"trainer.val_every_steps={args['eval_steps']}",
            "trainer.devices=1",
            *overrides,
        ],
    )


FROM_TRACE = {"lr", "betas", "eps", "weight_decay", "warmup_steps", "decay_steps", "min_lr_ratio", "grad_clip"}


def train(
    trace: FlaxTrace, config: TrainConfig, rank: int = 0, enough: Callable[[Replay], bool] = lambda seen: False
) -> Replay:
    """Train on this rank's share of the recorded micro-batches: all, or until `enough`."""
    model, recorder = trace.initial_model(), Recorder(enough)
    trainer = build_trainer(config, callbacks=[recorder], logger=False, num_sanity_val_steps=0)
    module = CodeLM(config, model, np.ones(model.config.vocab_size, dtype=np.int32))
    trainer.fit(module, RecordedData(trace, rank, config.world_size))
    recorder.seen.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return recorder.seen


def train_on_two_ranks(trace: FlaxTrace, *layouts: list[str]) -> list[Replay]:
    """Train once per list of overrides on the same two processes; losses are averaged over the ranks."""

    def rank() -> bytes:
        made = [
            train(trace, configuration(trace, "trainer.devices=2", *each), int(os.environ["RANK"])) for each in layouts
        ]
        buffer = io.BytesIO()
        torch.save(list(map(asdict, made)), buffer)
        return buffer.getvalue()

    seen = [torch.load(io.BytesIO(data), weights_only=True) for data in run_distributed(rank, 2, TIMEOUT)]
    return [merge_ranks(Replay(**first), Replay(**second)) for first, second in zip(*seen, strict=True)]


def merge_ranks(first: Replay, second: Replay) -> Replay:
    """The results of two ranks together. Gradient norms and validation losses must be equal on both."""
    assert first.grad_norms == second.grad_norms
    assert first.evals == second.evals
    return Replay(
        losses=mean(first.losses, second.losses),
        learning_rates=first.learning_rates,
        grad_norms=first.grad_norms,
        evals=first.evals,
        weights=first.weights,
    )


def mean(first: list[float], second: list[float]) -> list[float]:
    return [(a + b) / 2 for a, b in zip(first, second, strict=True)]
