"""Any rank of 8 to 512, on one core: our module, strategy and callbacks in the real engines, beside fake ranks.

The figures of `clippy plan` for an optimizer step are compared with what a rank really asks its group for.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from support.fake_ranks import Call, FakeGroup, run_as
from support.fits import SETTINGS, Fit
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils._pytree import tree_leaves

from clippy_train.config import TrainConfig
from clippy_train.files import STAGING
from clippy_train.model import traffic
from clippy_train.model.flops import count_parameters
from clippy_train.plan import make_plan, saved_bytes
from clippy_train.run.folder import STATE, checkpoint_folder
from clippy_train.train.callbacks.checkpointer import make_staging
from clippy_train.train.internals import own_part

MICRO_STEPS, STEPS = 2, 3
RANKS = [(8, 0), (64, 31), (512, 511)]  # first, middle, last
CASES = [(strategy, *place, "optim=adamw") for strategy in ("ddp", "zero1", "zero2", "zero3") for place in RANKS]
CASES += [("zero3", 64, 63, "optim=adamw"), ("zero3", 512, 0, "optim=adamw")]
CASES += [
    ("zero1", 64, 31, "optim=adafactor"),
    ("zero1", 8, 4, "trainer.precision=fp32"),
]  # torch's, and DeepSpeed's for fp32
Sums = dict[tuple[str, str], tuple[int, int]]  # calls and bytes by collective and type


class Seen(NamedTuple):
    """What a rank sent in its last optimizer step and in the validation after it, its `shard`, and bytes it `saved`."""

    step: list[Call]
    validation: list[Call]
    shard: int
    saved: int
    vocab_size: int


class Marks(pl.Callback):
    def __init__(self, group: FakeGroup) -> None:
        self.group = group
        self.steps: list[tuple[int, int]] = []
        self.validations: list[tuple[int, int]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.began = len(self.group.calls)

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append((self.began, len(self.group.calls)))

    def on_validation_start(self, *args: Any) -> None:
        self.validation_began = len(self.group.calls)

    def on_validation_epoch_end(self, *args: Any) -> None:
        self.validations.append((self.validation_began, len(self.group.calls)))


def settings(strategy: str, world: int) -> list[str]:
    return [
        *SETTINGS, f"strategy={strategy}", "trainer.precision=bf16",
        "trainer.devices=8", f"trainer.num_nodes={world // 8}", f"data.streams={world}",
        f"trainer.global_batch_size={MICRO_STEPS * world}", "trainer.micro_batch_size=1",
        "trainer.eval_micro_batch_size=1", f"trainer.val_samples={world}",
        "model.hidden_size=256", "model.num_heads=2", "model.num_layers=4",
        f"trainer.max_steps={STEPS}", f"checkpoint.every_steps={STEPS}", f"trainer.val_every_steps={STEPS}",
        "strategy.reduce_bucket_size=500000",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def write_corpus(folder: Path) -> Path:
    """Blocks for 512 ranks."""
    for split in ("train", "validation"):
        (folder / split).mkdir()
        lines = (json.dumps({"text": f"def f{i}(x):\n    return x + {i} * {i}\n" * 4}) for i in range(2048))
        (folder / split / "0.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def train(config: TrainConfig, group: FakeGroup) -> Seen:
    fit = Fit(config)
    staging = checkpoint_folder(config.run_dir, STEPS).with_suffix(STAGING)
    make_staging(staging, config.deepspeed)  # rank 0 makes it
    marks = Marks(group)
    fit.callbacks.insert(0, marks)
    fit.fit()
    (began, _), (_, ended) = marks.steps[-MICRO_STEPS], marks.steps[-1]
    (validation,) = marks.validations[-1:]
    return Seen(
        group.calls[began:ended],
        group.calls[slice(*validation)],
        shard(fit),
        saved(staging if staging.exists() else checkpoint_folder(config.run_dir, STEPS)),
        fit.module.model.config.vocab_size,
    )


def shard(fit: Fit) -> int:
    """Elements that this rank keeps the optimizer's state for, without padding."""
    optimizer: Any = fit.module.trainer.optimizers[0]
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        return sum(each.numel() for group in optimizer.optim.param_groups for each in group["params"])
    return sum(own_elements(each) for each in fit.module.model.parameters())


def saved(folder: Path) -> int:
    """Bytes of the tensors in a rank's files of a checkpoint."""
    state = folder / STATE
    files = state.rglob("*.pt") if state.is_dir() else filter(Path.exists, [state])
    leaves = [leaf for path in files for leaf in tree_leaves(torch.load(path, weights_only=False))]
    storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def own_elements(parameter: Any) -> int:
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: its slice of DeepSpeed's flat partition, or None
        return int(parameter._hp_mapping.lp_fragment_address.numel) if parameter._hp_mapping else 0
    return own_part(parameter).numel()


def sums(calls: Iterable[tuple[str, str, int, int]]) -> Sums:
    count, size = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for name, dtype, number, num_bytes in calls:
        count[name, dtype] += number
        size[name, dtype] += num_bytes
    return {key: (count[key], size[key]) for key in count}


def seen(calls: list[Call]) -> Sums:
    return sums((each.name, short(each), 1, each.num_bytes) for each in calls)


def short(call: Call) -> str:
    return str(call.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def planned_step(config: TrainConfig, vocab_size: int) -> Sums:
    planned = traffic.step_collectives(config, vocab_size)
    return sums((each.name, each.dtype, each.calls, each.num_bytes) for each in planned)


def planned_saved(config: TrainConfig, vocab_size: int, rank: int) -> int:
    first, each = saved_bytes(count_parameters(config, vocab_size), config)
    return (first if rank == 0 else 0) + each


@pytest.mark.processes
@pytest.mark.parametrize(("strategy", "world", "rank", "more"), CASES)
def test_a_rank_sends_and_keeps_what_the_plan_says(
    strategy: str,
    world: int,
    rank: int,
    more: str,
    corpus: Path,
    train_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    config = train_config(*settings(strategy, world), more, f"data.path={corpus}", f"run.root={tmp_path}")
    found = run_as(lambda group: train(config, group), rank, world)
    assert seen(found.step) == planned_step(config, found.vocab_size)
    # Validation: ZeRO-3 gathers weights; the sums of losses go through our own group
    assert {each.name for each in found.validation} == ({"all_gather"} if strategy == "zero3" else set())
    assert found.shard == traffic.shard_elements(config, found.vocab_size, rank)
    assert found.saved == pytest.approx(planned_saved(config, found.vocab_size, rank), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("world", [8, 64, 512])
def test_the_shards_of_all_ranks_are_the_model(
    world: int, strategy: str, train_config: Callable[..., TrainConfig]
) -> None:
    config = train_config(*settings(strategy, world))
    plan = make_plan(config)
    shards = [traffic.shard_elements(config, plan.vocab_size, rank) for rank in range(world)]
    assert sum(shards) == plan.parameters
