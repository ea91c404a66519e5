"""What goes wrong without an error: numbers that are not finite, and replicas of the weights that diverge.

Both are looked for on the device; the host reads the result when a step is logged and before a checkpoint. Costs four
small kernels per micro-batch, and one pass over the weights per checkpoint.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from clippy_train.config import DataConfig
from clippy_train.data.batches import Batch
from clippy_train.errors import Diverged, NonFinite
from clippy_train.train import collective
from clippy_train.train.internals import own_part
from clippy_train.train.module import CodeLM, code_lm

NEVER = 2**62


class Health(pl.Callback):
    """Finds the first loss or gradient norm that is not finite.

    Args:
        shards: the names of those that each stream reads, for messages.
    """

    def __init__(self, micro_steps: int, shards: Sequence[Sequence[str]], data: DataConfig) -> None:
        self.micro_steps, self.shards, self.data = micro_steps, shards, data
        self._reset()

    def _reset(self) -> None:
        self._spans: list[np.ndarray] = []  # of each micro-batch since the last check
        self._first_bad = {"loss": torch.tensor(NEVER), "norm": torch.tensor(NEVER)}  # its index among them

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = code_lm(pl_module).step
        self._look_at("loss", step.losses[-1], pl_module.device)
        if step.ended:
            self._look_at("norm", step.grad_norm, pl_module.device)
        self._spans.append(batch["spans"].numpy())

    def _look_at(self, name: str, value: Tensor | float, device: torch.device) -> None:
        first = self._first_bad[name].to(device)
        finite = torch.isfinite(torch.as_tensor(value, device=device))
        self._first_bad[name] = torch.where(finite, first, first.clamp(max=len(self._spans)))

    def check(self, trainer: pl.Trainer) -> None:
        """Collective, and waits for the device.

        Raises:
            NonFinite: a number since the last check was not finite. Names the step, the ranks and their documents.
        """
        loss, norm = (int(first) for first in self._first_bad.values())
        spans = self._spans
        self._reset()
        if not collective.anyone(min(loss, norm) < NEVER):
            return
        first = min(collective.gather(min(loss, norm)))
        text = f"the loss of rank {collective.rank()} on {self._documents(spans[first])}" if loss == first else ""
        losses = [each for each in collective.gather(text) if each]
        step = trainer.global_step - (len(spans) - 1 - first) // self.micro_steps
        what = "; ".join(losses) or f"the gradient norm, with finite losses, last on {self._documents(spans[first])}"
        skipped = ",".join([*self.data.skip_steps, str(self.data.batch_of(step))])
        raise NonFinite(
            f"step {step}: not finite: {what}. Nothing of this step is saved. If its data are to blame, continue with "
            f"data.skip_steps=[{skipped}], which passes over them"
        )

    def _documents(self, spans: np.ndarray) -> str:
        """The documents of a micro-batch from its spans, `[spans, 6]`: stream, then `data.stream.Span`."""
        places = [(self.shards[stream][shard], line + 1) for stream, _, shard, line, _, _ in spans.tolist()]
        return ", ".join(f"{shard} line {line}" for shard, line in places)


def require_equal_replicas(module: CodeLM, step: int) -> None:
    """Check that all weights are finite, and that those which every rank holds in full are equal on all ranks.

    Collective. Raises:
        NonFinite: a weight is not finite.
        Diverged: a weight differs between ranks.
    """
    tensors = {name: own_part(each) for name, each in module.model.named_parameters()}
    extremes = [extreme for each in tensors.values() if each.numel() for extreme in torch.aminmax(each)]
    if collective.anyone(not torch.stack(extremes).isfinite().all().item()):  # much faster than `isfinite` on each
        raise NonFinite(f"step {step}: a weight is not finite; nothing is saved")
    if module.config.strategy.stage == 3:
        return  # each rank holds another part
    own = torch.stack([torch.hash_tensor(each) for each in tensors.values()]).tolist()
    ranks = collective.gather(own)
    common = Counter(map(tuple, ranks)).most_common(1)[0][0]  # of two ranks, the first one's
    others = [rank for rank, hashes in enumerate(ranks) if tuple(hashes) != common]
    if others:
        names = [name for name, *hashes in zip(tensors, *ranks, strict=True) if len(set(hashes)) > 1]
        raise Diverged(
            f"step {step}: the weights of ranks {others} differ from those of the other ranks: {len(names)} tensors, "
            f"the first is {names[0]}. A fault of memory, network or device; nothing is saved, and the same command "
            "continues from the last checkpoint"
        )
