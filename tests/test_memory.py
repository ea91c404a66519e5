"""The memory that `clippy plan` expects is what the real engines hold on fake tensors (`support.fake_memory`)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_memory import track
from tools.make_memory_table import CASES as TABLE
from tools.make_memory_table import PAGE, RECOMPUTED, SMALL, Case, config_of, configuration

from clippy_train.cli import main
from clippy_train.config import TrainConfig
from clippy_train.errors import ConfigError
from clippy_train.launch.start import corpus_warnings
from clippy_train.model.flops import vocab_size
from clippy_train.model.memory import memory
from clippy_train.plan import COMPRESSION, TEXT_BYTES_PER_TOKEN, USABLE, make_plan

TWO_LAYERS = "model.num_layers=2"  # of the recipe's width, for the suite's sake; the table has all layers
CASES = [
    (8, 2, ["strategy=ddp", "model.attention=varlen"]),
    (8, 2, ["strategy=zero1", "model.attention=eager", TWO_LAYERS]),
    (16, 1, ["strategy=zero1", "model.attention=varlen", RECOMPUTED, TWO_LAYERS]),
    (8, 1, ["strategy=zero2", "model.attention=sdpa", TWO_LAYERS]),
    (8, 1, ["strategy=zero1", "model.attention=sdpa", "data.document_mask=true", TWO_LAYERS]),
    (8, 1, ["strategy=zero3", "model.attention=varlen", TWO_LAYERS]),
]
# How often a step's host waits for the GPU: DeepSpeed reads the norm, and whether it is finite
WAITS = {"strategy=ddp": 0, "strategy=zero1": 2, "strategy=zero2": 4, "strategy=zero3": 1}


@pytest.mark.processes
@pytest.mark.parametrize(("micro_batch", "micro_steps", "settings"), CASES)
def test_the_plan_gives_the_memory_that_a_rank_holds(micro_batch: int, micro_steps: int, settings: list[str]) -> None:
    config = configuration(SMALL, micro_batch, micro_steps, settings)
    tracked = track(config, vocab_size(config))
    assert memory(config, vocab_size(config)).peak == pytest.approx(max(tracked.peaks.values()), rel=0.05)
    assert sum(tracked.reads.values()) == WAITS[settings[0]]


TRACKED = [line.split(" | ")[3] for line in PAGE.read_text().splitlines() if " GB | " in line]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "tracked"), list(zip(TABLE, TRACKED, strict=True)), ids=str)
def test_the_plan_is_near_what_was_tracked_for_every_shape_and_strategy(case: Case, tracked: str) -> None:
    config = config_of(case)
    assert memory(config, vocab_size(config)).peak == pytest.approx(1e9 * float(tracked.removesuffix(" GB")), rel=0.06)


def figures(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    out = tmp_path / "plan.json"
    card = [SMALL, "trainer.accelerator=cuda", "trainer.devices=8", "trainer.num_nodes=1", f"out={out}"]
    assert main(["plan", *card, *overrides]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_figures_of_a_plan_are_a_file(tmp_path: Path) -> None:
    found = figures(tmp_path)
    assert found["memory_bytes_per_gpu"] == pytest.approx(7.73e9, rel=0.01)
    assert found["host"] == {"loading": 8 * 8 * found["parameters"], "snapshots": found["checkpoint_bytes"]}
    assert found["sent_bytes"] == pytest.approx(2 * 7 / 8 * 4 * found["parameters"] + 7 / 8 * 2 * found["parameters"])
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    assert main(["plan", SMALL, "trainer.devices=8", f"out={tmp_path}"]) == ConfigError.exit_code


@pytest.mark.slow
@pytest.mark.parametrize("memory_gb", [80, 24])
def test_the_largest_micro_batch_is_the_last_that_fits(tmp_path: Path, memory_gb: int) -> None:
    size = figures(tmp_path, f"memory_gb={memory_gb}")["largest_micro_batch_size"]
    needed = [
        figures(tmp_path, f"trainer.micro_batch_size={each}")["memory_bytes_per_gpu"] for each in (size, 2 * size)
    ]
    assert needed[0] <= USABLE * memory_gb * 1e9 < needed[1]


def test_no_micro_batch_fits_a_gpu_that_is_smaller_than_the_states(tmp_path: Path) -> None:
    assert figures(tmp_path, "memory_gb=1")["largest_micro_batch_size"] is None


def test_a_1_3b_model_takes_much_memory_of_a_node_while_its_ranks_load(tmp_path: Path) -> None:
    found = figures(tmp_path, "model=gpt_neo_1_3b", "strategy=zero3", "trainer.num_nodes=2")
    assert found["host"]["loading"] == pytest.approx(84e9, rel=0.01)
    assert found["host"]["snapshots"] == found["checkpoint_bytes"] // 2 == 6 * found["parameters"]


@pytest.mark.parametrize(("shards", "times"), [(2, 4), (4, 1)])
def test_shards_that_every_stream_reads_are_named_and_counted(
    tmp_path: Path, train_config: Callable[..., TrainConfig], shards: int, times: int
) -> None:
    (tmp_path / "train").mkdir()
    for shard in range(shards):
        (tmp_path / "train" / f"{shard}.jsonl").write_text('{"text": "x"}\n')
    config = train_config(f"data.path={tmp_path}", "data.streams=4")
    said = (
        "2 training shards do not divide into data.streams=4: every stream reads 2 of them, so an epoch reads 8 shards"
    )
    assert [said in warning for warning in corpus_warnings(config)] == [True] * (times > 1)
    found = make_plan(train_config(f"data.path={tmp_path}", "data.streams=4", "trainer.accelerator=cuda")).estimate
    assert found
    read_once = found.tokens_per_second[0] * TEXT_BYTES_PER_TOKEN / COMPRESSION
    assert found.read_bytes_per_second[0] == pytest.approx(times * read_once)
