"""The strategy and the DeepSpeed configuration of a run: the only place that translates our keys into theirs.

DeepSpeed also runs on CPU, through its own CPU accelerator and gloo, so what is tested on a laptop is the code that
runs on a cluster.
"""

import warnings
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.optim import ZeroRedundancyOptimizer

from clippy_train.config import TrainConfig
from clippy_train.train.callbacks.watchdog import SLOW
from clippy_train.train.internals import CPUDeepSpeedStrategy, ExactDeepSpeedStrategy

MARGIN = timedelta(minutes=5)  # for stacks to be written before a collective gives up
NEVER = timedelta(days=365)


def build_trainer(config: TrainConfig, **kwargs: Any) -> pl.Trainer:
    """A Trainer that runs what the configuration says, with the given callbacks and loggers only."""
    settings, (num_nodes, devices) = config.trainer, config.nodes_and_devices
    _quiet()
    # Deterministic mode would fill every new tensor with NaN, to expose reads of uninitialized memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by torch at import
    return pl.Trainer(
        strategy=build_strategy(config),
        accelerator=settings.accelerator,
        devices=devices,
        num_nodes=num_nodes,
        precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
        plugins=[TorchElasticEnvironment()],  # RANK, WORLD_SIZE, ... are set by our launcher, torchrun or srun
        max_steps=settings.max_steps,
        accumulate_grad_batches=config.micro_steps,
        val_check_interval=settings.val_every_steps * config.micro_steps,
        check_val_every_n_epoch=None,
        deterministic=settings.deterministic,
        use_distributed_sampler=False,
        inference_mode=False,  # training uses what a validation has cached, such as a mask
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def build_strategy(config: TrainConfig) -> Strategy:
    cpu = config.trainer.accelerator == "cpu"
    if config.strategy.name == "single":
        return SingleDeviceStrategy("cpu" if cpu else "cuda:0")
    group: dict[str, Any] = {
        "process_group_backend": "gloo" if cpu else "nccl",
        "timeout": collective_timeout(config.trainer.watchdog_seconds),
    }
    if not config.deepspeed:
        # Buffers are constants: GPT-Neo's masks would be 50 MB of traffic in each step.
        hook = bf16_compress_hook if config.strategy.reduce_dtype == "bf16" else None
        return DDPStrategy(**group, gradient_as_bucket_view=True, broadcast_buffers=False, ddp_comm_hook=hook)
    kind = CPUDeepSpeedStrategy if cpu else ExactDeepSpeedStrategy
    return kind(**group, config=deepspeed_config(config))


def collective_timeout(watchdog_seconds: int) -> timedelta:
    """How long a rank waits for the others in a collective: longer than the watchdog, which knows where each one is."""
    return timedelta(seconds=SLOW * watchdog_seconds) + MARGIN if watchdog_seconds else NEVER


def partitioned(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """ZeRO-1 in whole tensors: each rank updates its share of the tensors and broadcasts them.

    For Adafactor, whose update of a weight depends on its row, its column and its tensor. DeepSpeed would give it a
    slice of one flat vector instead, and silently compute other updates.
    """
    return ZeroRedundancyOptimizer(optimizer.param_groups, type(optimizer), **optimizer.defaults)


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's dictionary; Lightning adds the accumulation steps."""
    settings = config.strategy
    return {
        "train_micro_batch_size_per_gpu": config.trainer.micro_batch_size,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": config.trainer.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # otherwise gradients accumulate in bf16
        "communication_data_type": settings.reduce_dtype,  # otherwise ranks add them up in bf16
        "zero_allow_untested_optimizer": True,  # torch's AdamW: no compiler, the same update on every device
        "zero_optimization": {
            "stage": settings.stage,
            "reduce_bucket_size": settings.reduce_bucket_size,
            "allgather_bucket_size": settings.reduce_bucket_size,
            "overlap_comm": config.trainer.accelerator == "cuda",
        },
    }


def _quiet() -> None:
    """Silence Lightning's warnings about choices that are deliberate here."""
    for message in (
        ".*does not have many workers.*",
        ".*num_workers.*",
        ".*GPU available but not used.*",
        ".*litlogger.*",
        ".*isinstance.*LeafSpec.*",
        ".*`trainer.fit` was interrupted.*",
        ".*Detected call of `lr_scheduler.step.*",
    ):
        warnings.filterwarnings("ignore", message)
