"""The training loss of a causal LM: the shift from tokens to targets happens here, and nowhere else.

The logits of a batch never exist at once: the head takes `CHUNK` tokens at a time, in the precision of the model,
reduces them in fp32, and in training turns them into gradients on the spot, so that backward has only to scale them. It
holds, beside the gradient of its weight, one chunk of logits in that precision and one in fp32 (1024 x 50304: 0.1 and
0.2 GB), where Hugging Face holds all logits several times over.

All of it happens inside the head's own forward pass: under ZeRO-3 its weight exists nowhere else.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clippy_train.model.attention import hidden_states

CHUNK = {"cpu": 1024, "cuda": 4096}  # tokens: large enough that adding a chunk's share to the fp32 gradient is cheap
VOCAB_MULTIPLE = 128  # the head works on so many times so many rows: tensor cores take odd widths at half their speed


def mean_loss(
    model: Any, input_ids: Tensor, attention: str, loss_dtype: str = "fp32", eos: int | None = None
) -> Tensor:
    """Mean negative log-likelihood of the targets in nats, for training: an fp32 scalar to call `backward` on once.

    Args:
        model: a `GPTNeoForCausalLM`; under ZeRO-3 its `lm_head` must be its `loss_head`.
        input_ids: `[batch, seq]`; the targets are `input_ids[:, 1:]`, so a row's first token is never one
            (as in the original, which shifts inside the block).
        attention: `eager` runs Hugging Face's forward pass; the others are those of `model.attention`.
        loss_dtype: `bf16` rounds as the original did: log-softmax in bf16, its mean in fp32; all logits at once.
        eos: the token that ends a document, where attention must not leave documents.
    """
    hidden = _hidden(model, input_ids, attention, eos)
    return loss_head(model)(hidden, input_ids[:, 1:], loss_dtype=loss_dtype).mean()


@torch.no_grad()
def token_losses(
    model: Any, input_ids: Tensor, attention: str, loss_dtype: str = "fp32", eos: int | None = None
) -> Tensor:
    """Negative log-likelihood of every target, `[batch, seq - 1]` fp32, without gradients; otherwise as `mean_loss`."""
    hidden = _hidden(model, input_ids, attention, eos)
    return loss_head(model)(hidden, input_ids[:, 1:], reduce=False, loss_dtype=loss_dtype)


def _hidden(model: Any, input_ids: Tensor, attention: str, eos: int | None) -> Tensor:
    """The hidden state before each target, `[batch, seq - 1, hidden]`."""
    if attention == "eager":
        return model.transformer(input_ids, use_cache=False).last_hidden_state[:, :-1]
    return hidden_states(model.transformer, input_ids, attention, eos)[:, :-1]


class LossHead(torch.nn.Linear):
    """GPT-Neo's head, with the same weight under the same name; given targets, it returns losses instead of logits."""

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, *, reduce: bool = True, loss_dtype: str = "fp32"
    ) -> Tensor:
        if targets is None:
            return super().forward(hidden)
        if loss_dtype == "bf16":
            return _bf16_losses(super().forward(hidden), targets)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        rows, ids = hidden.flatten(0, 1), targets.flatten()
        with torch.autocast(kind, enabled=False):
            if reduce:
                return _MeanLoss.apply(rows, self.weight, ids, dtype)
            return _losses(rows.to(dtype), self.weight.to(dtype), ids).view_as(targets)


def loss_head(model: Any) -> LossHead:
    """A model's head as one that computes losses, on the same (tied) parameter."""
    if isinstance(model.lm_head, LossHead):
        return model.lm_head
    weight = model.lm_head.weight
    head = LossHead(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = weight
    return head


class _MeanLoss(torch.autograd.Function):
    """Mean loss of `[tokens, hidden]` hidden states; the gradients are made in forward, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        tokens, vocab_size = len(hidden), len(weight)
        chunk = min(tokens, CHUNK[hidden.device.type])
        inputs, head = hidden.to(dtype), F.pad(weight.to(dtype), (0, 0, 0, -vocab_size % VOCAB_MULTIPLE))
        logits = head.new_empty(chunk, len(head))  # buffers: on CPU, new memory costs more than the arithmetic on it
        scores = head.new_empty(chunk, len(head), dtype=torch.float32)
        grad_inputs, grad_head = torch.empty_like(inputs), torch.zeros_like(head, dtype=torch.float32)
        losses = scores.new_empty(tokens)
        parts = (each.split(chunk) for each in (inputs, targets, grad_inputs, losses))
        for x, ids, grad_x, loss in zip(*parts, strict=True):
            low = torch.mm(x, head.T, out=logits[: len(x)])
            high = scores[: len(x)].copy_(low)
            high[:, vocab_size:] = -torch.inf
            values, sums = _exponentials_(high, ids)
            loss.copy_(values)
            low.copy_(_softmax_gradient_(high, sums, ids).div_(tokens))
            torch.mm(low, head, out=grad_x)
            grad_head += low.T @ x
        ctx.save_for_backward(grad_inputs.to(hidden.dtype), grad_head[:vocab_size].to(weight.dtype))
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Losses of `[tokens, hidden]` hidden states, chunk by chunk."""
    parts = (each.split(CHUNK[hidden.device.type]) for each in (hidden, targets))
    return torch.cat([_exponentials_((x @ weight.T).float(), ids)[0] for x, ids in zip(*parts, strict=True)])


def _exponentials_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Turn `[tokens, vocab]` logits into exponentials, in place; the losses `[tokens]` and the sums `[tokens, 1]`."""
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    target = logits.gather(1, targets[:, None])
    sums = logits.exp_().sum(dim=-1, keepdim=True)
    return (sums.log() - target)[:, 0], sums


def _softmax_gradient_(exponentials: Tensor, sums: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the summed losses by the logits, in place of their exponentials."""
    probabilities, index = exponentials.div_(sums), targets[:, None]
    return probabilities.scatter_(1, index, probabilities.gather(1, index) - 1)


def _bf16_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses of the original's bf16 log-softmax, whose every intermediate value is rounded to bf16."""
    with torch.autocast(logits.device.type, enabled=False):  # which on CUDA would compute it in fp32
        logits = logits.bfloat16()
        shifted = logits - logits.amax(dim=-1, keepdim=True).detach()
        normaliser = shifted.exp().sum(dim=-1).log()
        return (normaliser - shifted.gather(-1, targets[..., None])[..., 0]).float()
