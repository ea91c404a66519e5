"""How a run starts that its strategy does not restore: from exact fp32 weights and, where there are any, at the step
and with the Adam moments of its base model, or of a checkpoint that was written in another layout.

Both are set after the strategy has laid out its own state, whatever that is: parameter by parameter, or slice by slice
of DeepSpeed's flat partitions. Leans on private parts of DeepSpeed 0.19 and Lightning 2.6.
"""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from clippy_train.config import TrainConfig
from clippy_train.run.moments import MOMENTS, BaseState
from clippy_train.train import collective


class ExactWeights(pl.Callback):
    """Gives DeepSpeed's fp32 weights their exact values: it makes them from the weights that it has rounded to bf16."""

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._weights = {name: each.detach().clone() for name, each in pl_module.model.named_parameters()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for name, parameter in pl_module.model.named_parameters():
            set_own_part(parameter, self._weights[name])
        self._weights = {}


class Continuation(pl.Callback):
    """Sets moments, learning rate and every step counter before the first validation."""

    def __init__(self, config: TrainConfig, base: BaseState) -> None:
        self.config, self.base = config, base

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.base.require_fit(pl_module.model.named_parameters())

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        parameters = dict(pl_module.model.named_parameters())
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            self._fill_deepspeed(trainer.strategy.deepspeed_engine.optimizer, parameters)
            trainer.strategy.deepspeed_engine.global_steps = self.base.step
        else:
            self._fill(trainer.optimizers[0], parameters)
        for each in trainer.lr_scheduler_configs:
            each.scheduler.start_at(self.base.step)  # type: ignore[union-attr]
        count_steps(trainer, self.base.step, self.config.micro_steps)

    def _fill(self, optimizer: Any, parameters: dict[str, Tensor]) -> None:
        """Give torch's AdamW its state."""
        fresh(optimizer, parameters.values(), self.base.step)
        for name, parameter in parameters.items():
            for moment, value in self.base.moments(name).items():
                optimizer.state[parameter][moment].copy_(value)

    def _fill_deepspeed(self, zero: Any, parameters: dict[str, Tensor]) -> None:
        """Give each rank its part of the moments: AdamW holds flat partitions there, not parameters."""
        if self.config.strategy.stage == 3:
            fresh(zero.optimizer, zero.fp32_partitioned_groups_flat, self.base.step)
        else:
            flat = [each for group in zero.optimizer.param_groups for each in group["params"]]
            fresh(zero.optimizer, flat, self.base.step)
            zero._lazy_init_hp_params_optimizer_state()  # otherwise done after the first step
        for name, parameter in parameters.items():
            for moment, value in self.base.moments(name).items():
                set_own_part(parameter, value, moment)


def set_own_part(parameter: Any, value: Tensor, moment: str | None = None) -> None:
    """Set this rank's part of a parameter under ZeRO, or of one of its moments, from the whole value."""
    value = value.to(parameter.device)
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: every rank has as many elements; the last ones are filled up with 0
        size = parameter.ds_tensor.numel()
        value = F.pad(value.flatten()[collective.rank() * size :][:size], (0, size))[:size]
        set_weight, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
    else:
        set_weight, set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
    if moment is None:
        set_weight(parameter, value)
    else:
        set_moment(parameter, value, moment)


def fresh(optimizer: Any, tensors: Iterable[Tensor], step: int) -> None:
    """AdamW's state after `step` updates, as it would make it itself, with moments of zero."""
    for each in tensors:
        zeros = {moment: torch.zeros_like(each, requires_grad=False) for moment in MOMENTS}
        optimizer.state[each] = {"step": torch.tensor(float(step)), **zeros}


def count_steps(trainer: pl.Trainer, step: int, micro_steps: int) -> None:
    """Set the counters behind `trainer.global_step` and the validation interval."""
    loop = trainer.fit_loop.epoch_loop
    updates = loop.automatic_optimization.optim_progress.optimizer.step.total
    updates.ready = updates.completed = step
    batches: Any = loop.batch_progress.total
    batches.ready = batches.started = batches.processed = batches.completed = step * micro_steps
