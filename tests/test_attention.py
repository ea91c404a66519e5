"""Our attention equals Hugging Face's eager attention, in value and gradient, for every length around the window.

FlashAttention needs CUDA: here a stand-in computes what its documentation specifies for the arguments we pass.
FlexAttention has no backward on CPU, so only its values are compared.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.models import gpt_neo, token_ids
from torch import Tensor
from torch.nn.attention import varlen
from transformers import GPTNeoForCausalLM
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoBlock

from clippy_train.config import TrainConfig
from clippy_train.errors import ConfigError
from clippy_train.model.attention import (
    attention_bounds,
    attention_masks,
    hidden_states,
    local_attention,
    padded_spans,
    require_supported,
)
from clippy_train.train.module import CodeLM

LOGITS = 1e-5  # largest absolute difference allowed in fp32
GRADIENT = 1e-5  # the same, as a share of the gradient's largest entry

KINDS = [("global", "global"), ("local", "local"), ("global", "local")]
LENGTHS = [(256, seq) for seq in (1, 255, 256, 257, 300, 1024)] + [(16, seq) for seq in (2, 15, 16, 17, 31, 32, 33, 57)]


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", flash_attention)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` of `[tokens, heads, head_dim]` in plain torch, one sequence at a time."""
    left, right = window_size
    assert right == 0
    assert bounds.dtype == torch.int32
    assert longest == longest_key >= (bounds[1:] - bounds[:-1]).max()
    out = torch.empty_like(q)
    for first, end in zip(bounds.tolist(), key_bounds.tolist()[1:], strict=False):
        position = torch.arange(end - first)
        before = position[:, None] - position
        mask = (before >= 0) & ((before <= left) | (left < 0))
        scores = scale * torch.einsum("qhd,khd->hqk", q[first:end], k[first:end])
        out[first:end] = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v[first:end])
    return out


def logits(model: GPTNeoForCausalLM, ids: Tensor, kernel: str = "sdpa", eos: int | None = None) -> Tensor:
    masks = attention_masks(ids, kernel, model.config.window_size, eos)
    found: Tensor = model.lm_head(hidden_states(model.transformer, ids, kernel, masks))
    return found


