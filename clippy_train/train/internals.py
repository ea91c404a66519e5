"""Every private part of Lightning 2.6 and DeepSpeed 0.19 that training uses, with the reason.

`pyproject.toml` bounds both versions from above. A test looks up each part of `PRIVATE` and names one that is gone.
"""

import io
import os
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import deepspeed
import deepspeed.ops
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor

from clippy_train.train import collective


class Part(NamedTuple):
    """An attribute of a class (`module:Class`, or a module) that is not public."""

    owner: str
    name: str
    why: str


PRIVATE = (
    Part(
        "lightning.pytorch.trainer.connectors.signal_connector:_SignalConnector",
        "register_signal_handlers",
        "its handlers broadcast, or save, inside the handler: with two ranks that deadlocks or loses the save",
    ),
    Part(
        "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop",
        "_broadcast_sigterm_tensor",
        "a broadcast and a wait for the device in every micro-batch",
    ),
    Part(
        "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop",
        "automatic_optimization",
        "holds the counter behind `trainer.global_step`, which a run from a base model's step must set",
    ),
    Part(
        "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop",
        "batch_progress",
        "holds the counter behind the validation interval",
    ),
    Part(
        "lightning.pytorch.trainer.trainer:Trainer",
        "_run_sanity_check",
        "the validation before the first step; it is skipped in a run that resumes, which may have missed one",
    ),
    Part(
        "lightning.pytorch.loops.evaluation_loop:_EvaluationLoop",
        "restarting",
        "what makes Lightning skip it",
    ),
    Part(
        "lightning.pytorch.strategies.deepspeed:DeepSpeedStrategy",
        "_init_deepspeed_distributed",
        "`setup_distributed` demands CUDA; on CPU it is called without that check",
    ),
    Part(
        "lightning.pytorch.strategies.deepspeed:DeepSpeedStrategy",
        "_setup_model_and_optimizer",
        "DeepSpeed prints a memory report inside it",
    ),
    Part(
        "deepspeed.runtime.engine:DeepSpeedEngine",
        "checkpoint_engine",
        "its `save` raises on one rank alone, which leaves the others in a collective",
    ),
    Part(
        "deepspeed.runtime.engine:DeepSpeedEngine",
        "_copy_recovery_script",
        "writes a file outside `checkpoint_engine.save`",
    ),
    Part("deepspeed.runtime.engine:DeepSpeedEngine", "global_steps", "a run from a base model's step must set it"),
    Part(
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer",
        "_lazy_init_hp_params_optimizer_state",
        "links the moments to parameters, otherwise after the first step: too late to set them",
    ),
    Part(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer",
        "_lazy_init_hp_params_optimizer_state",
        "the same under ZeRO-2 and in fp32",
    ),
    Part(
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer",
        "clip_grad",
        "a checkpoint overwrites it with the limit of the attempt that wrote it",
    ),
    Part(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", "clip_grad", "the same under ZeRO-2 and in fp32"
    ),
    Part(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
        "fp32_partitioned_groups_flat",
        "the partitions that AdamW has its state for under ZeRO-3",
    ),
    Part(
        "deepspeed.runtime.zero.partition_parameters:Init",
        "ds_tensor",
        "a rank's part of a parameter under ZeRO-3",
    ),
    Part(
        "deepspeed.ops",
        "__compatible_ops__",
        "the shared-memory all-reduce takes minutes and a compiler, and its build lock outlives a crash",
    ),
    Part(
        "deepspeed.runtime.zero.muon.original_muon",
        "muon_update",
        "the bf16 optimizer imports it, and its decorators torch's compiler: half a rank's start-up after its imports",
    ),
)


class ExactDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, with gradients of the right size and without what DeepSpeed prints."""

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning 2.6 divides the loss by the accumulation steps, and DeepSpeed's engine would divide it again: the
        # gradient norm would be too small by that factor, and clipping would never act.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def _setup_model_and_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        import_muon()
        with redirect_stdout(io.StringIO()):
            return super()._setup_model_and_optimizer(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        with redirect_stdout(io.StringIO()):
            return super().load_checkpoint(*args, **kwargs)


def import_muon() -> None:
    """Import what the bf16 optimizer imports, without effect of its decorators."""
    with mock.patch.dict(os.environ, {"TORCHDYNAMO_DISABLE": "1"}):
        import_module("deepspeed.runtime.zero.muon.original_muon")


class CPUDeepSpeedStrategy(ExactDeepSpeedStrategy):
    """... and without Lightning's demand for CUDA."""

    def setup_environment(self) -> None:
        deepspeed.ops.__compatible_ops__ = {}  # not even asked: one would be compiled
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)  # DeepSpeed wants an index

    @root_device.setter
    def root_device(self, device: torch.device) -> None:
        assert device.type == "cpu"


