"""The training loss of a causal LM. Tokens are shifted to targets here, and nowhere else.

The logits of a batch never exist at once. The head computes `CHUNK` tokens at a time in the model's precision, reduces
them in fp32, and in training turns them into gradients at once, which backward only scales. Besides the gradient of its
weight it holds one chunk of logits in fp32 and, if that differs, one in the model's precision (4096 x 50304 on CUDA:
0.8 and 0.4 GB); Hugging Face holds all logits several times over.

All of this runs inside the head's own forward pass: under ZeRO-3 its weight is gathered only there.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTNeoForCausalLM

from clippy_train.model.attention import Masks, hidden_states

CHUNK = {"cpu": 1024, "cuda": 4096}  # tokens: enough that accumulating into the fp32 gradient is cheap
VOCAB_MULTIPLE = 128  # the head's rows are padded to a multiple: on odd widths tensor cores run at half speed


def mean_loss(
    model: GPTNeoForCausalLM,
    input_ids: Tensor,
    attention: str,
    loss_dtype: str = "fp32",
    masks: Masks | None = None,
    predicted: Tensor | None = None,
) -> Tensor:
    """Mean negative log-likelihood of the targets in nats, for training: an fp32 scalar to call `backward` on once.

    Args:
        model: under ZeRO-3 its `lm_head` must be its `loss_head`.
        input_ids: `[batch, seq]`; the targets are `input_ids[:, 1:]`, so the first token of a sequence is never a
            target (as in the original, which shifts inside the block).
        attention: `eager` runs Hugging Face's forward pass; the others are the kernels of `model.attention`.
        loss_dtype: `bf16` rounds as the original did: log-softmax in bf16, its mean in fp32; all logits at once.
        masks: of `attention_masks`, for the same kernel; by default attention crosses documents.
        predicted: `[batch, seq]`, 0 for a token that is only read: it counts in the mean with a loss of 0.
    """
    hidden = _hidden(model, input_ids, attention, masks)
    weights = None if predicted is None else predicted[:, 1:]
    losses: Tensor = loss_head(model)(hidden, input_ids[:, 1:], loss_dtype=loss_dtype, weights=weights)
    return losses.mean()


@torch.no_grad()
def token_losses(
    model: GPTNeoForCausalLM, input_ids: Tensor, attention: str, loss_dtype: str = "fp32", masks: Masks | None = None
) -> Tensor:
    """Negative log-likelihood of every target, `[batch, seq - 1]` fp32, without gradients; arguments of `mean_loss`."""
    hidden = _hidden(model, input_ids, attention, masks)
    losses: Tensor = loss_head(model)(hidden, input_ids[:, 1:], reduce=False, loss_dtype=loss_dtype)
    return losses


def _hidden(model: GPTNeoForCausalLM, input_ids: Tensor, attention: str, masks: Masks | None) -> Tensor:
    """The hidden state that predicts each target, `[batch, seq - 1, hidden]`."""
    if attention == "eager":
        hidden: Tensor = model.transformer(input_ids, use_cache=False).last_hidden_state
    else:
        hidden = hidden_states(model.transformer, input_ids, attention, masks)
    return hidden[:, :-1]


class LossHead(torch.nn.Linear):
    """GPT-Neo's head, with the same weight under the same name; with targets it returns losses instead of logits."""

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        reduce: bool = True,
        loss_dtype: str = "fp32",
        weights: Tensor | None = None,
    ) -> Tensor:
        if targets is None:
            return super().forward(hidden)
        if loss_dtype == "bf16":
            losses = _bf16_losses(super().forward(hidden), targets)
            return losses if weights is None else losses * weights
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        rows, ids = hidden.flatten(0, 1), targets.flatten()
        factors = None if weights is None else weights.flatten()
        with torch.autocast(kind, enabled=False):
            if reduce:
                mean = _MeanLoss.apply(rows, self.weight, ids, dtype, factors)  # type: ignore[no-untyped-call]  # untyped in torch
                return cast(Tensor, mean)
            return _losses(rows.to(dtype), self.weight.to(dtype), ids).view_as(targets)


def loss_head(model: GPTNeoForCausalLM) -> LossHead:
    """A head that computes losses with the model's own (tied) parameter."""
    if isinstance(model.lm_head, LossHead):
        return model.lm_head
    weight = model.lm_head.weight
    head = LossHead(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = weight
    return head


class _MeanLoss(torch.autograd.Function):
    """Mean loss of `[tokens, hidden]` hidden states; forward computes the gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, factors: Tensor | None
    ) -> Tensor:
        tokens, vocab_size = len(hidden), len(weight)
        chunk = min(tokens, CHUNK[hidden.device.type])
        inputs, head = hidden.to(dtype), F.pad(weight.to(dtype), (0, 0, 0, -vocab_size % VOCAB_MULTIPLE))
        logits = head.new_empty(chunk, len(head))  # reused buffers: on CPU, new memory costs more than the arithmetic
        scores = logits if dtype is torch.float32 else torch.empty_like(logits, dtype=torch.float32)
        grad_inputs, grad_head = torch.empty_like(inputs), torch.zeros_like(head, dtype=torch.float32)
        losses = scores.new_empty(tokens)
        factors = torch.ones_like(losses) if factors is None else factors.to(losses.dtype)
        parts = (each.split(chunk) for each in (inputs, targets, grad_inputs, losses, factors))
        for x, ids, grad_x, loss, factor in zip(*parts, strict=True):
            low = torch.mm(x, head.T, out=logits[: len(x)])
            high = scores[: len(x)].copy_(low)
            high[:, vocab_size:] = -torch.inf
            values, sums = _exponentials_(high, ids)
            loss.copy_(values)
            low.copy_(_softmax_gradient_(high, sums, ids, factor[:, None] / tokens))
            torch.mm(low, head, out=grad_x)
            grad_head += low.T @ x
        ctx.save_for_backward(grad_inputs.to(hidden.dtype), grad_head[:vocab_size].to(weight.dtype))
        return (losses * factors).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Losses of `[tokens, hidden]` hidden states, chunk by chunk."""
    parts = (each.split(CHUNK[hidden.device.type]) for each in (hidden, targets))
    return torch.cat([_exponentials_((x @ weight.T).float(), ids)[0] for x, ids in zip(*parts, strict=True)])


def _exponentials_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Turn `[tokens, vocab]` logits into exponentials in place; return losses `[tokens]` and sums `[tokens, 1]`."""
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    target = logits.gather(1, targets[:, None])
    sums = logits.exp_().sum(dim=-1, keepdim=True)
    return (sums.log() - target)[:, 0], sums


def _softmax_gradient_(exponentials: Tensor, sums: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Overwrite the exponentials of logits with the gradient of the losses, each times its `scale` (`[tokens, 1]`)."""
    scaled, index = exponentials.mul_(scale / sums), targets[:, None]
    return scaled.scatter_(1, index, scaled.gather(1, index) - scale)


def _bf16_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses of the original's bf16 log-softmax, which rounds every intermediate value to bf16."""
    with torch.autocast(logits.device.type, enabled=False):  # autocast on CUDA would compute exp and log in fp32
        logits = logits.bfloat16()
        shifted = logits - logits.amax(dim=-1, keepdim=True).detach()
        normaliser = shifted.exp().sum(dim=-1).log()
        return (normaliser - shifted.gather(-1, targets[..., None])[..., 0]).float()
