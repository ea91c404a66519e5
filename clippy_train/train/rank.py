"""One rank of a run, from its frozen configuration to the end of training.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are in the environment.
"""

import errno
import gc
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import GPTNeoForCausalLM, PreTrainedTokenizerFast

from clippy_train.config import TrainConfig, load
from clippy_train.data.mixture import data_ended, open_sources
from clippy_train.errors import CheckpointError, ClippyError, ConfigError, Interrupted, MachineFault, first_line
from clippy_train.files import full_disks
from clippy_train.model.build import build_described, build_model
from clippy_train.model.flops import vocab_size
from clippy_train.model.memory import memory
from clippy_train.report import escape_unprintable, quiet_transformers, set_up_log
from clippy_train.run.checkpoint import Checkpoint, read_checkpoint
from clippy_train.run.consolidate import WEIGHTS_FILE, set_weights
from clippy_train.run.folder import CONFIG, HF_FOLDER, METRICS, STATE, lost_file
from clippy_train.run.identity import data_identity
from clippy_train.run.moments import open_base_state
from clippy_train.run.plain import plain_loads
from clippy_train.run.rows import validated
from clippy_train.run.start import Start, read_start
from clippy_train.tokenizer import token_bytes, tokenizer_fingerprint
from clippy_train.train.callbacks.order import build_callbacks
from clippy_train.train.callbacks.preemption import SignalFlag
from clippy_train.train.callbacks.progress import fresh_cursors, validation_due
from clippy_train.train.callbacks.watchdog import Watchdog
from clippy_train.train.data import DataModule
from clippy_train.train.internals import validate_on_resume
from clippy_train.train.loggers import build_loggers
from clippy_train.train.module import CodeLM
from clippy_train.train.strategy import build_trainer

SHARED_MEMORY = Path("/dev/shm")  # through which the processes of `data.num_workers` hand over their batches
TOKENIZER = "tokenizer fingerprint"  # in a checkpoint's manifest, beside `data_identity`


def train_rank(config: TrainConfig, start: Start, flag: SignalFlag) -> None:
    """Train from where `start` says to `trainer.max_steps`.

    Raises:
        Interrupted: a signal arrived; a checkpoint of the last step is complete.
    """
    gc.freeze()  # what is imported stays: DeepSpeed's full collections would take 0.3 s each
    rank = int(os.environ["RANK"])
    watchdog = Watchdog(config.run_dir, rank, config.trainer.watchdog_seconds)
    pl.seed_everything(config.seed + rank, verbose=False)
    model, tokenizer = first_model(config, start)
    sources = open_sources(config.data, "train")
    identity = {**data_identity(config, sources), TOKENIZER: tokenizer_fingerprint(tokenizer)}
    checkpoint = read_checkpoint(start.checkpoint) if start.checkpoint else None  # the launcher has verified its files
    if checkpoint:
        require_same_tokenizer(checkpoint, identity[TOKENIZER])
    if rank == 0 and not start.description:  # the other ranks may be reading it
        save_description(config.run_dir / HF_FOLDER, model, tokenizer)

    moments = start.consolidated or start.base_moments
    native = checkpoint.path / STATE if checkpoint and not start.consolidated else None
    cursors = np.array(checkpoint.manifest.cursors) if checkpoint else fresh_cursors(config.data.streams)
    base = open_base_state(moments) if moments else None
    resumed_step = checkpoint.manifest.step if checkpoint else -1
    if checkpoint and data_ended(config, sources, cursors):  # only the last validation is missing
        config = replace(config, trainer=replace(config.trainer, max_steps=resumed_step))
    callbacks = build_callbacks(
        config,
        rank,
        watchdog=watchdog,
        flag=flag,
        tokenizer=tokenizer,
        sources=sources,
        identity=identity,
        cursors=cursors,
        resumed=checkpoint,
        native=native,
        base=base,
    )
    trainer = build_trainer(
        config,
        callbacks=callbacks,
        logger=build_loggers(config, resumed_step) if rank == 0 else False,
        num_sanity_val_steps=-1 if validates_first(config, resumed_step) else 0,
    )
    if checkpoint:
        validate_on_resume(trainer)  # if it validates at all: `num_sanity_val_steps`
    module = CodeLM(config, model, token_bytes(tokenizer, model.config.vocab_size))
    data = DataModule(config, tokenizer, rank, cursors, base.step if base else max(0, resumed_step))
    with plain_loads():  # Lightning and DeepSpeed would run code in a checkpoint
        trainer.fit(module, data, ckpt_path=native)


