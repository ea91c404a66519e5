"""benchmarks/plan-memory.md: a GPU's memory by `clippy plan` and by the tracker of `support.fake_memory`.

cd tests && python -m tools.make_memory_table      ten minutes on one core; no GPU
"""

import time
from collections.abc import Iterator
from pathlib import Path

from support.fake_memory import track

from clippy_train.compose import compose
from clippy_train.config import TrainConfig
from clippy_train.model.flops import vocab_size
from clippy_train.model.memory import memory

PAGE = Path(__file__).parents[2] / "benchmarks" / "plan-memory.md"
INTRODUCTION = """\
# Memory of a GPU: `clippy plan` and the tracker

`cd tests && python -m tools.make_memory_table` makes this table. The tracker runs the real engines on fake tensors of
eight ranks (single: one) and adds up the storages that are alive; the plan is a formula. Blocks have 2048 tokens,
validation has the experiment's micro-batches. The coefficients of the formula come from the settings marked \\*; the
others check it.

| model | settings | micro-batch x accumulation | tracker | plan | difference | seconds of the tracker |
|---|---|---|---|---|---|---|
"""
SMALL, LARGE = "experiment=code_clippy_125m", "experiment=code_clippy_1_3b"
RECOMPUTED = "model.checkpoint_activations=true"
Case = tuple[str, int, int, str]
# Experiment, sequences in a micro-batch, micro-batches in a step, settings; * where coefficients were read off
CASES: list[Case] = [
    (SMALL, 8, 2, "strategy=zero1 model.attention=varlen *"),
    (SMALL, 16, 1, "strategy=zero1 model.attention=varlen"),
    (SMALL, 8, 2, "strategy=zero1 model.attention=sdpa *"),
    (SMALL, 8, 2, "strategy=zero1 model.attention=flex"),
    (SMALL, 8, 2, "strategy=zero1 model.attention=eager *"),
    (SMALL, 32, 1, f"strategy=zero1 model.attention=varlen {RECOMPUTED}"),
    (SMALL, 4, 2, f"strategy=zero1 model.attention=eager {RECOMPUTED} *"),
    (SMALL, 8, 1, "strategy=zero1 model.attention=varlen model.loss_dtype=bf16 *"),
    (SMALL, 8, 2, "strategy=zero2 model.attention=varlen *"),
    (SMALL, 4, 2, "strategy=zero3 model.attention=varlen *"),
    (SMALL, 8, 2, "strategy=ddp model.attention=varlen *"),
    (SMALL, 2, 2, "strategy=ddp model.attention=eager"),
    (SMALL, 4, 2, "strategy=single model.attention=sdpa trainer.precision=fp32"),
    (LARGE, 2, 2, "strategy=zero1 model.attention=varlen"),
    (LARGE, 4, 1, f"strategy=zero1 model.attention=varlen {RECOMPUTED} *"),
    (LARGE, 1, 1, "strategy=zero1 model.attention=eager"),
    (LARGE, 2, 1, "strategy=zero2 model.attention=sdpa"),
    (LARGE, 2, 1, "strategy=zero3 model.attention=varlen"),
    (LARGE, 2, 1, "strategy=ddp model.attention=varlen"),
]


def configuration(experiment: str, micro_batch: int, micro_steps: int, settings: list[str]) -> TrainConfig:
    ranks = 1 if "strategy=single" in settings else 8
    return compose(
        TrainConfig,
        [
            experiment, *settings, "trainer.accelerator=cuda", "trainer.num_nodes=1", f"trainer.devices={ranks}",
            f"trainer.micro_batch_size={micro_batch}", f"trainer.global_batch_size={micro_batch * micro_steps * ranks}",
            f"data.streams={ranks}",
        ],
    )  # fmt: skip


def rows() -> Iterator[str]:
    for case in CASES:
        started = time.monotonic()
        tracked = track(config_of(case), vocab_size(config_of(case)))
        yield row(case, max(tracked.peaks.values()), time.monotonic() - started)


def config_of(case: Case) -> TrainConfig:
    experiment, micro_batch, micro_steps, settings = case
    return configuration(experiment, micro_batch, micro_steps, settings.removesuffix(" *").split())


def row(case: Case, tracked: int, seconds: float) -> str:
    experiment, micro_batch, micro_steps, settings = case
    planned = memory(config_of(case), vocab_size(config_of(case))).peak
    cells = [
        experiment.rpartition("clippy_")[2], settings.replace("*", r"\*"), f"{micro_batch} x {micro_steps}",
        f"{tracked / 1e9:.2f} GB", f"{planned / 1e9:.2f} GB", f"{planned / tracked - 1:+.1%}", f"{seconds:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(INTRODUCTION + "".join(rows()))
