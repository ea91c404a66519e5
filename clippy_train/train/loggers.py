"""Where rank 0 writes what a run reports: `metrics.jsonl` (the source of truth) and TensorBoard, by the same names."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from clippy_train.config import TrainConfig
from clippy_train.train.record import METRICS, TENSORBOARD, RowFile

log = logging.getLogger(__name__)


def build_loggers(config: TrainConfig, kept: int) -> list[Logger]:
    """The loggers of a run whose rows up to step `kept` stay."""
    loggers: list[Logger] = [JsonlLogger(config.run_dir / METRICS, kept)]
    if config.logger.tensorboard:
        loggers.append(EventLogger(config.run_dir, kept))
    return loggers


class JsonlLogger(Logger):
    """One JSON object per logged row."""

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
        """The resolved configuration lies beside this file."""


class EventLogger(TensorBoardLogger):
    """TensorBoard, numbers only. Its writer does not survive a disk error: nothing more is written after one."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        super().__init__(run_dir, name="", version=TENSORBOARD, purge_step=resumed_step + 1)
        self._broken = False

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        self._unless_broken(lambda: super(EventLogger, self).log_metrics(numbers, step))

    def save(self) -> None:
        self._unless_broken(super().save)

    def finalize(self, status: str) -> None:
        self._unless_broken(lambda: super(EventLogger, self).finalize(status))

    def _unless_broken(self, write: Callable[[], None]) -> None:
        try:
            if not self._broken:
                write()
        except OSError as error:
            self._broken = True
            log.error("TensorBoard stops here, %s goes on: %s", METRICS, error)
