"""A trace of some training steps by torch's profiler (`debug=profile`), of rank 0.

It is written to `profile/` in the run folder, for TensorBoard's profiler plugin, Perfetto and chrome://tracing. Traced
steps are slower, and a trace takes some megabytes per micro-batch; other steps cost nothing.
"""

from typing import Any

import lightning.pytorch as pl
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities, tensorboard_trace_handler

from clippy_train.config import TrainConfig
from clippy_train.run.folder import PROFILE
from clippy_train.train.module import code_lm

SKIPPED = 2  # steps of this attempt that compile, allocate and connect


class Profile(pl.Callback):
    """Traces `trainer.profile_steps` steps, after the first two and one that warms up the profiler."""

    def __init__(self, config: TrainConfig) -> None:
        self._trace = profile(
            activities=supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA},
            schedule=schedule(skip_first=SKIPPED, wait=0, warmup=1, active=config.trainer.profile_steps, repeat=1),
            on_trace_ready=tensorboard_trace_handler(str(config.run_dir / PROFILE), "rank0"),
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trace.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if code_lm(pl_module).step.ended:
            self._trace.step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trace.stop()
