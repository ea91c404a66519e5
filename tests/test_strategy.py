"""What a GPU would punish and a CPU does not show: timeouts that disagree, memory that is filled or not pinned."""

from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from support.fits import SETTINGS, SINGLE
from support.models import small_bpe
from torch import Tensor

from clippy_train.config import TrainConfig
from clippy_train.errors import DataError, Interrupted
from clippy_train.train import rank
from clippy_train.train.callbacks.watchdog import SLOW
from clippy_train.train.clock import Clock, seconds
from clippy_train.train.data import DataModule, _moved
from clippy_train.train.strategy import NEVER, build_strategy, build_trainer, collective_timeout


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lightning switches deterministic mode on for the whole process."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_restored")
def test_deterministic_mode_does_not_fill_new_tensors(train_config: Callable[..., TrainConfig]) -> None:
    build_trainer(train_config(*SETTINGS, *SINGLE))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.empty(1 << 16).isnan().all()


@pytest.mark.parametrize("watchdog_seconds", [1, 600])
def test_the_watchdog_expires_before_a_collective_does(watchdog_seconds: int) -> None:
    assert collective_timeout(watchdog_seconds).total_seconds() >= SLOW * watchdog_seconds + 60
    assert collective_timeout(0) == NEVER


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3"])
def test_every_strategy_leaves_a_hang_to_the_watchdog(train_config: Callable[..., TrainConfig], name: str) -> None:
    strategy = build_strategy(train_config(f"strategy={name}", "trainer.watchdog_seconds=700"))
    assert strategy._timeout == collective_timeout(700)  # type: ignore[attr-defined]  # given to the process group


@pytest.mark.parametrize(
    ("error", "code", "leaves"), [(ValueError("x"), 1, False), (DataError("x"), 3, False), (Interrupted("x"), 75, True)]
)
def test_only_ranks_that_end_together_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, code: int, leaves: bool
) -> None:
    """Leaving the process group after a failure could take until the watchdog expires."""
    left: list[bool] = []

    def fail(*_: object) -> None:
        raise error

    for name in ("load", "read_start", "SignalFlag", "_set_up_logging"):
        monkeypatch.setattr(rank, name, MagicMock())
    monkeypatch.setattr(rank, "train_rank", fail)
    monkeypatch.setattr(rank, "_leave_group", lambda: left.append(True))
    monkeypatch.setenv("RANK", "0")
    assert rank.main(str(tmp_path)) == code
    assert bool(left) == leaves


def test_time_on_a_gpu_is_that_between_events_on_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the host, which only launches."""

    class Event:
        made = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            Event.made += 1
            self.milliseconds = 250.0 * Event.made

        def record(self) -> None:
            self.recorded = True

        def elapsed_time(self, end: "Event") -> float:
            assert self.recorded
            assert end.recorded
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock, device = Clock(), torch.device("cuda", 0)
    for _ in range(2):
        clock.run(device)
        clock.pause(device)
    assert seconds(clock.take()) == 0.5


@pytest.mark.slow
def test_batches_are_copied_as_moved_copies_them(
    train_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clippy_train.train.data._moved", lambda tensor, device: f"{tensor.tolist()} to {device}")
    data = DataModule(train_config(), small_bpe(), 0, np.zeros((1, 2)))
    batch = {"input_ids": torch.ones(1, dtype=torch.int64)}
    assert data.transfer_batch_to_device(batch, torch.device("cuda", 0), 0) == {"input_ids": "[1] to cuda:0"}


def test_a_batch_is_pinned_before_it_is_copied_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from other memory would make the host wait."""
    calls: list[str] = []

    def pin(tensor: Tensor) -> Tensor:
        calls.append("pinned")
        return tensor

    def copy(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        calls.append(f"copied to {device}, {non_blocking=}")
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", copy)
    _moved(torch.ones(1), torch.device("cuda", 0))
    assert calls == ["pinned", "copied to cuda:0, non_blocking=True"]
