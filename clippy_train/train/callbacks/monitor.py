"""What a run reports: a row of measurements for each logged step and each validation, and a progress line.

Losses stay on the device until a step is logged. The x axis of every curve is the optimizer step.
"""

import logging
import resource
import shutil
import socket
import time
from datetime import timedelta
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import numpy as np
import torch

from clippy_train.config import TrainConfig
from clippy_train.data.batches import Batch, TrainBatches
from clippy_train.data.mixture import Source
from clippy_train.data.scored import Group
from clippy_train.model.flops import flops_per_token, peak_flops
from clippy_train.model.score import measures
from clippy_train.run.rows import SCORE
from clippy_train.train import collective
from clippy_train.train.callbacks.health import Health
from clippy_train.train.callbacks.ledger import block_digest
from clippy_train.train.callbacks.progress import Progress
from clippy_train.train.clock import Clock, Span, seconds
from clippy_train.train.module import CodeLM, code_lm, groups

Row = dict[str, Any]

log = logging.getLogger(__name__)


class Lap(NamedTuple):
    """Where the time of an optimizer step went.

    Attributes:
        step: all of it, without validations and checkpoints.
        forward: the forward passes. Ranks wait for each other in the backward pass, so this shows which one is slow.
        waited: seconds of waiting for data.
    """

    step: list[Span]
    forward: list[Span]
    waited: float


