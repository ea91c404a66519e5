"""The speed that a run reports, and the profile of its steps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import gpt_neo, token_ids
from support.runs import Runs
from torch.utils.flop_counter import FlopCounterMode

from clippy_train.compose import compose
from clippy_train.config import TrainConfig
from clippy_train.model.flops import count_parameters, flops_per_token, peak_flops
from clippy_train.train.callbacks.monitor import device_peak, progress_line

RECIPE = ["experiment=code_clippy_125m"]


def test_operations_match_those_that_torch_counts() -> None:
    """Hugging Face's eager attention computes full S x S scores: the formulas' case of a window of full length."""
    model, ids = gpt_neo(window=57, vocab_size=97), token_ids(2, 57)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    shape = ["num_layers=2", "hidden_size=32", "num_heads=4", "window_size=57", "max_position_embeddings=64"]
    config = compose(TrainConfig, [*RECIPE, "data.seq_len=57", *(f"model.{each}" for each in shape)])
    flops = flops_per_token(config, 97)
    full, visible = (12 * 32 * 2 * keys for keys in (57, (57 + 1) / 2))
    assert flops["exact"] - visible + full == pytest.approx(counter.get_total_flops() / ids.numel(), rel=1e-12)
    assert flops["palm"] - full == 6 * (sum(each.numel() for each in model.parameters()) - 64 * 32)


def test_operations_per_token_of_the_recipe() -> None:
    config = compose(TrainConfig, RECIPE)
    keys = [sum(min(i + 1, window) for i in range(2048)) / 2048 for window in (2048, 256)]
    flops = flops_per_token(config, 50261)
    assert flops["exact"] == pytest.approx(6 * (12 * 12 * 768**2 + 50261 * 768) + 12 * 768 * 6 * sum(keys), rel=1e-12)
    assert flops["palm"] / flops["exact"] == pytest.approx(1.19, abs=0.005)
    assert count_parameters(config, 50261) == 125_201_664


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A10", 125),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200 NVL", 835),
    ],
)
def test_peaks_are_looked_up_by_device_name(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12
    assert all(peak_flops(unknown) is None for unknown in ("GeForce 256", "NVIDIA L40", "NVIDIA A10G"))


@pytest.mark.slow
def test_there_is_no_mfu_without_a_known_peak(train_config: Callable[..., TrainConfig]) -> None:
    cpu = torch.device("cpu")
    assert device_peak(train_config(), cpu) is None
    assert device_peak(train_config("trainer.peak_tflops=1.5"), cpu) == 1.5e12
    assert device_peak(train_config("trainer.precision=fp32"), torch.device("cuda")) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("speed"), tiny_corpus, tiny_tokenizer)


def test_a_run_reports_its_speed_and_traces_its_steps(runs: Runs) -> None:
    output = runs.train(
        "traced", "debug=profile", "trainer.peak_tflops=1", "strategy=single", "trainer.devices=1"
    ).stdout
    rows = runs.rows("traced")
    for row in rows:
        speed, flops = row["throughput/tokens_per_sec"], row["throughput/mfu"] * 1e12
        assert 0 < row["throughput/step_time"] <= row["throughput/step_time_p95"]
        assert row["throughput/mfu_palm"] > row["throughput/mfu"] > 0
        assert flops / speed == pytest.approx(rows[0]["throughput/mfu"] * 1e12 / rows[0]["throughput/tokens_per_sec"])
        assert row["system/disk_free"] > 0
        assert progress_line(row["step"], 6, row) in output
    assert "0:00:00 left" in progress_line(6, 6, rows[-1])

    (trace,) = (runs.folder("traced") / "profile").glob("*.pt.trace.json")
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) >= 3
    assert any(name.startswith("aten::scaled_dot_product") for name in names)
