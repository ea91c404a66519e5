"""Run logs as TensorBoard's own readers see them; Weights & Biases; slow ranks."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from support.distributed import run_distributed
from support.fits import SETTINGS, Fit
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status

from clippy_train.config import TrainConfig
from clippy_train.data.batches import TrainBatches
from clippy_train.errors import ClippyError, ConfigError, Interrupted, NonFinite
from clippy_train.launch.start import preflight_problems
from clippy_train.run.folder import METRICS, VALIDATION
from clippy_train.run.rows import SCORE
from clippy_train.train import collective
from clippy_train.train.loggers import BEST, CHARTS, LOSS, METRICS_COMPARED, EventLogger, WandbRun


def read(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir), size_guidance={TENSORS: 0})
    events.Reload()
    return events


def test_a_curve_is_continuous_after_a_rollback(tmp_path: Path) -> None:
    """An attempt that was killed at step 7, and one that resumes from the checkpoint of step 4."""
    first = EventLogger(tmp_path, resumed_step=-1)
    for step in range(1, 8):
        first.log_metrics({"train/loss": float(step), "val/loss": 9.0, "data/digest": "ff"}, step)
    second = EventLogger(tmp_path, resumed_step=4)
    for step in range(5, 9):
        second.log_metrics({"train/loss": 10.0 + step}, step)

    events = read(tmp_path)
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 15), (6, 16), (7, 17), (8, 18)]
    assert [event.step for event in events.Scalars("val/loss")] == [1, 2, 3, 4]


def test_the_loss_comes_first_with_validation_as_a_run_of_its_own(tmp_path: Path) -> None:
    logger = EventLogger(tmp_path, resumed_step=-1)
    logger.log_metrics({"train/loss": 2.0, "checkpoint/age": 1.0}, 1)
    logger.log_metrics({"val/loss": 3.0}, 1)
    assert min(read(tmp_path).Tags()["scalars"]) == LOSS
    for folder, value in ((tmp_path, 2.0), (tmp_path / VALIDATION, 3.0)):
        assert [(event.step, event.value) for event in read(folder).Scalars(LOSS)] == [(1, value)]


def test_each_row_is_readable_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = EventLogger(tmp_path, resumed_step=-1)
    logger.log_metrics({"train/loss": 1.0}, 1)
    assert [event.step for event in read(tmp_path).Scalars("train/loss")] == [1]
    logger.log_text("samples/0", "def f():\n    return 1", 1)
    assert b"        return 1" in read(tmp_path).Tensors("samples/0/text_summary")[0].tensor_proto.string_val[0]


def test_charts_are_grouped(tmp_path: Path) -> None:
    EventLogger(tmp_path, resumed_step=-1).describe()
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert {group.title: [chart.title for chart in group.chart] for group in layout.category} == {
        group: list(charts) for group, charts in CHARTS.items()
    }
    patterns = [tag for group in layout.category for chart in group.chart for tag in chart.multiline.tag]
    assert all(any(re.match(pattern, name) for pattern in patterns) for name in METRICS_COMPARED)


def status(run_dir: Path) -> str | None:
    """The status of a run in the HPARAMS tab."""
    content = read(run_dir).PluginTagToContent(metadata.PLUGIN_NAME).get(metadata.SESSION_END_INFO_TAG)
    return Status.Name(metadata.parse_session_end_info_plugin_data(content).status) if content else None


def test_every_run_shows_its_settings(tmp_path: Path) -> None:
    logger = EventLogger(tmp_path, -1, {"optim.lr": "1e-3", "optim.name": "adafactor"})
    logger.describe("optim:\n  lr: 1e-3\n")
    events = read(tmp_path)
    written = events.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(written[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["optim.lr"].number_value == 1e-3
    assert start.hparams["optim.name"].string_value == "adafactor"
    experiment = metadata.parse_experiment_plugin_data(written[metadata.EXPERIMENT_TAG])
    assert [info.name.tag for info in experiment.metric_infos] == list(METRICS_COMPARED)
    assert b"      lr: 1e-3" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_a_run_has_the_status_of_its_last_attempt(tmp_path: Path) -> None:
    for error, expected in ((Interrupted("saved"), None), (NonFinite("loss"), "STATUS_FAILURE")):
        logger = EventLogger(tmp_path, -1)
        logger.describe()
        try:
            raise error
        except ClippyError:
            logger.finalize("failed")  # as Lightning calls it
        assert status(tmp_path) == expected
    again = EventLogger(tmp_path, -1)
    again.describe()
    assert status(tmp_path) is None
    again.finalize("success")
    assert status(tmp_path) == "STATUS_SUCCESS"


def test_the_best_validation_is_of_a_trained_model_and_survives_a_restart(tmp_path: Path) -> None:
    def log(logger: EventLogger, values: dict[int, float]) -> None:
        for step, value in values.items():
            logger.log_metrics({SCORE: value}, step)

    first = EventLogger(tmp_path, -1)
    log(first, {0: 1.0, 10: 3.0, 20: 2.0, 30: 2.5})
    rows = [{"step": step, SCORE: value} for step, value in ((0, 1.0), (10, 3.0), (20, 2.0))]
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = EventLogger(tmp_path, 20)
    log(second, {30: 2.2})
    assert [(event.step, event.value) for event in read(tmp_path).Scalars(BEST)] == [(10, 3.0), (20, 2.0), (30, 2.0)]


def test_the_settings_are_those_of_the_last_attempt(tmp_path: Path) -> None:
    EventLogger(tmp_path, -1, {"optim.lr": "0.1"}).describe()
    EventLogger(tmp_path, 4, {"optim.lr": "0.1 to step 4, then 0.2"}).describe()
    written = read(tmp_path).PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(written[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["optim.lr"].string_value == "0.1 to step 4, then 0.2"


def test_weights_and_biases_gets_the_settings_and_the_steps_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[dict[str, Any], int]] = []
    fake = SimpleNamespace(log=lambda row, step: logged.append((row, step)))
    monkeypatch.setattr(WandbRun, "experiment", fake)
    monkeypatch.setattr(
        WandbLogger, "__init__", lambda self, **options: options.update(self=self) or given.update(options)
    )
    given: dict[str, Any] = {}
    WandbRun(tmp_path, {"optim.lr": "0.001"}).log_metrics({"train/loss": 2.0}, 110)
    assert given["config"] == {"optim.lr": "0.001"}
    assert logged == [({"train/loss": 2.0, "trainer/global_step": 110}, 110)]


def test_an_upload_that_fails_after_the_end_does_not_fail_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def finish(exit_code: int) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(WandbRun, "experiment", SimpleNamespace(finish=finish))
    WandbRun.__new__(WandbRun).finalize("success")
    assert "metrics.jsonl has it: no route to host" in caplog.text


def test_missing_weights_and_biases_settings_are_reported_before_the_run_starts(
    train_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config("logger.wandb=true")
    monkeypatch.setattr("clippy_train.launch.start.find_spec", lambda name: None)
    (error,) = preflight_problems(config)
    assert isinstance(error, ConfigError)
    assert "pip install 'clippy_train[wandb]'" in str(error)
    monkeypatch.setattr("clippy_train.launch.start.find_spec", lambda name: object())
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    (error,) = preflight_problems(config)
    assert "WANDB_MODE=offline" in str(error)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert preflight_problems(config) == []


@pytest.mark.processes
@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_a_slow_rank_is_named_with_its_host(
    train_config: Callable[..., TrainConfig], tmp_path: Path, strategy: str
) -> None:
    overrides = [f"strategy={strategy}", "trainer.devices=2", "trainer.micro_batch_size=1", f"run.root={tmp_path}"]
    config = train_config(*SETTINGS, *overrides)

    def train() -> list[dict[str, Any]]:
        fit = Fit(config)
        if collective.rank() == 1:
            step = fit.module.training_step

            def slow(batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
                time.sleep(0.3)
                return step(batch, batch_idx)

            fit.module.training_step = slow  # type: ignore[method-assign]  # a slow rank
        fit.fit()
        return fit.rows() if collective.rank() == 0 else []

    rows = run_distributed(train, 2)[0]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert (row["slowest/own_time_rank"], row["slowest/own_time_host"]) == (1, socket.gethostname())
        assert row["throughput/step_time"] >= row["slowest/own_time"] >= 0.6  # two micro-batches


@pytest.mark.processes
def test_a_rank_that_waits_for_data_is_named_with_its_host(
    train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["strategy=ddp", "trainer.devices=2", "trainer.micro_batch_size=1", f"run.root={tmp_path}"]
    config = train_config(*SETTINGS, *overrides)
    rounds = TrainBatches._rounds

    def slow(batches: TrainBatches) -> Iterator[Any]:
        for each in rounds(batches):
            time.sleep(0.3 * collective.rank())
            yield each

    monkeypatch.setattr(TrainBatches, "_rounds", slow)

    def train() -> list[dict[str, Any]]:
        fit = Fit(config)
        fit.fit()
        return fit.rows() if collective.rank() == 0 else []

    rows = run_distributed(train, 2)[0]
    assert len(rows) == 3
    for row in rows:
        assert (row["slowest/data_wait_rank"], row["slowest/data_wait_host"]) == (1, socket.gethostname())
        assert row["throughput/data_wait"] < 0.5 < row["slowest/data_wait"]  # the former is of rank 0
