"""The loss is Hugging Face's, in fp32, with the shift inside a row and each micro-batch weighing the same."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import gpt_neo, token_ids
from torch import Tensor

from clippy_train.model.attention import hidden_states
from clippy_train.model.loss import token_losses

BOTH = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@BOTH
def test_the_mean_is_hugging_faces_own_loss(attention: str) -> None:
    model, ids = gpt_neo(), token_ids(3, 57)
    expected = model(ids, labels=ids, use_cache=False).loss
    assert token_losses(model, ids, attention).mean().item() == pytest.approx(expected.item(), abs=2e-6)


@BOTH
def test_a_token_is_scored_by_the_logits_of_the_token_before(attention: str) -> None:
    model, ids = gpt_neo(), token_ids(3, 57)
    scores = model(ids, use_cache=False).logits.double().log_softmax(dim=-1)
    expected = [[-scores[row, i - 1, ids[row, i]].item() for i in range(1, 57)] for row in range(3)]
    torch.testing.assert_close(
        token_losses(model, ids, attention).double(), torch.tensor(expected).double(), atol=1e-5, rtol=0
    )


@BOTH
def test_the_first_token_of_a_row_is_never_a_target(attention: str) -> None:
    model = gpt_neo()
    with torch.no_grad():  # a model that knows nothing: each of the 56 targets of 57 tokens costs log(97)
        model.lm_head.weight.zero_()
    losses = token_losses(model, token_ids(3, 57), attention)
    torch.testing.assert_close(losses, torch.full((3, 56), 97.0).log())


@BOTH
def test_rows_do_not_touch_each_other(attention: str) -> None:
    model, ids = gpt_neo(), token_ids(3, 57)
    alone = torch.cat([token_losses(model, row[None], attention) for row in ids])
    torch.testing.assert_close(token_losses(model, ids, attention), alone, atol=1e-5, rtol=0)


@BOTH
@torch.no_grad()
def test_a_bf16_model_has_an_fp32_loss(attention: str) -> None:
    model, ids = gpt_neo().bfloat16(), token_ids(3, 57)
    losses = token_losses(model, ids, attention)
    assert losses.dtype == torch.float32
    eager = attention == "eager"
    hidden = model.transformer(ids).last_hidden_state if eager else hidden_states(model.transformer, ids)
    logits = model.lm_head(hidden[:, :-1])
    in_fp32, in_bf16 = (F.cross_entropy(each.mT, ids[:, 1:], reduction="none") for each in (logits.float(), logits))
    assert (losses - in_fp32).abs().max() <= 1e-6
    assert (in_bf16 - in_fp32).abs().max() > 1e-3  # what a loss in bf16 would lose


@BOTH
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_a_bf16_loss_is_rounded_also_under_autocast_and_the_default_is_not(attention: str, autocast: bool) -> None:
    model, ids = gpt_neo(), token_ids(3, 57)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded, default = token_losses(model, ids, attention, "bf16"), token_losses(model, ids, attention)
    assert rounded.dtype == default.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(default, default.bfloat16().float())
    assert (rounded - default).abs().max() < 0.1


def test_a_bf16_loss_has_gradients_near_those_of_fp32() -> None:
    model, ids = gpt_neo(), token_ids(3, 57)
    exact, rounded = (gradients(model, token_losses(model, ids, "sdpa", kind).mean()) for kind in ("fp32", "bf16"))
    for name, gradient in exact.items():
        torch.testing.assert_close(rounded[name], gradient, atol=0.05 * gradient.abs().max().item(), rtol=0)


def test_targets_are_never_one_hot() -> None:
    """The original held one-hot rows of the vocabulary beside the log-softmax; nothing of that size is held twice."""
    model, ids, kept = gpt_neo(), token_ids(3, 57), set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == 3 * 56 * 97:
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_losses(model, ids, "sdpa").mean()
    assert len(kept) <= 1


@BOTH
def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(attention: str) -> None:
    model, ids = gpt_neo(), token_ids(8, 57)
    whole = gradients(model, token_losses(model, ids, attention).mean())
    parts = [gradients(model, token_losses(model, part, attention).mean() / 4) for part in ids.split(2)]
    for name, gradient in whole.items():
        accumulated = sum(part[name] for part in parts)
        assert (accumulated - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
