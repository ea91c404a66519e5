"""GPT-Neo's forward pass with fast causal attention, global and local.

Hugging Face's GPT-Neo computes full S x S scores in fp32 in every layer, and its FlashAttention-2 path ignores the
local window. Here a global layer is one fused causal call, and a local layer costs S x window. Scale is 1.0: GPT-Neo
does not divide by sqrt(head_dim). Only the forward pass of training and evaluation uses this module, so the state dict
and generation are unchanged.

    sdpa     any device. Global: torch's fused kernel; local: a block of queries against its own and the previous block
    varlen   CUDA in bf16: FlashAttention with a window, through torch.nn.attention.varlen
    flex     CUDA: FlexAttention with a block mask

What depends on the batch (`Masks`) is made before a compiled graph starts, not in it: FlexAttention's masks would be
rebuilt in every step, and every number of documents would need another graph.

Attention dropout, which no published GPT-Neo has, always uses sdpa. varlen and flex have not been run on CUDA yet: on
CPU, tests check the arguments that varlen passes to its kernel, the values of uncompiled flex, and, on
fake CUDA tensors, devices and dtypes.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoBlock, GPTNeoMLP, GPTNeoModel, GPTNeoSelfAttention

from clippy_train.errors import ConfigError

SHORT_DOCUMENT = 64  # tokens, see `padded_spans`

AMPERE = (8, 0)  # the first compute capability with FlashAttention
KERNEL_HEADS = {"varlen": (8, 8, 256), "flex": (16, 1, 256)}  # head sizes: smallest, multiple of, largest


class Masks(NamedTuple):
    """What limits attention besides causality; made by `attention_masks`.

    Attributes:
        documents: `[batch, seq]` int64, the document of each token; None: attention crosses documents.
        bounds: for varlen, `[spans + 1]` int32, see `attention_bounds`.
        causal, windowed: for flex, the masks of global and local layers.
    """

    documents: Tensor | None = None
    bounds: Tensor | None = None
    causal: flex.BlockMask | None = None
    windowed: flex.BlockMask | None = None


def attention_masks(
    input_ids: Tensor, kernel: str, window_size: int, eos: int | None = None, bounds: Tensor | None = None
) -> Masks:
    """The masks of a batch for a kernel.

    Args:
        input_ids: `[batch, seq]` int64.
        eos: the end-of-text token; if given, attention stays within each document.
        bounds: `attention_bounds(input_ids, eos)` if the caller already has them.
    """
    documents = None if eos is None else document_numbers(input_ids, eos)
    if kernel == "varlen":
        return Masks(documents, bounds=attention_bounds(input_ids, eos) if bounds is None else bounds)
    if kernel == "flex":
        seq, device = input_ids.shape[1], input_ids.device
        causal, windowed = (block_mask(seq, min(window, seq), device) for window in (seq, window_size))
        return Masks(documents, causal=causal, windowed=windowed)
    return Masks(documents)


def require_supported(kernel: str, head_dim: int, capability: tuple[int, int]) -> None:
    """Require a GPU and a head size that a kernel can compute.

    Args:
        capability: the GPU's compute capability, `torch.cuda.get_device_capability()`.

    Raises:
        ConfigError: the kernel would fail in the first forward pass.
    """
    if kernel not in KERNEL_HEADS:
        return
    major, minor = capability
    if capability < AMPERE:
        raise ConfigError(
            f"model.attention={kernel} needs a GPU of compute capability 8.0 (Ampere) or newer, but this one has "
            f"{major}.{minor}: set model.attention=sdpa"
        )
    smallest, multiple, largest = KERNEL_HEADS[kernel]
    if not smallest <= head_dim <= largest or head_dim % multiple:
        raise ConfigError(
            f"model.attention={kernel} takes heads of {smallest} to {largest} values in multiples of {multiple}, but "
            f"model.hidden_size / model.num_heads is {head_dim}: set model.attention=sdpa"
        )


def hidden_states(
    transformer: GPTNeoModel, input_ids: Tensor, kernel: str = "sdpa", masks: Masks | None = None
) -> Tensor:
    """GPT-Neo's last hidden states for full, unpadded sequences.

    Blocks whose `gradient_checkpointing` is set (`gradient_checkpointing_enable`) are recomputed in the backward pass.

    Args:
        transformer: its activation must be `gelu_new`, as in every published GPT-Neo.
        input_ids: `[batch, seq]` int64.
        kernel: `sdpa`, `varlen` or `flex`.
        masks: of `attention_masks`; by default attention crosses documents. Positions count from the start of the
            sequence in any case.

    Returns:
        `[batch, seq, hidden]`; unless documents are masked, equal to `transformer(input_ids).last_hidden_state` up to
        rounding.
    """
    if masks is None:
        masks = attention_masks(input_ids, kernel, transformer.config.window_size)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    x: Tensor = transformer.drop(transformer.wte(input_ids) + transformer.wpe(positions))
    for block in cast("Iterable[GPTNeoBlock]", transformer.h):
        if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
            x = cast(Tensor, checkpoint(block_output, block, x, kernel, masks, use_reentrant=False))
        else:
            x = block_output(block, x, kernel, masks)
    return cast(Tensor, transformer.ln_f(x))


def block_output(block: GPTNeoBlock, x: Tensor, kernel: str, masks: Masks) -> Tensor:
    """One transformer block, `[batch, seq, hidden]` to the same shape."""
    x = x + self_attention(block.attn.attention, block.ln_1(x), kernel, masks)
    return x + feed_forward(block.mlp, block.ln_2(x))


def document_numbers(input_ids: Tensor, eos: int) -> Tensor:
    """Number the documents of each sequence from 0, `[batch, seq]`; an `eos` belongs to the document that it ends."""
    ended = (input_ids == eos).long()
    return ended.cumsum(dim=1) - ended


def attention_bounds(input_ids: Tensor, eos: int | None = None) -> Tensor:
    """Offsets into the flattened batch between which attention is confined, `[spans + 1]` int32.

    A span is a sequence or, with `eos`, one document in it. Documents are followed by empty spans at the end of the
    batch, up to a number that rarely differs between batches (see `padded_spans`). On CUDA, counting documents makes
    the host wait for the GPU.
    """
    size, seq = input_ids.numel(), input_ids.shape[1]
    if eos is None:
        return torch.arange(0, size + 1, seq, dtype=torch.int32, device=input_ids.device)
    ends = F.pad(input_ids[:, :-1] == eos, (1, 0), value=True)  # before a token: the first of a document
    starts = ends.flatten().nonzero()[:, 0]
    return F.pad(starts, (0, padded_spans(len(starts), *input_ids.shape) + 1 - len(starts)), value=size).int()


def padded_spans(documents: int, batch: int, seq: int) -> int:
    """How many spans to make for this many documents: enough for `SHORT_DOCUMENT` tokens each, doubled until they do.

    The kernel starts a block of threads for every span and `seq`, empty or not, so one span per token would cost
    milliseconds in each layer. There are few such numbers: a compiled graph is built for each.
    """
    spans = batch * min(seq, max(16, seq // SHORT_DOCUMENT))
    while spans < documents:
        spans *= 2
    return spans


def feed_forward(layer: GPTNeoMLP, x: Tensor) -> Tensor:
    """The MLP with its activation in one kernel; Hugging Face's is a chain of elementwise operations."""
    return cast(Tensor, layer.dropout(layer.c_proj(F.gelu(layer.c_fc(x), approximate="tanh"))))