def gradients(model: GPTNeoForCausalLM, scores: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the logits, so that every position counts."""
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad((scores * weights).sum(), list(parameters.values())), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "seq", "kinds"),
    [
        *((*length, kinds) for length in LENGTHS for kinds in KINDS),
        pytest.param(256, 2048, ("global", "local"), marks=pytest.mark.slow),
    ],
)
def test_logits_and_gradients_are_those_of_hugging_face(kinds: tuple[str, ...], window: int, seq: int) -> None:
    model = gpt_neo(kinds, window=window, positions=max(seq, 64))
    ids = token_ids(2, seq)
    ours, theirs = logits(model, ids), model(ids, use_cache=False).logits
    assert (ours - theirs).abs().max() <= LOGITS

    expected = gradients(model, theirs)
    largest = {name: gradient.abs().max().item() for name, gradient in expected.items()}
    for name, gradient in gradients(model, ours).items():  # of a single token, query and key gradients are exactly 0
        assert (gradient - expected[name]).abs().max() <= GRADIENT * (largest[name] or max(largest.values())), name


@pytest.mark.slow
@pytest.mark.parametrize("seq", [1, 16, 17, 57])
@torch.no_grad()
def test_flex_attention_has_the_values_of_hugging_face(seq: int) -> None:
    model, ids = gpt_neo(("global", "local"), window=16), token_ids(2, seq)
    torch.testing.assert_close(logits(model, ids, "flex"), model(ids, use_cache=False).logits, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("seq", [1, 16, 17, 57])
def test_flash_attention_with_our_arguments_computes_hugging_faces_logits(flash: None, seq: int) -> None:
    model, ids = gpt_neo(("global", "local"), window=16), token_ids(2, seq)
    torch.testing.assert_close(logits(model, ids, "varlen"), model(ids, use_cache=False).logits, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_with_a_document_mask_attention_stays_within_a_document(flash: None, kernel: str) -> None:
    """Compared with Hugging Face's eager attention under a mask that is written out here."""
    model, eos = gpt_neo(("global", "local"), window=16), 3
    ids = token_ids(4, 57, vocab_size=8)  # documents of about 8 tokens, of single tokens, and longer than the window
    ids[0, 10:40], ids[1] = 5, 4
    document = [[(row[:i] == eos).sum().item() for i in range(57)] for row in ids]
    same = torch.tensor([[[a == b for b in row] for a in row] for row in document]).tril()
    bias = torch.zeros(same.shape).masked_fill(~same, torch.finfo(torch.float32).min)[:, None]
    expected = model(ids, attention_mask=bias, use_cache=False).logits
    ours = logits(model, ids, kernel, eos)
    assert (ours - expected).abs().max() <= LOGITS
    assert (ours - logits(model, ids, kernel)).abs().max() > 0.1
    theirs = gradients(model, expected)
    for name, gradient in gradients(model, ours).items():
        assert (gradient - theirs[name]).abs().max() <= GRADIENT * theirs[name].abs().max(), name


def test_bounds_are_the_starts_of_documents_then_empty_spans_at_the_end() -> None:
    ids = torch.tensor([[5, 3, 5, 5, 3, 5], [3, 3, 5, 5, 5, 3]])
    found = attention_bounds(ids, eos=3)
    assert found.dtype == torch.int32
    assert found.tolist() == [0, 2, 5, 6, 7, 8] + 7 * [12]
    assert attention_bounds(ids).tolist() == [0, 6, 12]


def test_bounds_have_few_lengths_and_always_enough_room() -> None:
    """Each length is one more compiled graph; torch gives up after 8."""
    spans = [padded_spans(documents, 16, 2048) for documents in range(16, 16 * 2048 + 1)]
    assert all(found >= documents for documents, found in enumerate(spans, 16))
    assert sorted(set(spans)) == [512 * 2**i for i in range(7)]
    every_token_ends_one = attention_bounds(torch.full((2, 57), 3), eos=3)
    assert every_token_ends_one[:115].tolist() == list(range(115))


@pytest.mark.parametrize("position", [0, 1, 15, 16, 17, 31, 32, 50, 56])
def test_a_local_layer_sees_exactly_its_window(position: int) -> None:
    assert changed_by(gpt_neo(("local",), window=16), position) == list(range(position, min(position + 16, 57)))


@pytest.mark.parametrize("position", [0, 16, 56])
def test_a_global_layer_sees_everything_before(position: int) -> None:
    assert changed_by(gpt_neo(("global",), window=16), position) == list(range(position, 57))


@torch.no_grad()
def changed_by(model: GPTNeoForCausalLM, position: int) -> list[int]:
    """Positions of a 57-token sequence whose hidden state changes in any bit when the token at `position` changes."""
    ids = token_ids(1, 57)
    other = ids.clone()
    other[0, position] = (other[0, position] + 1) % 97
    different = hidden_states(model.transformer, ids) != hidden_states(model.transformer, other)
    return different[0].any(dim=-1).nonzero().flatten().tolist()


@pytest.mark.parametrize("seq", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("window", [1, 2, 3, 64])
def test_local_attention_is_a_softmax_over_the_window(window: int, seq: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, seq, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = torch.stack(
        [
            torch.softmax(q[:, :, i, None] @ k[:, :, first : i + 1].mT, dim=-1) @ v[:, :, first : i + 1]
            for i in range(seq)
            for first in [max(0, i - window + 1)]
        ]
    )[..., 0, :].permute(1, 2, 0, 3)
    torch.testing.assert_close(local_attention(q, k, v, window), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("seq", [16, 57])
@torch.no_grad()
def test_in_bf16_the_error_is_no_larger_than_hugging_faces(seq: int) -> None:
    model, ids = gpt_neo(("global", "local"), window=16), token_ids(2, seq)
    exact = model(ids, use_cache=False).logits
    low = copy.deepcopy(model).bfloat16()
    ours, theirs = logits(low, ids), low(ids, use_cache=False).logits
    assert ours.dtype == torch.bfloat16
    assert rms(ours - exact) <= 1.25 * rms(theirs - exact)


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    model, ids = gpt_neo(("global", "local"), window=16), token_ids(1, 57)
    for block in model.transformer.h:
        assert isinstance(block, GPTNeoBlock)
        block.attn.attention.attn_dropout.p = 0.5
    expected = model.eval()(ids, use_cache=False).logits
    torch.testing.assert_close(logits(model, ids), expected, atol=LOGITS, rtol=0)
    assert (logits(model.train(), ids) - expected).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attention=flex"], r"model\.attention=flex runs on CUDA only"),
        (["model.attention=varlen"], r"model\.attention=varlen runs on CUDA only"),
        (["trainer.accelerator=cuda", "trainer.precision=fp32", "model.attention=varlen"], r"in bf16 only"),
        (["data.document_mask=true", "model.attention=eager"], r"model\.attention=eager has no mask for documents"),
        (["data.document_mask=true", "data.eos_between_documents=false"], r"set data\.eos_between_documents=true"),
        (["model.compile=true", "strategy=zero3"], r"choose strategy=zero2, zero1 or ddp"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_before_anything_starts(
    train_config: Callable[..., TrainConfig], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_config(*overrides)


@pytest.mark.parametrize(
    ("kernel", "head_dim", "capability", "message"),
    [
        ("varlen", 64, (7, 5), r"model\.attention=varlen needs .* 8\.0 .* has 7\.5: set model\.attention=sdpa"),
        ("flex", 64, (7, 0), r"model\.attention=flex needs .* 8\.0 .* has 7\.0: set model\.attention=sdpa"),
        ("varlen", 60, (9, 0), r"multiples of 8, but .* is 60: set model\.attention=sdpa"),
        ("varlen", 264, (9, 0), r"heads of 8 to 256 .* is 264: set model\.attention=sdpa"),
        ("flex", 8, (9, 0), r"heads of 16 to 256 .* is 8: set model\.attention=sdpa"),
    ],
)
def test_a_gpu_or_head_size_that_a_kernel_cannot_use_is_refused(
    kernel: str, head_dim: int, capability: tuple[int, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        require_supported(kernel, head_dim, capability)


@pytest.mark.parametrize(
    ("kernel", "head_dim", "capability"),
    [
        ("varlen", 64, (8, 0)),
        ("varlen", 128, (9, 0)),
        ("varlen", 256, (10, 0)),
        ("flex", 60, (8, 6)),
        ("sdpa", 7, (6, 1)),
        ("eager", 7, (6, 1)),
    ],
)
def test_what_a_kernel_can_use_is_accepted(kernel: str, head_dim: int, capability: tuple[int, int]) -> None:
    require_supported(kernel, head_dim, capability)


def test_a_rank_checks_its_gpu_before_it_trains(
    train_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config("trainer.accelerator=cuda", "trainer.precision=bf16", "model.attention=varlen")
    module = CodeLM(config, gpt_neo(), np.ones(97, dtype=np.int32))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda:1")))
    monkeypatch.setattr(CodeLM, "trainer", trainer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {"cuda:1": (7, 0)}[str(device)])
    with pytest.raises(ConfigError, match=r"has 7\.0"):
        module.setup("fit")
    trainer.strategy.root_device = torch.device("cpu")
    module.setup("fit")


@pytest.mark.parametrize(
    ("accelerator", "precision", "kernel"),
    [("cpu", "bf16", "sdpa"), ("cuda", "fp32", "sdpa"), ("cuda", "bf16", "varlen")],
)
def test_auto_chooses_by_device_and_precision(
    train_config: Callable[..., TrainConfig], accelerator: str, precision: str, kernel: str
) -> None:
    config = train_config(f"trainer.accelerator={accelerator}", f"trainer.precision={precision}")
    assert config.attention == kernel
