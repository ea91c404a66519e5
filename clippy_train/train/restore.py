"""What a run sets in its strategy's state before it trains.

Where the strategy does not restore a checkpoint by itself: exact fp32 weights and, where there are any, the step and
the Adam moments of the base model, or of a checkpoint that is resharded. They are set after the strategy has created
its own state, parameter by parameter or slice by slice of DeepSpeed's flat partitions. Where it does restore one: the
settings, since a checkpoint brings those of the attempt that wrote it.
"""

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from clippy_train.config import OptimConfig, TrainConfig
from clippy_train.optim import Schedule
from clippy_train.run.moments import MOMENTS, BaseState
from clippy_train.train.internals import (
    init_adam_state,
    set_grad_clip,
    set_own_part,
    set_step_counters,
    zero_adam_state,
)
from clippy_train.train.module import code_lm


class RestoreWeights(pl.Callback):
    """Gives DeepSpeed's fp32 weights their exact values: it derives them from weights that it has rounded to bf16."""

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._weights = {name: each.detach().clone() for name, each in code_lm(pl_module).model.named_parameters()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in code_lm(pl_module).model.named_parameters():
            set_own_part(parameter, self._weights[name])
        self._weights = {}


class ApplySettings(pl.Callback):
    """Gives the optimizer the settings of this attempt before its first update."""

    def __init__(self, settings: OptimConfig) -> None:
        self.settings = settings

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        schedule = schedule_of(trainer)
        schedule.start_at(schedule.last_epoch)
        set_grad_clip(trainer.strategy, self.settings.grad_clip)


class RestoreMoments(pl.Callback):
    """Sets moments, learning rate and every step counter before the first validation."""

    def __init__(self, config: TrainConfig, base: BaseState) -> None:
        self.config, self.base = config, base

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.base.require_fit(code_lm(pl_module).model.named_parameters())

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        parameters: dict[str, Tensor] = dict(code_lm(pl_module).model.named_parameters())
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            init_adam_state(trainer.strategy, self.config.strategy.stage, self.base.step, MOMENTS)
            for name, parameter in parameters.items():
                for moment, value in self.base.moments(name).items():
                    set_own_part(parameter, value, moment)
        else:
            self._set_torch(trainer, parameters)
        schedule_of(trainer).start_at(self.base.step)
        set_step_counters(trainer, self.base.step, self.config.micro_steps)

    def _set_torch(self, trainer: pl.Trainer, parameters: dict[str, Tensor]) -> None:
        (optimizer,) = trainer.optimizers
        zero_adam_state(optimizer, parameters.values(), self.base.step, MOMENTS)
        for name, parameter in parameters.items():
            for moment, value in self.base.moments(name).items():
                optimizer.state[parameter][moment].copy_(value)


def schedule_of(trainer: pl.Trainer) -> Schedule:
    (found,) = trainer.lr_scheduler_configs
    assert isinstance(found.scheduler, Schedule)
    return found.scheduler
