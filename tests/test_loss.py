"""The loss equals Hugging Face's in fp32; targets are shifted within a sequence, and micro-batches weigh the same.

Chunks are small here, so that a loss and its gradient come from several chunks, the last one partly filled.
"""

import copy
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import gpt_neo, token_ids
from torch import Tensor
from torch.nn.attention import varlen
from transformers import GPTNeoForCausalLM

from clippy_train.config import TrainConfig
from clippy_train.data.batches import Batch
from clippy_train.model import attention, loss
from clippy_train.model.attention import hidden_states
from clippy_train.model.loss import mean_loss, token_losses
from clippy_train.train.module import CodeLM


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK, "cpu", 50)


BOTH = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@BOTH
def test_the_mean_is_hugging_faces_loss(attention: str) -> None:
    model, ids = gpt_neo(), token_ids(3, 57)
    expected = model(ids, labels=ids, use_cache=False).loss
    assert mean_loss(model, ids, attention).item() == pytest.approx(expected.item(), abs=2e-6)
    assert token_losses(model, ids, attention).mean().item() == pytest.approx(expected.item(), abs=2e-6)


@BOTH
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_gradient_is_that_of_hugging_faces_loss(attention: str, scale: float) -> None:
    model, ids = gpt_neo(), token_ids(3, 57)
    expected = gradients(model, scale * model(ids, labels=ids, use_cache=False).loss)
    for name, gradient in gradients(model, scale * mean_loss(model, ids, attention)).items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


@BOTH
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_the_error_is_no_larger_than_hugging_faces(attention: str, autocast: bool) -> None:
    """Both errors are taken against gradients in fp32."""
    model, ids = gpt_neo(), token_ids(3, 57)
    exact = gradients(model, model(ids, labels=ids, use_cache=False).loss)
    low = model if autocast else copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = gradients(low, low(ids, labels=ids, use_cache=False).loss)
        mean = mean_loss(low, ids, attention)
        ours = gradients(low, mean)
    assert mean.dtype == torch.float32
    assert all(ours[name].dtype == theirs[name].dtype for name in exact)
    mine, others = (torch.cat([(each[name] - exact[name]).flatten() for name in exact]) for each in (ours, theirs))
    assert mine.norm() <= 1.25 * others.norm()


def test_no_logits_outlive_their_chunk() -> None:
    """No tensor saved for backward grows with tokens x vocabulary."""
    model, ids, kept = gpt_neo(vocab_size=997), token_ids(3, 57), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mean_loss(model, ids, "sdpa")
    assert 997 * 32 <= max(kept) < 3 * 56 * 997


def test_a_padded_vocabulary_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = gpt_neo(), token_ids(3, 57)
    padded = mean_loss(model, ids, "sdpa")
    found = gradients(model, padded)
    monkeypatch.setattr(loss, "VOCAB_MULTIPLE", 1)
    plain = mean_loss(model, ids, "sdpa")
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(found, gradients(model, plain))


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
def test_sequences_do_not_affect_each_other(attention: str) -> None:
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
    assert (in_bf16 - in_fp32).abs().max() > 1e-3  # the error of a loss in bf16


@BOTH
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_a_bf16_loss_is_rounded_with_and_without_autocast_and_the_default_is_not(
    attention: str, autocast: bool
) -> None:
    model, ids = gpt_neo(), token_ids(3, 57)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded, default = token_losses(model, ids, attention, "bf16"), token_losses(model, ids, attention)
    assert rounded.dtype == default.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(default, default.bfloat16().float())
    assert (rounded - default).abs().max() < 0.1


def test_a_bf16_loss_has_gradients_near_those_of_fp32() -> None:
    model, ids = gpt_neo(), token_ids(3, 57)
    exact, rounded = (gradients(model, mean_loss(model, ids, "sdpa", kind)) for kind in ("fp32", "bf16"))
    for name, gradient in exact.items():
        torch.testing.assert_close(rounded[name], gradient, atol=0.05 * gradient.abs().max().item(), rtol=0)


