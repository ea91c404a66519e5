"""How well a model predicts text: nats, targets and bytes of the targets, summed by group of text.

Validation during training and `clippy evaluate` both take loss, perplexity and bits per byte from here. A group is a
language or any other label that is reported separately. Costs a scatter of three float64 numbers per target.
"""

import math

import numpy as np
import torch
from torch import Tensor


def new_sums(groups: int, device: torch.device | str = "cpu") -> Tensor:
    """Zeros for groups 1 to `groups`: `[1 + groups, 3]` float64 of nats, targets and bytes. Group 0 is not scored."""
    return torch.zeros(1 + groups, 3, dtype=torch.float64, device=device)


def add_scores(sums: Tensor, losses: Tensor, input_ids: Tensor, group: Tensor, token_bytes: Tensor) -> None:
    """Add the targets of a batch to `sums` in place.

    Args:
        losses: `[batch, seq - 1]` nats, from `model.loss.token_losses`.
        input_ids: `[batch, seq]`.
        group: `[batch, seq]`, the group of each token; 0 for padding and for context that is not scored.
        token_bytes: `[vocab]`, from `tokenizer.token_bytes`.
    """
    num_bytes = token_bytes[input_ids[:, 1:]]
    values = torch.stack([each.double().flatten() for each in (losses, torch.ones_like(losses), num_bytes)], dim=1)
    sums.index_add_(0, group[:, 1:].flatten(), values)


def measures(sums: np.ndarray) -> dict[str, float]:
    """Loss in nats per target, perplexity, and bits per byte, from `[3]` nats, targets and bytes."""
    nats, targets, num_bytes = sums.tolist()
    loss = nats / targets
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else math.inf,
    }
