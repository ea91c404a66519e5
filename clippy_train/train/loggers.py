"""Where rank 0 logs a run: `metrics.jsonl` (the source of truth), TensorBoard and W&B, with the same names."""

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE
from tensorboard.plugins.hparams.metadata import PLUGIN_DATA_VERSION
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from torch.utils.tensorboard.summary import hparams as hparams_summaries
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from clippy_train.config import TrainConfig, as_document, values
from clippy_train.errors import Interrupted
from clippy_train.run.folder import METRICS, VALIDATION
from clippy_train.run.history import changed, phases
from clippy_train.run.rows import SCORE, RowFile, read_rows

BEST = "val/best"  # TensorBoard only: the lowest bits per byte so far, without the validation of the untrained model
LOSS = "Loss"  # TensorBoard only: sorts before all other names, so that the page that opens first begins with it
METRICS_COMPARED = (BEST, "train/loss", "throughput/tokens_per_sec")
# Suffixes of event files that the next attempt removes, since TensorBoard keeps what it reads first: the settings, and
# that the last attempt failed.
SETTINGS, FAILED = ".settings", ".failed"
DESCRIBED = ("model", "tokenizer", "data", "optim", "strategy", "trainer", "checkpoint", "seed")  # in TensorBoard
# TensorBoard's custom scalars: group -> chart -> the names in it, as regular expressions.
CHARTS = {
    "Training": {
        "loss": ["train/loss$", "val/loss$"],
        "learning rate": ["train/lr$"],
        "gradient norm": ["train/grad_norm$"],
        "tokens": ["^tokens$"],
    },
    "Validation": {
        "bits per byte": ["val/bits_per_byte$", "val/best$"],
        "bits per byte by language": ["val/bits_per_byte/.+"],
        "perplexity": ["val/perplexity$"],
        "loss by language": ["val/loss/.+"],
        "loss by source": ["val/sources/loss/.+"],
        "bits per byte by source": ["val/sources/bits_per_byte/.+"],
        "bits per byte of solutions": ["val/solutions/bits_per_byte"],
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
        "tokens by source": ["data/tokens/.+"],
        "epoch by source": ["data/epoch/.+"],
    },
}

log = logging.getLogger(__name__)


def build_loggers(config: TrainConfig, resumed_step: int) -> list[Logger]:
    """The loggers of a run; they drop what was logged after `resumed_step`."""
    loggers: list[Logger] = [JsonlLogger(config.run_dir / METRICS, resumed_step)]
    if config.logger.tensorboard:
        events = EventLogger(config.run_dir, resumed_step, settings(config), config.logger.hparams)
        events.describe(as_document(config))
        loggers.append(events)
    if config.logger.wandb:
        loggers.append(WandbRun(config.run_dir, settings(config)))
    return loggers


