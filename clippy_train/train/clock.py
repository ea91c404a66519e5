"""Time as the device sees it: on CUDA between events on its stream, without a wait of the host; else wall time."""

import time
from typing import cast

import torch

Mark = float | torch.cuda.Event
Span = tuple[Mark, Mark]


def mark(device: torch.device) -> Mark:
    """This moment, or on CUDA the moment when the device gets here."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(spans: list[Span]) -> float:
    """The length of spans together. On CUDA the device must have passed their ends: wait for it before."""
    return sum(
        end - start
        if isinstance(start, float) and isinstance(end, float)
        else cast(torch.cuda.Event, start).elapsed_time(cast(torch.cuda.Event, end)) / 1e3
        for start, end in spans
    )


class Clock:
    """Records when it ran; it can be paused."""

    def __init__(self) -> None:
        self._start: Mark | None = None
        self._spans: list[Span] = []

    def run(self, device: torch.device) -> None:
        if self._start is None:
            self._start = mark(device)

    def pause(self, device: torch.device) -> None:
        if self._start is not None:
            self._spans.append((self._start, mark(device)))
            self._start = None

    def take(self) -> list[Span]:
        """When it ran since the last call."""
        spans, self._spans = self._spans, []
        return spans
