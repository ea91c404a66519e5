"""What a GPU would punish and a CPU does not show: timeouts that disagree, memory that is filled or not pinned."""

from collections.abc import Callable, Iterator

import pytest
import torch
from support.fits import SETTINGS, SINGLE
from torch import Tensor

from clippy_train.config import TrainConfig
from clippy_train.train.callbacks.watchdog import SLOW
from clippy_train.train.data import _moved
from clippy_train.train.strategy import NEVER, build_trainer, collective_timeout


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
