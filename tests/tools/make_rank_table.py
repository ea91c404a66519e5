"""benchmarks/any-rank.md: what one rank of many sends, keeps and saves, and what `clippy plan` says.

cd tests && python -m tools.make_rank_table      three minutes on one core
"""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from support.fake_ranks import run_as
from support.small_corpus import make_corpus, make_tokenizer
from test_any_rank import CASES, Sums, planned_saved, planned_step, seen, settings, train, write_corpus

from clippy_train.compose import compose
from clippy_train.config import TrainConfig
from clippy_train.model.traffic import shard_elements

PAGE = Path(__file__).parents[2] / "benchmarks" / "any-rank.md"
INTRODUCTION = """\
# One rank of 8 to 512

`cd tests && python -m tools.make_rank_table` makes this table: the project's module, strategy and callbacks under the
real engines as one rank, beside ranks that exist only in its process group. `tests/test_any_rank.py` asserts the same
for a part of these rows. The model has 4 layers of 256 and {parameters:,} parameters. A step has two micro-batches. In
each cell: the engine, then the plan. Seconds are those of a process that trains three steps, validates and saves, while
other work takes a part of the cores.

| strategy | ranks | rank | settings | calls of a step | bytes of a step | elements kept | bytes saved | seconds |
|---|---|---|---|---|---|---|---|---|
"""
GRID = [
    (strategy, ranks, rank, "optim=adamw")
    for strategy in ("ddp", "zero1", "zero2", "zero3")
    for ranks in (8, 64, 512)
    for rank in (0, ranks // 2 - 1, ranks - 1)
]
ROWS = [*GRID, *(case for case in CASES if case[-1] != "optim=adamw")]


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        found = list(rows(Path(work)))
    PAGE.write_text(INTRODUCTION.format(parameters=found[0][0]) + "".join(line for _, line in found))


def rows(work: Path) -> Iterator[tuple[int, str]]:
    (work / "corpus").mkdir()
    corpus, tokenizer = write_corpus(work / "corpus"), make_tokenizer(make_corpus(work / "small"), work / "tokenizer")
    places = [f"data.path={corpus}", f"tokenizer.base={tokenizer}"]
    for number, (strategy, ranks, rank, more) in enumerate(ROWS):
        overrides = ["experiment=demo", *places, *settings(strategy, ranks), more, f"run.root={work}/{number}"]
        config, started = compose(TrainConfig, overrides), time.monotonic()
        found = run_as(partial(train, config), rank, ranks)
        seconds, rows = time.monotonic() - started, found.vocab_size
        pairs = [
            *zip(totals(seen(found.step)), totals(planned_step(config, rows)), strict=True),
            (found.shard, shard_elements(config, rows, rank)),
            (found.saved, planned_saved(config, rows, rank)),
        ]
        cells = [strategy, str(ranks), str(rank), more, *(f"{a:,} / {b:,}" for a, b in pairs), f"{seconds:.1f}"]
        every = sum(shard_elements(config, rows, each) for each in range(ranks))
        yield every if strategy != "ddp" else every // ranks, "| " + " | ".join(cells) + " |\n"


def totals(sums: Sums) -> tuple[int, int]:
    """Calls and bytes of all collectives."""
    return sum(calls for calls, _ in sums.values()), sum(size for _, size in sums.values())


if __name__ == "__main__":
    main()