def first_model(config: TrainConfig, start: Start) -> tuple[GPTNeoForCausalLM, PreTrainedTokenizerFast]:
    """The model and tokenizer that an attempt begins with. The strategy restores a checkpoint that is not resharded."""
    described = start.description
    model, tokenizer = build_described(described, config.model) if described else build_model(config)
    if start.consolidated:
        set_weights(model, load_file(start.consolidated / WEIGHTS_FILE))
    return model, tokenizer


def validates_first(config: TrainConfig, resumed_step: int) -> bool:
    """Whether a run validates before its first step: a new run, or one that resumes where a validation is missing."""
    missing = validation_due(config, resumed_step) and not validated(config.run_dir / METRICS, resumed_step)
    return resumed_step < 0 or missing


def require_same_tokenizer(checkpoint: Checkpoint, found: str) -> None:
    """Raise CheckpointError if texts have other ids now. (The launcher cannot check it: it loads no tokenizer.)"""
    if checkpoint.manifest.data[TOKENIZER] != found:
        raise CheckpointError(
            f"{checkpoint.path} was trained with another tokenizer: the same text has other ids now. Restore the files "
            "that tokenizer.base (or model.base) names, or start a new run with another run.name"
        )


def save_description(folder: Path, model: GPTNeoForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """What an export needs besides the weights: the model's configuration and its tokenizer."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(run_dir: str) -> int:
    """Run this rank and return its exit code."""
    flag = SignalFlag()
    flag.install()
    threading.Thread(target=_die_with_agent, daemon=True).start()
    _set_up_logging()
    rank = os.environ["RANK"]
    try:
        config = load(Path(run_dir) / CONFIG)
        train_rank(config, read_start(Path(run_dir)), flag)
        _leave_group()
    except Interrupted as error:
        _leave_group()
        if rank == "0":
            print(error, file=sys.stderr)
        return error.exit_code
    except ClippyError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return error.exit_code
    except torch.OutOfMemoryError as error:
        expected = memory(config, vocab_size(config)).peak / 1e9
        print(
            f"rank {rank}: out of memory with trainer.micro_batch_size={config.trainer.micro_batch_size}, for which "
            f"`clippy plan` expects {expected:.3g} GB ({first_line(error)}). Lower it: "
            "trainer.global_batch_size stays, accumulation grows. `clippy plan memory_gb=...` says what fits",
            file=sys.stderr,
        )
        return ConfigError.exit_code
    except Exception as error:
        if _lost(error):
            path = lost_file(Path(run_dir), int(rank))
            path.parent.mkdir(exist_ok=True)
            path.write_text(traceback.format_exc())
            if not os.environ.get("CLIPPY_LAUNCHED"):  # no agent to say more
                print(f"rank {rank}: lost the others or its device: {first_line(error)}", file=sys.stderr)
            return MachineFault.exit_code
        full = _without_room(error, Path(run_dir), SHARED_MEMORY)
        if not full:
            print(f"rank {rank}: {traceback.format_exc()}", file=sys.stderr)
            return 1
        print(f"rank {rank}: no space left on {full} ({first_line(error)}): free some", file=sys.stderr)
        return ConfigError.exit_code
    return 0


def _lost(error: Exception) -> bool:
    """Whether a rank has lost its device or the other ranks, whose agents know more."""
    return isinstance(error, torch.distributed.DistError) or bool(re.search(r"gloo/|NCCL|\bECC\b", str(error)))


def _without_room(error: Exception, *paths: Path) -> str:
    """Which of the paths had no room left, if that can have caused the error."""
    if not isinstance(error, OSError | RuntimeError):
        return ""
    since_freed = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full_disks(*paths) or (" or ".join(map(str, paths)) if since_freed else "")


def _leave_group() -> None:
    """Only where all ranks leave together: after one has failed, this could wait until the watchdog expires."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _die_with_agent() -> None:
    """The agent holds the other end of this rank's standard input, which ends when the agent does."""
    if os.environ.get("CLIPPY_LAUNCHED"):
        os.read(0, 1)  # not through sys.stdin: a forked loader process would wait for its lock
        os._exit(1)


def _set_up_logging() -> None:
    escape_unprintable()
    set_up_log()
    logging.getLogger("clippy_train").setLevel(logging.INFO)
    quiet_transformers()
    for name in ("lightning.pytorch", "lightning.fabric", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(lightning|torch|deepspeed).*")