class Monitor(pl.Callback):
    """Logs every `trainer.log_every_steps` steps (every step with `trainer.audit`) and after every validation."""

    def __init__(self, config: TrainConfig, progress: Progress, health: Health) -> None:
        self.config, self.progress, self.health = config, progress, health
        self.digest = 0
        self._steps, self._forward = Clock(), Clock()
        self._laps: list[Lap] = []  # of the steps since the last report
        self._waited = 0.0
        self._saved_at = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._steps.run(pl_module.device)
        self._forward.run(pl_module.device)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self._forward.pause(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        module, settings = code_lm(pl_module), self.config.trainer
        if settings.audit:
            self.digest += sum(map(block_digest, batch["input_ids"].cpu().numpy()))
        if not module.step.ended:
            return
        self._laps.append(self._lap(trainer, pl_module.device))
        step = trainer.global_step
        if settings.audit or step % settings.log_every_steps == 0 or self.progress.ended:
            self._report(trainer, module)
        self.digest = 0

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        self._steps.pause(pl_module.device)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps.pause(pl_module.device)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, sums = trainer.global_step, code_lm(pl_module).val_sums
        row = validation_row(groups(trainer), collective.total(sums.cpu().numpy()))
        self.write(trainer, row)
        loss, bits = row["val/loss"], row[SCORE]
        _log(trainer, f"step {step}: validation loss {loss:.4f}, {bits:.4f} bits per byte")

    def _report(self, trainer: pl.Trainer, module: CodeLM) -> None:
        self.health.check(trainer)
        step, state, epochs = trainer.global_step, module.step, self.progress.all_epochs()
        mean = torch.stack(state.losses).double().mean().item()
        row: Row = {
            "tokens": step * self.config.tokens_per_step,
            "train/loss": float(collective.total(np.array([mean]))[0]) / self.config.world_size,
            "train/lr": state.lr,
            "train/grad_norm": float(state.grad_norm),
            "train/epoch": float(epochs.max()),
            **self._throughput(module),
            **{f"data/{name}": value for name, value in self.progress.all_counts().items()},
            **source_rows(self.progress.sources, epochs, step * self.config.tokens_per_step),
            "checkpoint/age": time.monotonic() - self._saved_at,
            "system/rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "system/disk_free": shutil.disk_usage(self.config.run.root).free,
        }
        if module.device.type == "cuda":
            row["system/gpu_memory"] = torch.cuda.max_memory_allocated()
        if self.config.trainer.audit:
            row["data/digest"] = f"{sum(collective.gather(self.digest)) % 2**64:016x}"
        self.write(trainer, row)
        _log(trainer, progress_line(step, self.config.trainer.max_steps, row))

    def _lap(self, trainer: pl.Trainer, device: torch.device) -> "Lap":
        self._steps.pause(device)
        waited = cast(TrainBatches, trainer.train_dataloader).wait_seconds
        lap = Lap(self._steps.take(), self._forward.take(), waited - self._waited)
        self._waited = waited
        self._steps.run(device)
        return lap

    def _throughput(self, module: CodeLM) -> dict[str, Any]:
        """Speed since the last report, without the time of validations and checkpoints. Collective."""
        laps, self._laps = self._laps, []
        times = np.array([seconds(lap.step) for lap in laps])
        total, waited = max(float(times.sum()), 1e-9), sum(lap.waited for lap in laps)
        tokens_per_sec = len(times) * self.config.tokens_per_step / total
        per_device = tokens_per_sec / self.config.world_size
        median, high = np.quantile(times, (0.5, 0.95)).tolist()
        own = float(np.median([seconds(lap.forward) + lap.waited for lap in laps]))
        return {
            "throughput/tokens_per_sec": tokens_per_sec,
            "throughput/tokens_per_sec_per_device": per_device,
            "throughput/step_time": median,
            "throughput/step_time_p95": high,
            "throughput/data_wait": min(1.0, waited / total),
            **slowest("own_time", own),
            **slowest("data_wait", min(1.0, waited / total)),
            **self._utilisation(module, per_device),
        }

    def _utilisation(self, module: CodeLM, tokens_per_sec: float) -> dict[str, float]:
        """MFU in both conventions of `model.flops`; nothing if the device's peak is not known."""
        peak = device_peak(self.config, module.device)
        if peak is None:
            return {}
        flops = flops_per_token(self.config, module.model.config.vocab_size)
        shares = {convention: tokens_per_sec * each / peak for convention, each in flops.items()}
        return {"throughput/mfu": shares["exact"], "throughput/mfu_palm": shares["palm"]}

    def saved(self, trainer: pl.Trainer, step: int, stall: float, duration: float, num_bytes: int) -> None:
        """Log what the checkpoint of `step` cost: seconds for which training stopped, and until it was complete."""
        self._saved_at = time.monotonic()
        costs = {"checkpoint/stall": stall, "checkpoint/seconds": duration, "checkpoint/bytes": num_bytes}
        self.write(trainer, {"checkpoint/step": step, **costs})

    def write(self, trainer: pl.Trainer, row: Row) -> None:
        """Log a row at the current step."""
        for logger in trainer.loggers:
            logger.log_metrics(row, trainer.global_step)


def source_rows(sources: list[Source], epochs: np.ndarray, tokens: int) -> Row:
    """Of each source of a mixture: tokens trained, of `tokens` in all, and the epoch of its most advanced stream."""
    row: Row = {}
    for source in (each for each in sources if each.name):
        row[f"data/tokens/{source.name}"] = tokens // len(epochs) * len(source.streams)
        row[f"data/epoch/{source.name}"] = float(epochs[list(source.streams)].max())
    return row


def slowest(name: str, value: float) -> dict[str, Any]:
    """The largest value of all ranks, with its rank and host: `slowest/<name>`, `..._rank`, `..._host`. Collective."""
    values = collective.gather((value, socket.gethostname()))
    rank = max(range(len(values)), key=lambda rank: values[rank][0])
    largest, host = values[rank]
    return {f"slowest/{name}": largest, f"slowest/{name}_rank": rank, f"slowest/{name}_host": host}


def validation_row(found: list[Group], sums: np.ndarray) -> dict[str, float]:
    """`val/<measure>` over all languages, and loss and bits per byte as `val/<measure>/<language>`; the latter also as
    `val/sources/<measure>/<source>` for a mixture; the same for reference solutions under `val/solutions/`.

    Args:
        sums: `[1 + groups, 3]`, see `model.score`.
    """
    split, sources, solutions = Sums(), Sums(), Sums()
    for group, its_sums in zip(found, sums[1:], strict=True):
        (solutions if group.solution else split).add(group.language, its_sums)
        if group.source:
            sources.add(group.source, its_sums)
    return {
        **_total("val/", split),
        **_apart("val/", split),
        **_apart("val/sources/", sources),
        **_total("val/solutions/", solutions),
        **_apart("val/solutions/", solutions),
    }


class Sums(dict[str, np.ndarray]):
    """Sums of `model.score` by name."""

    def add(self, name: str, sums: np.ndarray) -> None:
        self[name] = self.get(name, 0) + sums


def _total(prefix: str, by_name: Sums) -> dict[str, float]:
    sums = list(by_name.values())
    return {prefix + name: value for name, value in measures(np.sum(sums, axis=0)).items()} if sums else {}


def _apart(prefix: str, by_name: Sums) -> dict[str, float]:
    """Without a language whose only token is a block's first, which has no target."""
    found = {name: measures(its_sums) for name, its_sums in by_name.items() if its_sums[1]}
    return {f"{prefix}{each}/{name}": found[name][each] for name in found for each in ("loss", "bits_per_byte")}


def device_peak(config: TrainConfig, device: torch.device) -> float | None:
    """Peak FLOP/s of a device: as configured, or as known for the GPU in bf16."""
    if config.trainer.peak_tflops is not None:
        return config.trainer.peak_tflops * 1e12
    if device.type != "cuda" or config.trainer.precision != "bf16":
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def progress_line(step: int, max_steps: int, row: Row) -> str:
    """A logged row as one line for a terminal or a log file."""
    memory = row["system/gpu_memory" if "system/gpu_memory" in row else "system/rss"]
    mfu = f", MFU {row['throughput/mfu']:.1%}" if "throughput/mfu" in row else ""
    seconds_left = (max_steps - step) * row["tokens"] / step / row["throughput/tokens_per_sec"]
    return (
        f"step {step}/{max_steps}: loss {row['train/loss']:.4f}, lr {row['train/lr']:.2e}, "
        f"grad norm {row['train/grad_norm']:.2f}, {row['throughput/tokens_per_sec']:,.0f} tokens/s{mfu}, "
        f"data wait {row['throughput/data_wait']:.0%}, "
        f"{memory / 1e9:.1f} GB, "
        f"{timedelta(seconds=round(seconds_left))} left, "
        f"checkpoint {timedelta(seconds=round(row['checkpoint/age']))} old"
    )


def _log(trainer: pl.Trainer, message: str) -> None:
    if trainer.is_global_zero:
        log.info("%s", message)
