"""What one rank computes: loss of a micro-batch, validation sums, optimizer. Lightning and the strategy do the rest."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from clippy_train.config import TrainConfig
from clippy_train.data.batches import Batch
from clippy_train.model.loss import loss_head, mean_loss, token_losses
from clippy_train.model.score import add_scores, new_sums
from clippy_train.optim import Schedule, build_optimizer, clip_grad_norm
from clippy_train.train.strategy import partitioned


class CodeLM(pl.LightningModule):
    """A causal LM in training.

    Attributes:
        micro_losses: mean loss of each micro-batch since the last optimizer step, on the device.
        lr: learning rate of the last update.
        grad_norm: global gradient norm of the last update, before clipping; on the device where it was computed there.
        val_sums: over the validation so far, by group (`model.score`); group `1 + i` is language `i` of the data.
    """

    def __init__(self, config: TrainConfig, model: Any, token_bytes: np.ndarray) -> None:
        super().__init__()
        self.config, self.model = config, model
        model.lm_head = loss_head(model)
        model.train()  # a loaded model is in evaluation mode, and Lightning leaves it there: no dropout
        self._mean_loss, self._token_losses = map(self._compiled, (mean_loss, token_losses))
        self.register_buffer("token_bytes", torch.from_numpy(token_bytes), persistent=False)
        self.micro_losses: list[Tensor] = []
        self.lr = 0.0
        self._grad_norm: Tensor | float = 0.0
        self.val_sums = new_sums(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(self._mean_loss, batch)
        self.micro_losses.append(loss.detach())
        return loss

    def on_validation_epoch_start(self) -> None:
        self.val_sums = new_sums(len(self.trainer.datamodule.languages), self.device)  # type: ignore[attr-defined]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self._loss(self._token_losses, batch)
        add_scores(self.val_sums, losses, batch["input_ids"], batch["group"], self.token_bytes)  # type: ignore[arg-type]

    def _compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`model.compile`: forward and backward pass as one graph each. Modules and the keys of their state stay."""
        return torch.compile(function, dynamic=False) if self.config.model.compile else function

    def _loss(self, function: Callable[..., Tensor], batch: Batch) -> Tensor:
        eos = self.model.config.eos_token_id if self.config.data.document_mask else None
        return function(self.model, batch["input_ids"], self.config.attention, self.config.model.loss_dtype, eos)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optim)
        if self.config.strategy.stage and not self.config.deepspeed:
            optimizer = partitioned(optimizer)
        schedule = Schedule(optimizer, self.config.optim)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lr = optimizer.param_groups[0]["lr"]
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):  # which clips by itself
            self._grad_norm = clip_grad_norm(self.model.parameters(), self.config.optim.grad_clip)

    @property
    def grad_norm(self) -> Tensor | float:
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            return strategy.deepspeed_engine.get_global_grad_norm()
        return self._grad_norm