def self_attention(layer: GPTNeoSelfAttention, x: Tensor, kernel: str, masks: Masks) -> Tensor:
    """One attention layer, `[batch, seq, hidden]` to the same shape."""
    batch, seq, hidden = x.shape
    q, k, v = (
        proj(x).view(batch, seq, layer.num_heads, layer.head_dim).transpose(1, 2)
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    local = layer.attention_type == "local" and seq > layer.config.window_size
    window = layer.config.window_size if local else None
    dropout = layer.attn_dropout.p if layer.training else 0.0
    if dropout:
        kernel = "sdpa"
    mask = masks.windowed if window else masks.causal
    if kernel == "flex" and mask is not None:
        out = flex_attention(q, k, v, mask)
    elif kernel == "varlen" and masks.bounds is not None and (window or masks.documents is not None):
        out = varlen_attention(q, k, v, window, masks.bounds)
    elif window:
        out = local_attention(q, k, v, window, dropout, masks.documents)
    else:
        out = global_attention(q, k, v, dropout, masks.documents)
    out = out.transpose(1, 2).reshape(batch, seq, hidden)
    return cast(Tensor, layer.resid_dropout(layer.out_proj(out)))


# The kernels map queries, keys and values `[batch, heads, seq, head_dim]` to the same shape. A `window` of None is
# global attention.


def global_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, documents: Tensor | None = None) -> Tensor:
    """Causal attention: every token attends to itself and to all tokens before it in its document."""
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, dropout_p=dropout)
    mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, dropout_p=dropout)


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float = 0.0, documents: Tensor | None = None
) -> Tensor:
    """Windowed attention: every token attends to itself and to the `window - 1` tokens before it in its document."""
    batch, heads, seq, dim = q.shape
    num_blocks = -(-seq // window)
    padding = num_blocks * window - seq
    q, k, v = (F.pad(each, (0, 0, 0, padding)).view(batch, heads, num_blocks, window, dim) for each in (q, k, v))
    k, v = (torch.cat((F.pad(each[:, :, :-1], (0, 0, 0, 0, 1, 0)), each), dim=3) for each in (k, v))
    # k, v: [batch, heads, block, 2 * window, head_dim]: the previous block's keys, then the block's own
    query = torch.arange(window, device=q.device)[:, None] + window
    keys = torch.arange(2 * window, device=q.device)[None, :]
    band = (keys <= query) & (keys > query - window)
    exists = (torch.arange(num_blocks, device=q.device) > 0)[:, None, None] | (keys >= window)[None]
    mask = (band[None] & exists)[None]  # [1, block, query, key]: block 0 has no previous block
    if documents is not None:
        own = F.pad(documents, (0, padding)).view(batch, num_blocks, window)
        both = torch.cat((F.pad(own[:, :-1], (0, 0, 1, 0)), own), dim=2)
        mask = (mask & (own[..., None] == both[:, :, None])).repeat_interleave(heads, dim=0)
    q, k, v = (each.reshape(batch * heads, num_blocks, -1, dim) for each in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, dropout_p=dropout)
    return out.reshape(batch, heads, num_blocks * window, dim)[:, :, :seq]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, bounds: Tensor) -> Tensor:
    """FlashAttention over the flattened batch, confined to the spans between `bounds`."""
    batch, _, seq, _ = q.shape
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (q, k, v))
    left = window - 1 if window else -1  # FlashAttention's window excludes the query itself
    out = cast(Tensor, varlen.varlen_attn(q, k, v, bounds, bounds, seq, seq, scale=1.0, window_size=(left, 0)))
    return cast(Tensor, out.unflatten(0, (batch, seq))).transpose(1, 2)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: flex.BlockMask) -> Tensor:
    """FlexAttention with a causal, perhaps windowed block mask."""
    call: Callable[..., object] = flex.flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        call = compiled_flex()
    return cast(Tensor, call(q, k, v, block_mask=mask, scale=1.0))


@lru_cache
def block_mask(seq: int, window: int, device: torch.device) -> flex.BlockMask:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    return flex.create_block_mask(visible, None, None, seq, seq, device=device)


@lru_cache
def compiled_flex() -> Callable[..., object]:
    """FlexAttention, compiled: uncompiled it is not a fused kernel and computes S x S scores."""
    return torch.compile(flex.flex_attention)
