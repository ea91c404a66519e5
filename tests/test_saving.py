"""Saves beside training: what they hold, what training waits for, and the validations that a killed run misses."""

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.distributed import run_distributed
from support.fits import ALONE, SETTINGS, SINGLE, Fit
from support.runs import Runs
from torch.utils._pytree import tree_leaves

from clippy_train.config import TrainConfig
from clippy_train.run.checkpoint import find_checkpoint, hash_file, open_checkpoint
from clippy_train.run.consolidate import WEIGHTS, consolidated_tensors
from clippy_train.run.folder import METRICS, STATE, checkpoint_folder, last_step
from clippy_train.run.moments import MOMENTS
from clippy_train.run.rows import SCORE, read_rows
from clippy_train.train import collective
from clippy_train.train.strategy import build_trainer
from clippy_train.train.writer import Snapshot


def hold_saves(patch: pytest.MonkeyPatch, gate: Path, timeout: float = 60) -> None:
    """No file of a checkpoint is written before `gate` exists."""
    save = torch.save

    def held(state: Any, path: Path) -> None:
        deadline = time.monotonic() + timeout
        while not gate.exists():
            assert time.monotonic() < deadline, f"{gate.name} never opened: training waited for its save"
            time.sleep(0.01)
        save(state, path)

    patch.setattr(torch, "save", held)


@pytest.mark.processes
@pytest.mark.parametrize("strategy", ["zero1", "ddp"])
def test_training_goes_on_while_a_checkpoint_is_written_and_the_checkpoint_is_that_of_its_step(
    train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    def train(asynchronous: str) -> tuple[Path, dict[int, int]]:
        config = train_config(
            *SETTINGS, f"strategy={strategy}", "trainer.devices=2", "trainer.micro_batch_size=1", "trainer.max_steps=6",
            "trainer.val_every_steps=100", "checkpoint.every_steps=4", f"checkpoint.asynchronous={asynchronous}",
            f"run.root={tmp_path}", f"run.name={asynchronous}",
        )  # fmt: skip
        newest: dict[int, int] = {}  # checkpoint after each step

        class Look(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
                newest[trainer.global_step] = last_step(config.run_dir)
                if trainer.global_step == 5:
                    gate.touch()

        def rank() -> dict[int, int]:
            training = Fit(config)
            if collective.rank() == 0:
                training.callbacks.append(Look())
            training.fit()
            return newest

        return config.run_dir, run_distributed(rank, 2)[0]

    gate = tmp_path / "gate"
    reference, newest = train("false")
    assert newest == {0: 0, 1: 0, 2: 0, 3: 0, 4: 4, 5: 4, 6: 6}
    gate.unlink()
    hold_saves(monkeypatch, gate)
    run_dir, newest = train("true")
    assert newest == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 4}  # the save of step 6 waited for that of step 4
    for step in (4, 6):
        saved, expected = (open_checkpoint(checkpoint_folder(each, step)) for each in (run_dir, reference))
        assert saved.manifest.files.keys() == expected.manifest.files.keys()
        for name in saved.manifest.files:
            if name.startswith("state") and not name.endswith("latest"):
                states = [torch.load(each.path / name, weights_only=False) for each in (saved, expected)]
                leaves = zip(*map(tree_leaves, states), strict=True)
                assert all(torch.equal(*pair) if isinstance(pair[0], torch.Tensor) else True for pair in leaves), name
    (row, *_) = read_rows(run_dir / METRICS, "checkpoint/stall")
    assert row["checkpoint/step"] == 4
    assert row["checkpoint/stall"] < row["checkpoint/seconds"]


@pytest.mark.processes
@pytest.mark.parametrize("strategy", ["single", "zero1", "zero3"])
def test_a_checkpoint_of_a_gpu_is_read_without_one(
    train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Files name the device of each tensor; what reads them must not need it."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    config = train_config(
        *SETTINGS, f"strategy={strategy}", "trainer.devices=1", "checkpoint.every_steps=3", f"run.root={tmp_path}"
    )

    def train() -> None:
        fit = Fit(config)
        fit.module.model.config.save_pretrained(config.run_dir)
        fit.fit()

    def resume(state: Path) -> int:
        fit = Fit(config)
        trainer = build_trainer(config, callbacks=[], logger=False)
        trainer.fit(fit.module, fit.data, ckpt_path=state)
        return trainer.global_step

    run_distributed(train, 1)
    checkpoint = find_checkpoint(config.run_dir)
    assert checkpoint
    state = checkpoint.path / STATE
    files = state.rglob("*optim_states.pt") if state.is_dir() else [state]
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(next(iter(files)), weights_only=False)
    assert run_distributed(lambda: resume(state), 1) == [3]
    found = consolidated_tensors(checkpoint, config.run_dir, (WEIGHTS, *MOMENTS))
    assert {each.device.type for tensors in found.values() for each in tensors.values()} == {"cpu"}


def test_a_snapshot_does_not_change_with_the_state_and_keeps_ties_and_types() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"a": OrderedDict(w=weight, tied=weight), "b": [weight[0], (torch.ones(2), 7)], "c": None}
    snapshot = Snapshot()
    copied = snapshot.of(state)
    snapshot.wait()
    weight += 1
    assert copied["a"]["w"] is copied["a"]["tied"]
    assert isinstance(copied["a"], OrderedDict)
    assert copied["a"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied["b"][0].tolist() == [0, 1, 2]
    assert copied["b"][1][1] == 7
    memory = copied["a"]["w"].data_ptr()
    again = snapshot.of({"w": weight})
    assert again["w"].data_ptr() == memory  # its file was written: the memory is used again
    assert again["w"].tolist() == weight.tolist()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path) -> Runs:
    made = Runs(tmp_path_factory.mktemp("saving"), tiny_corpus, tiny_tokenizer)
    made.settings += ["strategy=single", "trainer.devices=1", "trainer.micro_batch_size=8"]
    return made


def test_a_validation_that_a_killed_run_missed_is_made_up(runs: Runs) -> None:
    runs.train("killed")
    path = runs.folder("killed") / METRICS
    rows = list(read_rows(path))
    missed = [row for row in rows if SCORE in row and row["step"] == 6]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row not in missed))
    before = hash_file(checkpoint_folder(runs.folder("killed"), 6) / "manifest.json")

    assert "resuming runs/killed from step 6" in runs.train("killed").stdout
    assert [row for row in read_rows(path, SCORE) if row["step"] == 6] == missed
    assert hash_file(checkpoint_folder(runs.folder("killed"), 6) / "manifest.json") == before
    assert "finished, step 6 of 6" in runs.train("killed").stdout
    best = find_checkpoint(runs.folder("killed"))
    assert best
    assert (runs.folder("killed") / "checkpoints" / "best").resolve() == best.path.resolve()


def test_a_save_does_not_wait_for_its_validation(
    train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    fit = Fit(train_config(*SETTINGS, *SINGLE, f"run.root={tmp_path}"))

    validate = fit.module.validation_step

    def crash_at_the_end(batch: Any, batch_idx: int) -> None:
        if fit.module.trainer.global_step == 3:
            raise RuntimeError("a validation that crashes")
        validate(batch, batch_idx)

    fit.module.validation_step = crash_at_the_end  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="crashes"):
        fit.fit()
    assert last_step(fit.config.run_dir) == 3
