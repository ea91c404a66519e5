"""What one rank computes: loss of a micro-batch, validation sums, optimizer. Lightning and the strategy do the rest."""

from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import GPTNeoForCausalLM

from clippy_train.config import TrainConfig
from clippy_train.data.batches import Batch
from clippy_train.data.scored import Group
from clippy_train.model.attention import attention_bounds, attention_masks, require_supported
from clippy_train.model.loss import loss_head, mean_loss, token_losses
from clippy_train.model.score import add_scores, new_sums
from clippy_train.optim import Schedule, build_optimizer, clip_grad_norm
from clippy_train.train.state import StepState
from clippy_train.train.strategy import partitioned

Loss = Callable[..., Tensor]


class CodeLM(pl.LightningModule):
    """A causal LM in training.

    Attributes:
        step: losses, learning rate and gradient norm of the step under way; shared with the callbacks.
        val_sums: of the validation so far, by group (`model.score`); group `1 + i` is group `i` of the data.
    """

    token_bytes: Tensor

    def __init__(self, config: TrainConfig, model: GPTNeoForCausalLM, token_bytes: np.ndarray) -> None:
        super().__init__()
        self.config, self.model = config, model
        model.lm_head = loss_head(model)
        model.train()  # a loaded model is in evaluation mode, and Lightning leaves it there: no dropout
        self._mean_loss, self._token_losses = map(self._compiled, (mean_loss, token_losses))
        self.register_buffer("token_bytes", torch.from_numpy(token_bytes), persistent=False)
        self.step = StepState()
        self.val_sums = new_sums(1)

    def setup(self, stage: str) -> None:
        device, shape = self.trainer.strategy.root_device, self.model.config
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            require_supported(self.config.attention, shape.hidden_size // shape.num_heads, capability)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Find documents while the batch is on the CPU: on the GPU the host would wait for their number."""
        if self._eos is None or self.config.attention != "varlen":
            return batch
        return {**batch, "bounds": attention_bounds(batch["input_ids"], self._eos)}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(self._mean_loss, batch, predicted=batch.get("predicted"))
        if "targets" in batch:
            loss = loss * self._positions_per_target(batch, batch_idx)
        self.step.add_loss(loss.detach(), ended=(batch_idx + 1) % self.config.micro_steps == 0)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.val_sums = new_sums(len(groups(self.trainer)), self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self._loss(self._token_losses, batch)
        add_scores(self.val_sums, losses, batch["input_ids"], batch["group"], self.token_bytes)

    def _compiled(self, function: Loss) -> Loss:
        """`model.compile`: forward and backward pass as one graph each. Modules and their state keys do not change."""
        return torch.compile(function, dynamic=False) if self.config.model.compile else function

    def _positions_per_target(self, batch: Batch, batch_idx: int) -> Tensor:
        """What turns the means over the positions of a step's micro-batches into the mean over the step's targets."""
        if batch_idx % self.config.micro_steps == 0:
            targets = self.trainer.strategy.reduce(batch["targets"], reduce_op="sum")
            self._step_targets = cast(Tensor, targets).clamp(min=1)
        positions = self.config.trainer.global_batch_size * (self.config.data.seq_len - 1)
        return positions / self._step_targets

    def _loss(self, function: Loss, batch: Batch, **kwargs: Tensor | None) -> Tensor:
        ids, kernel = batch["input_ids"], self.config.attention
        masks = attention_masks(ids, kernel, self.model.config.window_size, self._eos, batch.get("bounds"))
        return function(self.model, ids, kernel, self.config.model.loss_dtype, masks, **kwargs)

    @property
    def _eos(self) -> int | None:
        """The token that ends a document, if attention stays within documents."""
        return cast(int, self.model.config.eos_token_id) if self.config.data.document_mask else None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self.model, self.config.optim)
        if self.config.strategy.stage and not self.config.deepspeed:
            optimizer = partitioned(optimizer)
        schedule = Schedule(optimizer, self.config.optim)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.step.lr = optimizer.param_groups[0]["lr"]
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):  # DeepSpeed clips by itself
            self.step.grad_norm = clip_grad_norm(self.model.parameters(), self.config.optim.grad_clip)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            self.step.grad_norm = strategy.deepspeed_engine.get_global_grad_norm()


def code_lm(module: pl.LightningModule) -> CodeLM:
    """The module that Lightning gives to a callback, by its type."""
    assert isinstance(module, CodeLM)
    return module


def groups(trainer: pl.Trainer) -> list[Group]:
    """What a validation scores separately, which the run's data knows once it has made the validation batches."""
    found: list[Group] = trainer.datamodule.groups  # type: ignore[attr-defined]  # set by `Trainer.fit`
    return found
