"""The training loss of a causal LM: the shift from tokens to targets happens here, and nowhere else."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clippy_train.model.attention import hidden_states


def token_losses(model: Any, input_ids: Tensor, attention: str, loss_dtype: str = "fp32") -> Tensor:
    """Negative log-likelihood of every target in nats, in fp32 whatever the precision of the model.

    Args:
        model: a `GPTNeoForCausalLM`.
        input_ids: `[batch, seq]`; the targets are `input_ids[:, 1:]`, so a row's first token is never one
            (as in the original, which shifts inside the block).
        attention: `eager` runs Hugging Face's forward pass, anything else ours.
        loss_dtype: `bf16` rounds as the original did: log-softmax in bf16, its mean in fp32.

    Returns:
        `[batch, seq - 1]` fp32.
    """
    if attention == "eager":
        hidden = model.transformer(input_ids, use_cache=False).last_hidden_state
    else:
        hidden = hidden_states(model.transformer, input_ids)
    logits = model.lm_head(hidden[:, :-1])  # [batch, seq - 1, vocab]
    targets = input_ids[:, 1:]
    if loss_dtype == "bf16":
        return _bf16_losses(logits, targets)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _bf16_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses of the original's bf16 log-softmax, whose every intermediate value is rounded to bf16."""
    with torch.autocast(logits.device.type, enabled=False):  # which on CUDA would compute it in fp32
        logits = logits.bfloat16()
        shifted = logits - logits.amax(dim=-1, keepdim=True).detach()
        normaliser = shifted.exp().sum(dim=-1).log()
        return (normaliser - shifted.gather(-1, targets[..., None])[..., 0]).float()
