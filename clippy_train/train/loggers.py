"""Where rank 0 logs a run: `metrics.jsonl` (the source of truth), TensorBoard and W&B, with the same names."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from clippy_train.config import TrainConfig
from clippy_train.run.folder import (
    METRICS,
    TENSORBOARD,
)
from clippy_train.run.history import changed, phases
from clippy_train.run.rows import RowFile

METRICS_COMPARED = ("val/bits_per_byte", "val/loss", "val/perplexity", "train/loss", "throughput/tokens_per_sec")
HPARAMS = ".hparams"  # suffix of the file with the settings
# TensorBoard's custom scalars: group -> chart -> the names in it, as regular expressions.
CHARTS = {
    "Training": {
        "loss": ["train/loss$", "val/loss$"],
        "learning rate": ["train/lr$"],
        "gradient norm": ["train/grad_norm$"],
        "tokens": ["^tokens$"],
    },
    "Validation": {
        "bits per byte": ["val/bits_per_byte$"],
        "bits per byte by language": ["val/bits_per_byte/.+"],
        "perplexity": ["val/perplexity$"],
        "loss by language": ["val/loss/.+"],
    },
    "Speed": {
        "tokens per second": ["throughput/tokens_per_sec$"],
        "tokens per second and device": ["throughput/tokens_per_sec_per_device$"],
        "model FLOP utilisation": ["throughput/mfu"],
        "share of time waiting for data": ["throughput/data_wait$"],
        "seconds a step": ["throughput/step_time"],
        "slowest rank": ["slowest/.+"],
    },
    "Checkpoints": {
        "age of the last one, in seconds": ["checkpoint/age$"],
        "seconds to save": ["checkpoint/seconds$"],
        "seconds that training waits for it": ["checkpoint/stall$"],
        "step that was saved": ["checkpoint/step$"],
        "bytes": ["checkpoint/bytes$"],
        "failed saves in a row": ["checkpoint/failed$"],
    },
    "System": {
        "memory, in bytes": ["system/rss$", "system/gpu_memory"],
        "free disk, in bytes": ["system/disk_free$"],
    },
    "Data": {
        "documents": ["data/documents$"],
        "characters": ["data/characters$"],
        "left out, by reason": ["data/(rejected|filtered)/.+"],
    },
}

log = logging.getLogger(__name__)


def build_loggers(config: TrainConfig, resumed_step: int) -> list[Logger]:
    """The loggers of a run; they drop what was logged after `resumed_step`."""
    loggers: list[Logger] = [JsonlLogger(config.run_dir / METRICS, resumed_step)]
    if config.logger.tensorboard:
        events = EventLogger(config.run_dir, resumed_step, hparams(config))
        events.describe()
        loggers.append(events)
    if config.logger.wandb:
        loggers.append(WandbRun(config.run_dir))
    return loggers


def hparams(config: TrainConfig) -> dict[str, float | str]:
    """What TensorBoard's HPARAMS tab shows of a run: `logger.hparams`, and every setting that was changed, by step."""
    chosen = dict(each.split("=", 1) for each in config.logger.hparams)
    texts = {**chosen, **changed(phases(config.run_dir, config.trainer.max_steps))}
    return {name: _number(text) for name, text in texts.items()}


class JsonlLogger(Logger):
    """A JSON object per logged row."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        super().__init__()
        self._rows = RowFile(path, resumed_step)

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._rows.append({"step": step, **metrics})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration is beside this file."""


class EventLogger(TensorBoardLogger):
    """TensorBoard: numbers, text, and the layout of the charts. Each call returns after its data is in the file.

    Its writer does not survive a disk error: nothing is written after one.

    Args:
        resumed_step: what an earlier attempt logged after it is hidden.
        hparams: settings for the HPARAMS tab.
    """

    def __init__(self, run_dir: Path, resumed_step: int, hparams: Mapping[str, float | str] | None = None) -> None:
        super().__init__(run_dir, name="", version=TENSORBOARD, purge_step=resumed_step + 1)
        self._broken = False
        self._hparams = dict(hparams or {})

    def describe(self) -> None:
        """Write the layout of the charts, and the `hparams` of this run."""
        groups = {
            group: {chart: ["Multiline", names] for chart, names in charts.items()} for group, charts in CHARTS.items()
        }
        self._write(lambda: self.experiment.add_custom_scalars(groups))
        self._unless_broken(self._write_hparams)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        self._write(lambda: super(EventLogger, self).log_metrics(numbers, step))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show text as code."""
        markdown = "\n".join(f"    {line}" for line in text.splitlines())
        self._write(lambda: self.experiment.add_text(name, markdown, step))

    def save(self) -> None:
        self._unless_broken(super().save)

    def finalize(self, status: str) -> None:
        if self._hparams and status == "success":
            end = self._hparams_summaries()[2]
            self._write(lambda: self.experiment.file_writer.add_summary(end))
        self._unless_broken(lambda: super(EventLogger, self).finalize(status))

    def _hparams_summaries(self) -> Any:
        """What the HPARAMS tab reads: names of settings and metrics, this run's settings, and that it has succeeded."""
        return hparams_summaries(self._hparams, dict.fromkeys(METRICS_COMPARED))

    def _write_hparams(self) -> None:
        """In a file of their own that the next attempt replaces: TensorBoard shows the first ones that it finds."""
        for path in Path(self.log_dir).glob(f"*{HPARAMS}"):
            path.unlink()
        if not self._hparams:
            return
        writer = FileWriter(self.log_dir, filename_suffix=HPARAMS)
        for each in self._hparams_summaries()[:2]:
            writer.add_summary(each)
        writer.close()

    def _write(self, write: Callable[[], Any]) -> None:
        """Write and flush, so that a curve has no gap where a run was killed and resumed."""
        self._unless_broken(write)
        self._unless_broken(lambda: self.experiment.flush())

    def _unless_broken(self, write: Callable[[], Any]) -> None:
        try:
            if not self._broken:
                write()
        except OSError as error:
            self._broken = True
            log.error("TensorBoard logging stops here, %s continues: %s", METRICS, error)


class WandbRun(WandbLogger):
    """Weights & Biases. A run has one id, so a run that was interrupted continues its curves."""

    def __init__(self, run_dir: Path) -> None:
        where = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
        project = os.environ.get("WANDB_PROJECT", "clippy_train")
        super().__init__(name=run_dir.name, save_dir=run_dir, id=where, project=project, resume="allow")

    def finalize(self, status: str) -> None:
        self.experiment.finish(exit_code=int(status != "success"))  # the rank exits without waiting for its threads


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
