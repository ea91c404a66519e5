"""The strategy and the DeepSpeed configuration of a run: the only place that turns our keys into theirs.

DeepSpeed runs on CPU here too, through its own CPU accelerator and gloo, so that what is tested on a laptop is the code
that runs on a cluster. Leans on private parts of Lightning 2.6 and DeepSpeed 0.19; a test of two real ranks guards it.
"""

import io
import warnings
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import deepspeed.ops
import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch.distributed.optim import ZeroRedundancyOptimizer

from clippy_train.config import TrainConfig


class ExactDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, with gradients of the right size and without DeepSpeed's memory report."""

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Lightning 2.6 divides the loss by the accumulation steps, and DeepSpeed's engine would divide it again: the
        # gradient norm would be that many times too small, and clipping would never act.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def _setup_model_and_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with redirect_stdout(io.StringIO()):
            return super()._setup_model_and_optimizer(*args, **kwargs)


class CPUDeepSpeedStrategy(ExactDeepSpeedStrategy):
    """... and without Lightning's demand for CUDA."""

    def setup_environment(self) -> None:
        # DeepSpeed would compile a shared-memory all-reduce: minutes, a compiler, and a lock that outlives a crash.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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


def build_trainer(config: TrainConfig, **kwargs: Any) -> pl.Trainer:
    """A Trainer that runs exactly what the configuration says: our own callbacks, loggers and checkpoints only."""
    settings, (num_nodes, devices) = config.trainer, config.nodes_and_devices
    _quiet()
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
        inference_mode=False,  # what a validation caches, such as a mask, is used in training
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def build_strategy(config: TrainConfig) -> Strategy:
    cpu = config.trainer.accelerator == "cpu"
    if config.strategy.name == "single":
        return SingleDeviceStrategy("cpu" if cpu else "cuda:0")
    backend = "gloo" if cpu else "nccl"
    if not config.deepspeed:
        return DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)
    kind = CPUDeepSpeedStrategy if cpu else ExactDeepSpeedStrategy
    return kind(config=deepspeed_config(config), process_group_backend=backend)


def partitioned(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """ZeRO-1 in whole tensors: the same optimizer, but each rank updates its share of the tensors and sends them round.

    For Adafactor, whose update of a weight depends on its row, its column and its tensor. DeepSpeed would hand it a
    slice of one flat vector instead, and train on with other updates.
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
        "zero_allow_untested_optimizer": True,  # torch's AdamW: no compiler needed, and the same update on every device
        "zero_optimization": {
            "stage": settings.stage,
            "reduce_bucket_size": settings.reduce_bucket_size,
            "allgather_bucket_size": settings.reduce_bucket_size,
            "overlap_comm": config.trainer.accelerator == "cuda",
        },
    }


def _quiet() -> None:
    """Silence what Lightning says about choices that are deliberate here."""
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