def disable_signal_handling(trainer: pl.Trainer) -> None:
    """Turn off Lightning's signal handlers and its broadcast in every micro-batch."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def validate_on_resume(trainer: pl.Trainer) -> None:
    """Have a run that resumes validate before its first step, as a new run does."""
    check = trainer._run_sanity_check

    def run() -> None:
        trainer.fit_loop.epoch_loop.val_loop.restarting = False
        check()

    trainer._run_sanity_check = run  # type: ignore[method-assign]


def set_step_counters(trainer: pl.Trainer, step: int, micro_steps: int) -> None:
    """Set the counters behind `trainer.global_step`, the validation interval and DeepSpeed's own steps."""
    loop = trainer.fit_loop.epoch_loop
    updates = loop.automatic_optimization.optim_progress.optimizer.step.total
    updates.ready = updates.completed = step
    batches: Any = loop.batch_progress.total
    batches.ready = batches.started = batches.processed = batches.completed = step * micro_steps
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        trainer.strategy.deepspeed_engine.global_steps = step


def set_grad_clip(strategy: Strategy, limit: float) -> None:
    """Have DeepSpeed clip gradients to a norm. Without DeepSpeed, the module clips them itself."""
    if isinstance(strategy, DeepSpeedStrategy):
        strategy.deepspeed_engine.optimizer.clip_grad = limit


def redirect_saves(strategy: Strategy, save: Callable[..., None]) -> None:
    """Have Lightning's strategies and DeepSpeed write the files of a checkpoint through `save(state_dict, path)`."""
    if not isinstance(strategy, DeepSpeedStrategy):
        strategy.checkpoint_io.save_checkpoint = save  # type: ignore[method-assign]
        return
    engine = strategy.deepspeed_engine
    engine.checkpoint_engine.save = save
    engine.save_checkpoint = partial(engine.save_checkpoint, save_latest=False)
    engine._copy_recovery_script = lambda path: None


def init_adam_state(strategy: Strategy, stage: int, step: int, moments: Iterable[str]) -> None:
    """Give DeepSpeed's AdamW the state that it would make itself, with moments of zero after `step` updates."""
    assert isinstance(strategy, DeepSpeedStrategy)
    zero = strategy.deepspeed_engine.optimizer
    if stage == 3:
        zero_adam_state(zero.optimizer, zero.fp32_partitioned_groups_flat, step, moments)
        return
    partitions = [each for group in zero.optimizer.param_groups for each in group["params"]]
    zero_adam_state(zero.optimizer, partitions, step, moments)
    zero._lazy_init_hp_params_optimizer_state()


def zero_adam_state(optimizer: Any, tensors: Iterable[Tensor], step: int, moments: Iterable[str]) -> None:
    """AdamW's state after `step` updates, with moments of zero."""
    names = tuple(moments)
    for each in tensors:
        zeros = {name: torch.zeros_like(each, requires_grad=False) for name in names}
        optimizer.state[each] = {"step": torch.tensor(float(step)), **zeros}


def own_part(parameter: Any) -> Tensor:
    """What this rank holds of a parameter: under ZeRO-3 its part without the padding, otherwise all of it."""
    if not hasattr(parameter, "ds_tensor"):
        return torch.as_tensor(parameter).detach()
    part: Tensor = parameter.ds_tensor.flatten()
    return part[: max(0, parameter.ds_numel - collective.rank() * part.numel())].detach()


def set_own_part(parameter: Any, value: Tensor, moment: str | None = None) -> None:
    """Set this rank's part of a parameter under ZeRO, or of one of its moments, from the whole value."""
    value = value.to(parameter.device)
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: parts of equal size, padded with 0 at the end
        size = parameter.ds_tensor.numel()
        value = F.pad(value.flatten()[collective.rank() * size :][:size], (0, size))[:size]
        set_weight, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
    else:
        set_weight, set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
    if moment is None:
        set_weight(parameter, value)
    else:
        set_moment(parameter, value, moment)