@BOTH
def test_accumulated_micro_batches_give_the_gradient_of_the_full_batch(attention: str) -> None:
    model, ids = gpt_neo(), token_ids(8, 57)
    full = gradients(model, mean_loss(model, ids, attention))
    parts = [gradients(model, mean_loss(model, part, attention) / 4) for part in ids.split(2)]
    for name, gradient in full.items():
        accumulated = sum(part[name] for part in parts)
        assert (accumulated - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def gradients(model: GPTNeoForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.slow
def test_compiled_training_steps_are_the_same_and_compile_once(
    train_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as with `model.compile=true`, but without minutes of code generation."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = gpt_neo()
    plain, compiled = (
        CodeLM(train_config(f"model.compile={each}"), model, np.ones(97, dtype=np.int32)) for each in ("false", "true")
    )
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    counts = []
    for seed in range(4):
        batch = {"input_ids": token_ids(3, 57, seed=seed), "group": torch.ones(3, 57, dtype=torch.int64)}
        loss, expected = (module.training_step(batch, 0) for module in (compiled, plain))
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(gradients(model, loss), gradients(model, expected), atol=1e-6, rtol=1e-5)
        with torch.no_grad():
            for module in (compiled, plain):
                module.validation_step(batch, 0)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch.testing.assert_close(compiled.val_sums, plain.val_sums)
    assert counts == [2] * 4  # one graph for training and one for validation
    assert not torch._dynamo.utils.counters["graph_break"]


class Graphs:
    """A backend of `torch.compile` that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.made: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.made.append(graph)
        return graph.forward

    def targets(self) -> str:
        return " ".join(str(node.target) for graph in self.made for node in graph.graph.nodes)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention does not run on CPU: something differentiable of its arguments stands in for it."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *settings: int, **options: object) -> Tensor:
        return (q + k + v) / 3 + bounds.float().mean() / 1e3

    monkeypatch.setattr(varlen, "varlen_attn", attend)


def batches(eos: int) -> list[Batch]:
    """Eight batches, each with another number of documents."""
    found: list[Batch] = []
    for seed in range(8):
        ids = token_ids(3, 57, vocab_size=90, seed=seed)
        ids[0, torch.randperm(50)[: 2 * seed]] = eos
        found.append({"input_ids": ids, "group": torch.ones(3, 57, dtype=torch.int64)})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_eight_batches_with_other_documents_are_one_graph(
    train_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    flash: None,
    kernel: str,
    document_mask: bool,
) -> None:
    graphs = Graphs()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    config = train_config("model.compile=true", f"data.document_mask={document_mask}")
    config.model.attention = kernel  # varlen is refused without CUDA
    model = gpt_neo()
    model.config.eos_token_id = 96
    module = CodeLM(config, model, np.ones(97, dtype=np.int32))
    config.model.compile = False
    plain = CodeLM(config, model, np.ones(97, dtype=np.int32))
    for batch in batches(eos=96):
        expected = plain.training_step(batch, 0)
        loss = module.training_step(module.on_before_batch_transfer(batch, 0), 0)
        assert torch.equal(loss, expected)
        loss.backward()
    assert len(graphs.made) == 1
    assert "nonzero" not in graphs.targets()


@pytest.mark.slow
@torch.no_grad()
def test_flex_masks_are_made_outside_of_the_graph() -> None:
    graphs, model = Graphs(), gpt_neo()
    model.lm_head = loss.loss_head(model)  # as in training; made in the graph, a module would break it
    compiled = torch.compile(token_losses, backend=graphs, dynamic=False)
    for seed in range(8):
        ids = token_ids(3, 57, seed=seed)
        masks = attention.attention_masks(ids, "flex", model.config.window_size)
        found = compiled(model, ids, "flex", "fp32", masks)
        torch.testing.assert_close(found, token_losses(model, ids, "sdpa"), atol=1e-5, rtol=0)
    assert len(graphs.made) == 1
    assert "flex_attention" in graphs.targets()
    assert not [name for name in ("vmap", "argsort", "create_block_mask") if name in graphs.targets()]
