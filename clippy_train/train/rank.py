"""One rank of a run, from its frozen configuration to the end of training, in the process that `train.__main__` is.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are in the environment.
"""

import logging
import os
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from safetensors.torch import load_file

from clippy_train.config import TrainConfig, load
from clippy_train.data.stream import COUNTS
from clippy_train.errors import CheckpointError, ClippyError, Interrupted
from clippy_train.launch.start import base_state
from clippy_train.model.build import build
from clippy_train.report import quiet_transformers
from clippy_train.run.checkpoint import (
    Checkpoint,
    read_checkpoint,
)
from clippy_train.run.consolidate import WEIGHTS_FILE, set_weights
from clippy_train.run.folder import (
    CONFIG,
    HF_FOLDER,
    LEDGER,
    STATE,
)
from clippy_train.run.identity import data_identity
from clippy_train.run.moments import BaseState, open_base_state
from clippy_train.shards.sources import open_corpus
from clippy_train.tokenizer import fingerprint, token_bytes
from clippy_train.train.callbacks.checkpointer import Checkpointer
from clippy_train.train.callbacks.health import Finite
from clippy_train.train.callbacks.monitor import Ledger, Monitor
from clippy_train.train.callbacks.preemption import Flag, Preemption
from clippy_train.train.callbacks.profile import Profile
from clippy_train.train.callbacks.progress import Progress, fresh_cursors
from clippy_train.train.callbacks.samples import Samples
from clippy_train.train.callbacks.watchdog import Watchdog
from clippy_train.train.data import DataModule
from clippy_train.train.loggers import build_loggers
from clippy_train.train.module import CodeLM
from clippy_train.train.restore import Continuation, ExactWeights
from clippy_train.train.strategy import build_trainer

TOKENIZER = "tokenizer fingerprint"  # in a checkpoint's manifest, beside `data_identity`


def train_rank(config: TrainConfig, checkpoint: Checkpoint | None, whole: Path | None, flag: Flag) -> None:
    """Train from `checkpoint` (or from the start) to `trainer.max_steps`.

    Its own files give the state, bit for bit; or its consolidated state in `whole` does, if there is one.

    Raises:
        Interrupted: a signal came; a checkpoint of the last step is complete.
    """
    rank = int(os.environ["RANK"])
    watchdog = Watchdog(config.run_dir, rank, config.trainer.watchdog_seconds)
    pl.seed_everything(config.seed + rank, verbose=False)
    model, tokenizer = build(config)
    corpus = open_corpus(config.data, "train")
    identity = {**data_identity(config, corpus.fingerprint), TOKENIZER: fingerprint(tokenizer)}
    if checkpoint:
        require_same_tokenizer(checkpoint, identity[TOKENIZER])
    if rank == 0:
        save_description(config.run_dir / HF_FOLDER, model, tokenizer)

    manifest = checkpoint.manifest if checkpoint else None
    base = open_base_state(whole) if whole else None if manifest else base_state(config)
    if whole:
        set_weights(model, load_file(whole / WEIGHTS_FILE))
    native = checkpoint.path / STATE if checkpoint and not whole else None
    kept = manifest.step if manifest else -1  # the last step whose rows stay: without a checkpoint, all come again
    cursors = np.array(manifest.cursors) if manifest else fresh_cursors(config.data.streams)
    counts = np.array([manifest.counts[name] if manifest else 0 for name in COUNTS])

    progress, finite = Progress(config, cursors, counts, corpus.shards), Finite(config.micro_steps, corpus.shards)
    monitor = Monitor(config, progress, finite)
    checkpointer = Checkpointer(config, progress, finite, monitor, identity, resumed=checkpoint)
    trainer = build_trainer(
        config,
        callbacks=[
            progress,
            watchdog,
            finite,
            monitor,
            *([Ledger(config.run_dir / LEDGER, kept, rank)] if config.trainer.audit else []),
            *([Samples(config, tokenizer, kept, rank)] if config.logger.sample_prompts else []),
            *([Profile(config)] if config.trainer.profile_steps and rank == 0 else []),
            checkpointer,
            Preemption(config, flag, checkpointer),
            *starting(config, native, base),
        ],
        logger=build_loggers(config, kept) if rank == 0 else False,
        num_sanity_val_steps=0 if manifest else -1,
    )
    module = CodeLM(config, model, token_bytes(tokenizer, model.config.vocab_size))
    data = DataModule(config, tokenizer, rank, cursors)
    trainer.fit(module, data, ckpt_path=native)


def require_same_tokenizer(checkpoint: Checkpoint, found: str) -> None:
    """Raises CheckpointError if texts have other ids now. (The launcher, which loads no tokenizer, cannot tell.)"""
    if checkpoint.manifest.data[TOKENIZER] != found:
        raise CheckpointError(
            f"{checkpoint.path} was trained with another tokenizer: the same text has other ids now. Restore the files "
            "that tokenizer.base (or model.base) names, or start a new run with another run.name"
        )


def starting(config: TrainConfig, native: Path | None, base: BaseState | None) -> list[pl.Callback]:
    """What sets the state of a run that the strategy does not restore from its own files."""
    callbacks: list[pl.Callback] = []
    if config.deepspeed and config.trainer.precision == "bf16" and native is None:
        callbacks.append(ExactWeights())
    if base:
        callbacks.append(Continuation(config, base))
    return callbacks


def save_description(folder: Path, model: Any, tokenizer: Any) -> None:
    """What an export needs besides the weights: the model's configuration and its tokenizer."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(run_dir: str, checkpoint: str | None = None, whole: str | None = None) -> int:
    """Run this rank and return its exit code.

    Args:
        whole: folder of the checkpoint's consolidated state, for a run that is laid out otherwise.
    """
    flag = Flag()
    flag.install()
    threading.Thread(target=_die_with_launcher, daemon=True).start()
    _log_quietly()
    rank = os.environ["RANK"]
    try:
        config = load(Path(run_dir) / CONFIG)
        opened = read_checkpoint(Path(checkpoint)) if checkpoint else None  # the launcher has verified its files
        train_rank(config, opened, Path(whole) if whole else None, flag)
    except Interrupted as error:
        if rank == "0":
            print(error, file=sys.stderr)
        return error.exit_code
    except ClippyError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return error.exit_code
    except Exception:
        print(f"rank {rank}: {traceback.format_exc()}", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _die_with_launcher() -> None:
    """The launcher holds the other end of this rank's standard input: it ends when the launcher does."""
    if os.environ.get("CLIPPY_LAUNCHED"):
        os.read(0, 1)  # not through sys.stdin: a forked loader process would wait for its lock
        os._exit(1)


def _log_quietly() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("clippy_train").setLevel(logging.INFO)
    quiet_transformers()
    for name in ("lightning.pytorch", "lightning.fabric", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(lightning|torch|deepspeed).*")
