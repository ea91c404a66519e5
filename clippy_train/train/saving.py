"""Saving during training: every rank writes its part aside, then rank 0 publishes the whole as one checkpoint."""

import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from clippy_train.config import TrainConfig
from clippy_train.errors import NonFinite
from clippy_train.train import collective
from clippy_train.train.checkpoint import ASIDE, STATE, Checkpoint, Manifest, folder, prune, publish, seal
from clippy_train.train.progress import Progress, step_ended, validation_due


class Checkpointer(pl.Callback):
    """Saves every `checkpoint.every_steps` steps and after the last one; behind the validation of a step that has one.

    So a run that continues from a checkpoint never owes a validation, which Lightning would leave out.

    Args:
        data: what the order of the data depends on (`data.module.data_identity`).
        resumed: the checkpoint that this life of the run starts from.
    """

    def __init__(
        self, config: TrainConfig, progress: Progress, data: dict[str, Any], resumed: Checkpoint | None
    ) -> None:
        self.config, self.progress, self.data, self.resumed = config, progress, data, resumed
        self.saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.resumed:
            load_rng(self.resumed.path / rng_name(trainer.global_rank))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if step_ended(trainer, batch_idx) and not validation_due(self.config, trainer.global_step):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step % self.config.checkpoint.every_steps == 0 or step == self.config.trainer.max_steps:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write, verify and publish a checkpoint of the step that just ended. Collective; nothing if it is there.

        Raises:
            NonFinite: the last gradient norm was not finite, so neither are the weights.
        """
        step = trainer.global_step
        if step == self.saved_step:
            return
        if not np.isfinite(trainer.lightning_module.grad_norm):  # type: ignore[arg-type]
            raise NonFinite(f"gradient norm of step {step} is not finite; nothing is saved")
        final = folder(self.config.run_dir, step)
        aside = final.with_name(final.name + ASIDE)
        if trainer.is_global_zero:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        collective.barrier()
        trainer.save_checkpoint(aside / STATE)
        save_rng(aside / rng_name(trainer.global_rank))
        cursors, counts = self.progress.all_cursors(), self.progress.all_counts()
        collective.barrier()
        if trainer.is_global_zero:
            manifest = Manifest(
                step=step,
                tokens=step * self.config.tokens_per_step,
                cursors=cursors.tolist(),
                counts=counts,
                data=self.data,
                world_size=self.config.world_size,
                strategy=asdict(self.config.strategy),
                optimizer=self.config.optim.name,
                files=seal(aside),
            )
            publish(aside, final, manifest)
            prune(self.config.run_dir, self.config.checkpoint.keep_last)
        collective.barrier()
        self.saved_step = step


def rng_name(rank: int) -> str:
    return f"rng-{rank:05d}.pt"


def save_rng(path: Path) -> None:
    name, keys, *position = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).copy()), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }
    torch.save(state, path)


def load_rng(path: Path) -> None:
    """Restore what `save_rng` wrote; a rank that did not exist then keeps its seed."""
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.numpy(), *position))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
