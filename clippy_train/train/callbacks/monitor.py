"""What a run reports: `metrics.jsonl` (the source of truth), TensorBoard with the same names, and a progress line; in
an audit also `ledger.jsonl`, which documents each step was trained on.

Losses stay on the device until a step is logged. x axis: optimizer step.
"""

import logging
import resource
import shutil
import time
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from clippy_train.config import TrainConfig
from clippy_train.data.batches import Batch
from clippy_train.model.flops import flops_per_token, peak_flops
from clippy_train.model.score import measures
from clippy_train.run.rows import RowFile
from clippy_train.train import collective
from clippy_train.train.callbacks.health import Finite
from clippy_train.train.callbacks.progress import Progress, step_ended
from clippy_train.train.module import CodeLM

log = logging.getLogger(__name__)


class Monitor(pl.Callback):
    """Logs every `trainer.log_every_steps` steps (each step with `trainer.audit`) and after every validation."""

    def __init__(self, config: TrainConfig, progress: Progress, finite: Finite) -> None:
        self.config, self.progress, self.finite = config, progress, finite
        self.validated: dict[int, float] = {}  # bits per byte by step, of the last validation only
        self.digest = 0
        self._clock = Clock()
        self._step_times: list[float] = []  # since the last report, in seconds
        self._wait = 0.0
        self._saved_at = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._clock.run()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self.config.trainer.audit:
            self.digest += sum(map(row_digest, batch["input_ids"].cpu().numpy()))
        if not step_ended(trainer, batch_idx):
            return
        losses, pl_module.micro_losses = pl_module.micro_losses, []
        self._step_times.append(self._clock.lap())
        step, settings = trainer.global_step, self.config.trainer
        if settings.audit or step % settings.log_every_steps == 0 or step == settings.max_steps:
            self._report(trainer, pl_module, losses)
        self.digest = 0
        if step == settings.max_steps:
            trainer.should_stop = True  # Lightning then validates once more, also off the interval

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: Any) -> None:
        self._clock.pause()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._clock.pause()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        row = validation_row(trainer, collective.total(pl_module.val_sums.cpu().numpy()))
        self.validated = {trainer.global_step: row["val/bits_per_byte"]}
        self.write(trainer, row)
        _say(
            trainer,
            "step %d: validation loss %.4f, %.4f bits per byte",
            trainer.global_step,
            row["val/loss"],
            row["val/bits_per_byte"],
        )

    def _report(self, trainer: pl.Trainer, module: CodeLM, losses: list[torch.Tensor]) -> None:
        self.finite.check(trainer)
        step = trainer.global_step
        mean = torch.stack(losses).double().mean().item()
        loss = float(collective.total(np.array([mean]))[0]) / self.config.world_size
        grad_norm = float(module.grad_norm)
        counts = self.progress.all_counts()
        row: dict[str, Any] = {
            "tokens": step * self.config.tokens_per_step,
            "train/loss": loss,
            "train/lr": module.lr,
            "train/grad_norm": grad_norm,
            "train/epoch": float(self.progress.cursors[:, 0].max()),
            **self._throughput(trainer),
            **{f"data/{name}": value for name, value in counts.items()},
            "checkpoint/age": time.monotonic() - self._saved_at,
            "system/rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "system/disk_free": shutil.disk_usage(self.config.run.root).free,
        }
        if trainer.strategy.root_device.type == "cuda":
            row["system/gpu_memory"] = torch.cuda.max_memory_allocated()
        if self.config.trainer.audit:
            row["data/digest"] = f"{sum(collective.gather(self.digest)) % 2**64:016x}"
        self.write(trainer, row)
        _say(trainer, "%s", progress_line(step, self.config.trainer.max_steps, row))

    def _throughput(self, trainer: pl.Trainer) -> dict[str, float]:
        """Speed since the last report, without the time of validation and checkpoints."""
        times, self._step_times = np.array(self._step_times), []
        seconds = max(float(times.sum()), 1e-9)
        waited = trainer.train_dataloader.wait_seconds - self._wait  # type: ignore[union-attr]
        self._wait += waited
        tokens_per_sec = len(times) * self.config.tokens_per_step / seconds
        per_device = tokens_per_sec / self.config.world_size
        median, high = np.quantile(times, (0.5, 0.95)).tolist()
        return {
            "throughput/tokens_per_sec": tokens_per_sec,
            "throughput/tokens_per_sec_per_device": per_device,
            "throughput/step_time": median,
            "throughput/step_time_p95": high,
            "throughput/data_wait": min(1.0, waited / seconds),
            **self._utilisation(trainer, per_device),
        }

    def _utilisation(self, trainer: pl.Trainer, tokens_per_sec: float) -> dict[str, float]:
        """MFU in both conventions of `model.flops`; nothing where the device's peak is not known."""
        peak = device_peak(self.config, trainer.strategy.root_device)
        if peak is None:
            return {}
        model: Any = trainer.lightning_module.model
        flops = flops_per_token(self.config, model.config.vocab_size)
        shares = {convention: tokens_per_sec * each / peak for convention, each in flops.items()}
        return {"throughput/mfu": shares["exact"], "throughput/mfu_palm": shares["palm"]}

    def saved(self, trainer: pl.Trainer, seconds: float, num_bytes: int) -> None:
        """Log what a checkpoint that is complete has cost; training stood still meanwhile."""
        self._saved_at = time.monotonic()
        self.write(trainer, {"checkpoint/seconds": seconds, "checkpoint/bytes": num_bytes})

    def write(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        """Log a row at the current step."""
        for logger in trainer.loggers:
            logger.log_metrics(row, trainer.global_step)


def validation_row(trainer: pl.Trainer, sums: np.ndarray) -> dict[str, float]:
    """`val/<measure>` of all languages together, and loss and bits per byte as `val/<measure>/<language>`."""
    row = {f"val/{name}": value for name, value in measures(sums[1:].sum(axis=0)).items()}
    for language, its_sums in zip(trainer.datamodule.languages, sums[1:], strict=True):  # type: ignore[attr-defined]
        if its_sums[1]:  # a language whose only token is a block's first has no target
            of_language = measures(its_sums)
            row |= {f"val/{name}/{language}": of_language[name] for name in ("loss", "bits_per_byte")}
    return row


def device_peak(config: TrainConfig, device: torch.device) -> float | None:
    """FLOP/s that a device could do at best: as it is set, or as it is known for the GPU in bf16."""
    if config.trainer.peak_tflops is not None:
        return config.trainer.peak_tflops * 1e12
    if device.type != "cuda" or config.trainer.precision != "bf16":
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def progress_line(step: int, max_steps: int, row: dict[str, Any]) -> str:
    """A logged row in one line."""
    mfu = f", MFU {row['throughput/mfu']:.1%}" if "throughput/mfu" in row else ""
    seconds_left = (max_steps - step) * row["tokens"] / step / row["throughput/tokens_per_sec"]
    return (
        f"step {step}/{max_steps}: loss {row['train/loss']:.4f}, lr {row['train/lr']:.2e}, "
        f"grad norm {row['train/grad_norm']:.2f}, {row['throughput/tokens_per_sec']:,.0f} tokens/s{mfu}, "
        f"data wait {row['throughput/data_wait']:.0%}, "
        f"{row.get('system/gpu_memory', row['system/rss']) / 1e9:.1f} GB, "
        f"{timedelta(seconds=round(seconds_left))} left, "
        f"checkpoint {timedelta(seconds=round(row['checkpoint/age']))} old"
    )


class Clock:
    """Wall time that can be paused."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = 0.0

    def run(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def lap(self) -> float:
        """Seconds that it ran since the last lap; it goes on running."""
        self.pause()
        self.run()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Ledger(pl.Callback):
    """Writes `ledger.jsonl` (`trainer.audit`): for each step, what its blocks were cut from.

    `spans` is a list of [stream, epoch, shard, line, first, end] (`data.stream.Span`), block after block: the
    lengths of a block's spans add up to `data.seq_len`. About 30 bytes a span.
    """

    def __init__(self, path: Path, resumed_step: int, rank: int) -> None:
        self._rows = RowFile(path, resumed_step) if rank == 0 else None
        self._spans: list[list[int]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._spans += batch["spans"].tolist()
        if step_ended(trainer, batch_idx):
            spans = [span for rank in collective.gather(self._spans) for span in rank]
            self._spans = []
            if self._rows:
                self._rows.append({"step": trainer.global_step, "spans": spans})


def row_digest(tokens: np.ndarray) -> int:
    """64 bits that identify a row of token ids; their sum modulo 2^64 identifies a set of rows, whatever its order."""
    return int.from_bytes(blake2b(tokens.astype("<i4").tobytes(), digest_size=8).digest(), "little")


def _say(trainer: pl.Trainer, message: str, *values: Any) -> None:
    if trainer.is_global_zero:
        log.info(message, *values)
