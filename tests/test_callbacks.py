"""The order of the callbacks: each guarantee holds in the order of `callbacks.order` and fails when two are swapped."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from support.fits import ALONE, SETTINGS, SINGLE, Fit

from clippy_train.config import TrainConfig
from clippy_train.errors import NonFinite
from clippy_train.run.checkpoint import find_checkpoint
from clippy_train.run.folder import last_step
from clippy_train.train.callbacks.checkpointer import Checkpointer
from clippy_train.train.callbacks.health import Health
from clippy_train.train.callbacks.ledger import Ledger
from clippy_train.train.callbacks.monitor import Monitor
from clippy_train.train.callbacks.preemption import Preemption
from clippy_train.train.callbacks.progress import Progress
from clippy_train.train.callbacks.watchdog import Watchdog


@pytest.fixture
def run(
    train_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Fit]:
    """A run of three steps; `run(A, B)` with two callbacks swapped."""
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)

    def build(*swapped: type) -> Fit:
        fit = Fit(train_config(*SETTINGS, *SINGLE, f"run.root={tmp_path}", "run.name=run"))
        if swapped:
            first, second = (kinds(fit).index(each) for each in swapped)
            fit.callbacks[first], fit.callbacks[second] = fit.callbacks[second], fit.callbacks[first]
        return fit

    return build


def kinds(fit: Fit) -> list[type]:
    return [type(each) for each in fit.callbacks]


def test_the_order_is_the_documented_one(run: Callable[..., Fit]) -> None:
    assert kinds(run()) == [Progress, Watchdog, Health, Monitor, Ledger, Checkpointer, Preemption]


def checkpoint_cursors_follow_the_step(run: Fit) -> bool:
    progress, after = run.callback(Progress), {}

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if run.module.step.ended:
                after[trainer.global_step] = progress.cursors.copy()

    run.callbacks.append(Record())
    run.fit()
    checkpoint = find_checkpoint(run.config.run_dir, step=2)
    assert checkpoint
    return np.array_equal(checkpoint.manifest.cursors, after[2])


def the_row_of_a_step_is_on_disk_before_its_checkpoint(run: Fit) -> bool:
    seen: list[bool] = []
    checkpointer = run.callback(Checkpointer)
    save = checkpointer.save

    def saved(trainer: pl.Trainer, last: bool = False) -> None:
        save(trainer, last)
        seen.append(last_step(run.config.run_dir) == run.rows()[-1]["step"] if run.rows() else False)

    checkpointer.save = saved  # type: ignore[method-assign]  # observed
    run.fit()
    assert len(seen) == 4  # the last step is saved again after its validation
    return all(seen)


def a_non_finite_step_is_not_logged(run: Fit) -> bool:
    step = type(run.module).training_step

    def poisoned(batch: dict[str, object], batch_idx: int) -> object:
        loss = step(run.module, batch, batch_idx)  # type: ignore[arg-type]
        if batch_idx == 3:  # the last micro-batch of step 2
            run.module.step.losses[-1] = loss.detach() * math.nan
        return loss

    run.module.training_step = poisoned  # type: ignore[assignment]
    with pytest.raises(NonFinite):
        run.fit()
    return [row["step"] for row in run.rows()] == [1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("holds", "swapped"),
    [
        (checkpoint_cursors_follow_the_step, (Progress, Checkpointer)),
        (the_row_of_a_step_is_on_disk_before_its_checkpoint, (Monitor, Checkpointer)),
        (a_non_finite_step_is_not_logged, (Health, Monitor)),
    ],
)
def test_swapping_two_callbacks_breaks_a_guarantee(
    run: Callable[..., Fit], tmp_path: Path, holds: Callable[[Fit], bool], swapped: tuple[type, type]
) -> None:
    assert holds(run())
    (tmp_path / "run").rename(tmp_path / "ordered")
    assert not holds(run(*swapped))
