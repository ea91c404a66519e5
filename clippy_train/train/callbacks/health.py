"""What goes wrong without an error: numbers that are not finite, and replicas of the weights that drift apart.

Both are looked for on the device; the host asks when a step is logged and before a checkpoint. Costs four small kernels
for each micro-batch, and one pass over the weights for each checkpoint.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from clippy_train.errors import Diverged, NonFinite
from clippy_train.train import collective
from clippy_train.train.callbacks.progress import step_ended

NEVER = 2**62


class Finite(pl.Callback):
    """Finds the first loss or gradient norm that is not finite. Must come before `Monitor`, which clears the losses."""

    def __init__(self, micro_steps: int, shards: Sequence[str]) -> None:
        self.micro_steps, self.shards = micro_steps, shards
        self._start()

    def _start(self) -> None:
        self._spans: list[np.ndarray] = []  # of each micro-batch since the last check
        self._first = {"loss": torch.tensor(NEVER), "norm": torch.tensor(NEVER)}  # the first of them that was bad

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._look("loss", pl_module.micro_losses[-1], pl_module.device)
        if step_ended(trainer, batch_idx):
            self._look("norm", pl_module.grad_norm, pl_module.device)
        self._spans.append(batch["spans"].numpy())

    def _look(self, name: str, value: Tensor | float, device: torch.device) -> None:
        first = self._first[name].to(device)
        finite = torch.isfinite(torch.as_tensor(value, device=device))
        self._first[name] = torch.where(finite, first, first.clamp(max=len(self._spans)))

    def check(self, trainer: pl.Trainer) -> None:
        """Collective, and waits for the device.

        Raises:
            NonFinite: a number since the last check was not finite. Names step, ranks and the text that they had.
        """
        loss, norm = (int(first) for first in self._first.values())
        spans = self._spans
        self._start()
        if not collective.anyone(min(loss, norm) < NEVER):
            return
        first = min(collective.gather(min(loss, norm)))
        text = f"the loss of rank {collective.rank()} on {self._texts(spans[first])}" if loss == first else ""
        losses = [each for each in collective.gather(text) if each]
        step = trainer.global_step - (len(spans) - 1 - first) // self.micro_steps
        what = "; ".join(losses) or f"the gradient norm, with finite losses, last on {self._texts(spans[first])}"
        raise NonFinite(f"step {step}: not finite: {what}. Nothing of this step is saved")

    def _texts(self, spans: np.ndarray) -> str:
        """The documents of a micro-batch: `[spans, 6]`, stream and `data.stream.Span`."""
        return ", ".join(f"{self.shards[shard]} line {line + 1}" for _, _, shard, line, _, _ in spans.tolist())


def _own_part(parameter: Any) -> Tensor:
    """What this rank holds of a parameter: under ZeRO-3 a part, filled up at the end with whatever was in memory."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    part = parameter.ds_tensor.flatten()
    return part[: max(0, parameter.ds_numel - collective.rank() * part.numel())]


def require_equal_replicas(module: Any, step: int) -> None:
    """Compare the weights that every rank holds in full; look through all of them for numbers that are not finite.

    Collective. Raises:
        NonFinite: a weight is not finite.
        Diverged: a weight differs between ranks.
    """
    tensors = {name: _own_part(each).detach() for name, each in module.model.named_parameters()}
    if collective.anyone(not torch.stack([torch.isfinite(each).all() for each in tensors.values()]).all().item()):
        raise NonFinite(f"step {step}: a weight is not finite, and so nothing is saved")
    if module.config.strategy.stage == 3:
        return  # each rank holds a part of its own
    mine = torch.stack([torch.hash_tensor(each) for each in tensors.values()]).tolist()
    ranks = collective.gather(mine)
    common = Counter(map(tuple, ranks)).most_common(1)[0][0]  # with two ranks, that of the first
    others = [rank for rank, hashes in enumerate(ranks) if tuple(hashes) != common]
    if others:
        names = [name for name, *hashes in zip(tensors, *ranks, strict=True) if len(set(hashes)) > 1]
        raise Diverged(
            f"step {step}: the weights of ranks {others} are no longer those of the other ranks: {len(names)} tensors "
            f"differ, the first is {names[0]}. A fault of memory, network or device; nothing is saved, and the same "
            "command continues from the last checkpoint"
        )