def settings(config: TrainConfig) -> dict[str, str]:
    """The settings that TensorBoard compares; of one that was changed, every value with its steps."""
    shown = {name: str(value) for name, value in values(config).items() if name.split(".")[0] in DESCRIBED}
    return {**shown, **changed(phases(config.run_dir))}


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

    Its files are in the run folder itself, so a run has its own name. Its writer does not survive a disk error:
    nothing is written after one.

    Args:
        resumed_step: what an earlier attempt logged after it is hidden.
        settings: the run's, by name.
        hparams: NAME=VALUE of the settings that are columns of the HPARAMS tab; empty for all.
    """

    def __init__(
        self, run_dir: Path, resumed_step: int, settings: Mapping[str, str] | None = None, hparams: Sequence[str] = ()
    ) -> None:
        super().__init__(run_dir, name="", version="", purge_step=resumed_step + 1)
        self._broken, self._first_step = False, resumed_step + 1
        self._columns = dict(each.split("=", 1) for each in hparams) or dict(settings or {})
        self._settings = {**(settings or {}), **self._columns}
        rows = (row for row in read_rows(run_dir / METRICS, SCORE) if 0 < row["step"] <= resumed_step)
        self._best = min((row[SCORE] for row in rows), default=inf)
        # TensorBoard gives a colour to a run, not to a curve.
        self._validation = SummaryWriter(str(run_dir / VALIDATION), purge_step=self._first_step)
        for suffix in (SETTINGS, FAILED):
            for path in run_dir.glob(f"*{suffix}"):
                path.unlink()

    def describe(self, text: str = "") -> None:
        """Write the layout of the charts and the settings, also as a text."""
        groups = {
            group: {chart: ["Multiline", names] for chart, names in charts.items()} for group, charts in CHARTS.items()
        }
        self._write(lambda: self.experiment.add_custom_scalars(groups))
        self._write_apart(SETTINGS, _hparams(self._columns)[0], _hparams(self._settings)[1])
        self.log_text("settings", text, self._first_step)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        if SCORE in numbers and step:
            self._best = numbers[BEST] = min(self._best, numbers[SCORE])
        if "train/loss" in numbers:
            numbers[LOSS] = numbers["train/loss"]
        if "val/loss" in numbers:
            self._unless_broken(lambda: self._validation.add_scalar(LOSS, numbers["val/loss"], step))
            self._unless_broken(self._validation.flush)
        self._write(lambda: super(EventLogger, self).log_metrics(numbers, step))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Show text as code."""
        markdown = "\n".join(f"    {line}" for line in text.splitlines())
        self._write(lambda: self.experiment.add_text(name, markdown, step))

    def save(self) -> None:
        """Nothing: what is logged is flushed, and the settings are beside it."""

    def finalize(self, status: str) -> None:
        if status == "success":
            end = _hparams(self._settings)[2]
            self._write(lambda: self.experiment.file_writer.add_summary(end))
        elif not isinstance(sys.exception(), Interrupted):
            self._write_failure()
        self._unless_broken(self._validation.close)
        self._unless_broken(lambda: super(EventLogger, self).finalize(status))

    def _write_failure(self) -> None:
        """Give the run a status."""
        summary = _hparams(self._settings)[2]
        end = HParamsPluginData(session_end_info=SessionEndInfo(status=STATUS_FAILURE), version=PLUGIN_DATA_VERSION)
        summary.value[0].metadata.plugin_data.content = end.SerializeToString()
        self._write_apart(FAILED, summary)

    def _write_apart(self, suffix: str, *summaries: Any) -> None:
        """Write a file of its own, which the next attempt removes."""

        def write() -> None:
            writer = FileWriter(self.log_dir, filename_suffix=suffix)
            for each in summaries:
                writer.add_summary(each)
            writer.close()

        self._unless_broken(write)

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
    """Weights & Biases. A run has one id, so a run that was interrupted continues its curves, and its steps are the
    run's own: steps that are made again after a kill have the numbers that they had."""

    def __init__(self, run_dir: Path, settings: Mapping[str, str]) -> None:
        where = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
        project = os.environ.get("WANDB_PROJECT", "clippy_train")
        super().__init__(
            name=run_dir.name, save_dir=run_dir, id=where, project=project, resume="allow", config=dict(settings)
        )

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {**metrics, "trainer/global_step": step}  # the x axis of its charts, as Lightning defines it
        self.experiment.log(row, step=step)  # Lightning would let it count the calls

    def finalize(self, status: str) -> None:
        try:
            self.experiment.finish(exit_code=int(status != "success"))  # the rank exits without waiting for its threads
        except Exception as error:  # its errors share no base class
            log.error("Weights & Biases: what was logged last may be missing there, %s has it: %s", METRICS, error)


def _hparams(settings: Mapping[str, str]) -> Any:
    """What the HPARAMS tab reads: names of columns, a run's settings, and that it has succeeded."""
    return hparams_summaries({name: _number(text) for name, text in settings.items()}, dict.fromkeys(METRICS_COMPARED))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
