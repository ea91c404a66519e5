"""`data.skip_steps`: one bad batch does not end a run, and what is passed over is the same for any layout."""

import math
import os
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from support.distributed import run_distributed
from support.fits import SETTINGS, SINGLE, run_rank

from clippy_train.config import TrainConfig, save
from clippy_train.data.batches import Batch
from clippy_train.errors import ConfigError, NonFinite
from clippy_train.run.changes import changes
from clippy_train.run.checkpoint import open_checkpoint
from clippy_train.run.folder import CONFIG, LEDGER, METRICS, checkpoint_folder
from clippy_train.run.rows import read_rows
from clippy_train.run.start import Start
from clippy_train.tokenizer import load_tokenizer
from clippy_train.train.callbacks.ledger import block_digest
from clippy_train.train.data import DataModule
from clippy_train.train.module import CodeLM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("skip", "batches"),
    [
        ([], [1, 2, 3, 4]),
        (["1"], [2, 3, 4, 5]),
        (["3"], [1, 2, 4, 5]),
        (["5-7", "2-3"], [1, 4, 8, 9]),
        (["9"], [1, 2, 3, 4]),
    ],
)
def test_which_batch_a_step_trains_on(
    train_config: Callable[..., TrainConfig], skip: list[str], batches: list[int]
) -> None:
    data = train_config(f"data.skip_steps=[{','.join(skip)}]").data
    assert [data.batch_of(step) for step in range(1, 5)] == batches


@pytest.mark.slow
@pytest.mark.parametrize("skip", ["0", "²", "3-", "a", "5-4", "[3,2-4]", "-1", "[1,1]"])
def test_what_names_no_steps_is_rejected(train_config: Callable[..., TrainConfig], skip: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.skip_steps"):
        train_config(f"data.skip_steps={skip}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "now", "step", "refused"),
    [
        ("[]", "[5]", 4, False),
        ("[]", "[5]", 5, True),
        ("[5]", "[]", 4, False),
        ("[5]", "[]", 5, True),
        ("[5]", "[5,6]", 5, True),  # step 5 trained on 6
        ("[5]", "[5,7]", 5, False),
        ("[5]", "[5,7]", 4, False),
        ("[2-3]", "[2,3]", 9, False),
    ],
)
def test_only_data_to_come_can_be_passed_over(
    train_config: Callable[..., TrainConfig], tmp_path: Path, before: str, now: str, step: int, refused: bool
) -> None:
    save(train_config(f"data.skip_steps={before}"), tmp_path / CONFIG)
    config = train_config(f"data.skip_steps={now}")
    if not refused:
        (line,) = changes(tmp_path, config, step)
        assert line.startswith("data.skip_steps was ")
        return
    with pytest.raises(ConfigError, match=f"refused for the data before step {step + 1}, which has been read"):
        changes(tmp_path, config, step)


def batches(config: TrainConfig, count: int) -> list[dict[str, Any]]:
    """The first global batches of a run on one rank."""
    cursors = np.zeros((config.data.streams, 5), dtype=np.int64)
    module = DataModule(config, load_tokenizer(str(config.tokenizer.base)), 0, cursors)
    parts = list(islice(module.train_dataloader(), count * config.micro_steps))
    return [
        {name: torch.cat([part[name] for part in parts[index : index + config.micro_steps]]) for name in parts[0]}
        for index in range(0, len(parts), config.micro_steps)
    ]


def poison(patch: pytest.MonkeyPatch, blocks: set[int]) -> None:
    """Have the loss of these blocks not be finite, wherever they are trained."""
    training_step = CodeLM.training_step

    def poisoned(self: CodeLM, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = training_step(self, batch, batch_idx)
        if blocks.intersection(map(block_digest, batch["input_ids"].numpy())):
            self.step.losses[-1] = loss.detach() * math.nan
        return loss

    patch.setattr(CodeLM, "training_step", poisoned)


class Kill(pl.Callback):
    """Kills its rank in the step after `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.processes
@pytest.mark.parametrize(
    "layout",
    [
        ["strategy=single", "trainer.devices=1", "trainer.micro_batch_size=2", "data.num_workers=0"],
        ["strategy=ddp", "trainer.devices=2", "trainer.micro_batch_size=1", "data.num_workers=2"],
    ],
    ids=["1 rank, no loader", "2 ranks, 2 loaders each"],
)
def test_a_run_goes_on_after_poisoned_batches_with_the_setting_that_it_names(
    train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: list[str]
) -> None:
    def config(*overrides: str) -> TrainConfig:
        return train_config(
            *SETTINGS, "data.streams=4", "trainer.global_batch_size=8", "checkpoint.keep_last=9",
            "trainer.max_steps=6", f"run.root={tmp_path}", *overrides,
        )  # fmt: skip

    def attempt(step: int, *overrides: str, kill: int = -1) -> str:
        """Train on after a step; what the run says at the end."""
        made = config(*layout, *overrides)
        start = Start(checkpoint_folder(made.run_dir, step) if step else None)

        def rank() -> str:
            try:
                run_rank(made, start, Kill(kill))
            except NonFinite as error:
                return str(error)
            return ""

        return run_distributed(rank, made.world_size)[0]

    natural = batches(config(*SINGLE), 8)
    blocks = [list(map(block_digest, batch["input_ids"].numpy())) for batch in natural]
    run_dir = config(*layout).run_dir
    run_dir.mkdir()
    poison(monkeypatch, {*blocks[2], *blocks[3]})

    said = attempt(0)
    assert said.startswith("step 3: not finite: ")
    assert "data.skip_steps=[3]," in said
    said = attempt(2, "data.skip_steps=[3]")
    assert said.startswith("step 3: not finite: ")
    assert "data.skip_steps=[3,4]," in said
    with pytest.raises(AssertionError, match="died"):
        attempt(2, "data.skip_steps=[3-4]", kill=4)
    assert attempt(4, "data.skip_steps=[3-4]") == ""

    trained = [0, 1, 4, 5, 6, 7]
    digests = [row["data/digest"] for row in read_rows(run_dir / METRICS, "train/loss")]
    assert digests == [f"{sum(blocks[batch]) % 2**64:016x}" for batch in trained]
    ledger = list(read_rows(run_dir / LEDGER))
    for row, batch in zip(ledger, trained, strict=True):
        assert sorted(row["spans"]) == sorted(natural[batch]["spans"].tolist())
    skipped = [span for batch in natural[2:4] for span in batch["spans"].tolist()]
    assert [sorted(row.get("skipped", [])) for row in ledger] == [[], [], sorted(skipped), [], [], []]
    manifest = open_checkpoint(checkpoint_folder(run_dir, 6)).manifest
    assert list(manifest.counts.values()) == sum(batch["counts"].sum(0) for batch in natural).tolist()
    assert manifest.cursors == committed(natural[-1])


def committed(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Where the streams continue after a global batch."""
    last = {stream: cursor for stream, *cursor in batch["cursor"].tolist()}
    return [last[stream] for stream in sorted(last)]
