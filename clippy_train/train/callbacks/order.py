"""The callbacks of a run, in the one order that is right. Lightning calls each hook in this order."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from transformers import PreTrainedTokenizerFast

from clippy_train.config import TrainConfig
from clippy_train.data.mixture import Source, shard_names
from clippy_train.data.stream import COUNTS
from clippy_train.run.checkpoint import Checkpoint
from clippy_train.run.folder import LEDGER
from clippy_train.run.moments import BaseState
from clippy_train.train.callbacks.checkpointer import Checkpointer
from clippy_train.train.callbacks.health import Health
from clippy_train.train.callbacks.ledger import Ledger
from clippy_train.train.callbacks.monitor import Monitor
from clippy_train.train.callbacks.preemption import Preemption, SignalFlag
from clippy_train.train.callbacks.profile import Profile
from clippy_train.train.callbacks.progress import Progress
from clippy_train.train.callbacks.samples import Samples
from clippy_train.train.callbacks.watchdog import Watchdog
from clippy_train.train.restore import ApplySettings, RestoreMoments, RestoreWeights


def build_callbacks(
    config: TrainConfig,
    rank: int,
    *,
    watchdog: Watchdog,
    flag: SignalFlag,
    tokenizer: PreTrainedTokenizerFast,
    sources: list[Source],
    identity: dict[str, Any],
    cursors: np.ndarray,
    resumed: Checkpoint | None,
    native: Path | None,
    base: BaseState | None,
) -> list[pl.Callback]:
    """The callbacks of one rank.

    Args:
        sources: the training data.
        identity: what the order of the data depends on.
        cursors: `[streams, 5]`, where each stream continues.
        resumed: the checkpoint that the run resumes from.
        native: what the strategy restores by itself.
        base: the moments that the strategy does not restore.
    """
    manifest = resumed.manifest if resumed else None
    resumed_step = manifest.step if manifest else -1  # without a checkpoint every row is dropped
    counts = np.array([manifest.counts[name] if manifest else 0 for name in COUNTS])
    progress = Progress(config, cursors, counts, sources)
    health = Health(config.micro_steps, shard_names(sources), config.data)
    monitor = Monitor(config, progress, health)
    checkpointer = Checkpointer(config, progress, health, monitor, identity, resumed)
    exact_weights = config.deepspeed and config.trainer.precision == "bf16" and native is None
    return [
        progress,  # before all that read the cursors of the step: reports and checkpoints
        watchdog,
        health,  # before the monitor and the checkpointer, which ask it whether the step was finite
        monitor,  # before the checkpointer, which saves the validation's score
        # What these write about a step is on disk before the step's checkpoint is
        *([Ledger(config.run_dir / LEDGER, resumed_step, rank)] if config.trainer.audit else []),
        *([Samples(config, tokenizer, resumed_step, rank)] if config.logger.sample_prompts else []),
        *([Profile(config)] if config.trainer.profile_steps and rank == 0 else []),
        checkpointer,
        Preemption(config, flag, checkpointer),  # last of those that act on a step: it leaves
        # Before training starts: weights before moments, since both set DeepSpeed's partitions
        *([RestoreWeights()] if exact_weights else []),
        *([RestoreMoments(config, base)] if base else []),
        *([ApplySettings(config.optim)] if native else []),
    ]
