"""The training loss of a causal LM: the shift from tokens to targets happens here, and nowhere else."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clippy_train.model.attention import hidden_states


def token_losses(model: Any, input_ids: Tensor, attention: str) -> Tensor:
    """Negative log-likelihood of every target in nats, in fp32 whatever the precision of the model.

    Args:
        model: a `GPTNeoForCausalLM`.
        input_ids: `[batch, seq]`; the targets are `input_ids[:, 1:]`, so a row's first token is never one
            (as in the original, which shifts inside the block).
        attention: `eager` runs Hugging Face's forward pass, anything else ours.

    Returns:
        `[batch, seq - 1]`.
    """
    if attention == "eager":
        hidden = model.transformer(input_ids, use_cache=False).last_hidden_state
    else:
        hidden = hidden_states(model.transformer, input_ids)
    logits = model.lm_head(hidden[:, :-1]).float()  # [batch, seq - 1, vocab]
    targets = input_ids[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
