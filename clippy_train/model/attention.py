"""GPT-Neo's forward pass with fast causal attention, global and local.

Hugging Face's GPT-Neo computes full S x S scores in fp32 in every layer, and its FlashAttention-2 path ignores the
local window. Here a global layer is one fused causal call, and a local layer costs S x window. Scale is 1.0: GPT-Neo
does not divide by sqrt(head_dim). Only the forward pass of training and evaluation uses this module, so the state dict
and generation are unchanged.

    sdpa     any device. Global: torch's fused kernel; local: a block of queries against its own and the previous block
    varlen   CUDA in bf16: FlashAttention with a window, through torch.nn.attention.varlen
    flex     CUDA: FlexAttention with a block mask

Attention dropout, which no published GPT-Neo has, always uses sdpa. varlen and flex have not been run on CUDA yet: on
CPU, tests check the arguments that varlen passes to its kernel, and the values of uncompiled flex.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention import varlen
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoBlock, GPTNeoMLP, GPTNeoModel, GPTNeoSelfAttention


def hidden_states(transformer: GPTNeoModel, input_ids: Tensor, kernel: str = "sdpa", eos: int | None = None) -> Tensor:
    """GPT-Neo's last hidden states for full, unpadded sequences.

    Args:
        transformer: its activation must be `gelu_new`, as in every published GPT-Neo.
        input_ids: `[batch, seq]` int64.
        kernel: `sdpa`, `varlen` or `flex`.
        eos: the end-of-text token; if given, attention stays within each document. Positions still count from the
            start of the sequence.

    Returns:
        `[batch, seq, hidden]`; without `eos` equal to `transformer(input_ids).last_hidden_state` up to rounding.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    documents = None if eos is None else document_numbers(input_ids, eos)
    bounds = attention_bounds(input_ids, documents) if kernel == "varlen" else None
    x: Tensor = transformer.drop(transformer.wte(input_ids) + transformer.wpe(positions))
    for block in cast("Iterable[GPTNeoBlock]", transformer.h):
        x = x + self_attention(block.attn.attention, block.ln_1(x), kernel, documents, bounds)
        x = x + feed_forward(block.mlp, block.ln_2(x))
    return cast(Tensor, transformer.ln_f(x))


def document_numbers(input_ids: Tensor, eos: int) -> Tensor:
    """Number the documents of each sequence from 0, `[batch, seq]`; an `eos` belongs to the document that it ends."""
    ended = (input_ids == eos).long()
    return ended.cumsum(dim=1) - ended


def attention_bounds(input_ids: Tensor, documents: Tensor | None) -> Tensor:
    """Offsets into the flattened batch between which attention is confined, `[spans + 1]` int32.

    A span is a sequence or, with `documents`, one document in it; counting documents makes the host wait for the GPU.
    """
    size, seq = input_ids.numel(), input_ids.shape[1]
    if documents is None:
        return torch.arange(0, size + 1, seq, dtype=torch.int32, device=input_ids.device)
    first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return F.pad(first.flatten().nonzero()[:, 0], (0, 1), value=size).int()


def feed_forward(layer: GPTNeoMLP, x: Tensor) -> Tensor:
    """The MLP with its activation in one kernel; Hugging Face's is a chain of elementwise operations."""
    return cast(Tensor, layer.dropout(layer.c_proj(F.gelu(layer.c_fc(x), approximate="tanh"))))


def self_attention(
    layer: GPTNeoSelfAttention,
    x: Tensor,
    kernel: str = "sdpa",
    documents: Tensor | None = None,
    bounds: Tensor | None = None,
) -> Tensor:
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
    if kernel == "flex":
        out = flex_attention(q, k, v, window)
    elif kernel == "varlen" and (window or documents is not None):
        assert bounds is not None
        out = varlen_attention(q, k, v, window, bounds)
    elif window:
        out = local_attention(q, k, v, window, dropout, documents)
    else:
        out = global_attention(q, k, v, dropout, documents)
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


def flex_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """FlexAttention with a causal, windowed block mask."""
    mask = block_mask(q.shape[2], window or q.shape[2], q.device)
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
