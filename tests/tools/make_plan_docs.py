"""The table of `clippy plan` in docs/cluster.md: the recipe on 8, 64 and 512 GPUs, and 1.3B. `make docs` writes it."""

import re
from pathlib import Path

from clippy_train.compose import CONF, compose
from clippy_train.config import TrainConfig
from clippy_train.plan import Plan, make_plan, span
from clippy_train.shards.format import READ_BYTES

PAGE = CONF.parent / "docs" / "cluster.md"
TABLE = re.compile(r"(?<=^<!-- make docs -->\n)(\|.*\n)+", re.MULTILINE)
COLUMNS = {
    "125M on 8 GPUs": ["experiment=code_clippy_125m", "trainer.num_nodes=1"],
    "64": ["experiment=code_clippy_125m", "trainer.num_nodes=8"],
    "512": [
        "experiment=code_clippy_125m", "trainer.num_nodes=64", "trainer.micro_batch_size=2", "data.streams=512",
    ],
    "1.3B on 64 GPUs": ["experiment=code_clippy_1_3b", "trainer.num_nodes=8"],
}  # fmt: skip


def page() -> str:
    return TABLE.sub(lambda _: table(), PAGE.read_text())


def table() -> str:
    gpus = ["trainer.accelerator=cuda", "trainer.devices=8"]
    configs = [compose(TrainConfig, [*each, *gpus]) for each in COLUMNS.values()]
    columns = [cells(config, make_plan(config)) for config in configs]
    lines = [["", *COLUMNS], ["---"] * (len(columns) + 1)]
    lines += [[name, *(column[name] for column in columns)] for name in columns[0]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(config: TrainConfig, plan: Plan) -> dict[str, str]:
    ranks, found = config.world_size, plan.estimate
    assert found
    (low, high), hours, read = found.tokens_per_second, found.hours, found.read_bytes_per_second
    return {
        "micro-batch x accumulation": f"{config.trainer.micro_batch_size} x {config.micro_steps}",
        "sent by each GPU in a step": f"{plan.sent_bytes / 1e9:.3g} GB",
        "that takes, if none of it overlaps": f"{span(*found.communication_seconds, 1e-3)} ms",
        "speed": f"{span(low, high, 1e6)} M tokens/s ({span(low / ranks, high / ranks, 1e3)} k a GPU)",
        "time": f"{span(*hours)} hours, {span(hours[0] * ranks, hours[1] * ranks)} GPU-hours",
        "memory of a GPU": f"{plan.memory_bytes_per_gpu / 1e9:.3g} GB",
        "host memory of a node, loading": f"{plan.host.loading / 1e9:.3g} GB",
        "host memory of a node, saving": f"{plan.host.snapshots / 1e9:.3g} GB",
        "a checkpoint": f"{plan.checkpoint_bytes / 1e9:.3g} GB in {span(*found.save_seconds)} s",
        "reading": f"{span(*read, 1e6)} MB/s, {span(*read, READ_BYTES)} reads/s",
        "tokenizing": f"{span(*found.tokenizing_cores_per_node)} cores of each node",
    }


if __name__ == "__main__":
    Path(PAGE).write_text(page())
