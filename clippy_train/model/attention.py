"""GPT-Neo's causal attention through `scaled_dot_product_attention`, global and local.

Hugging Face's GPT-Neo computes full S x S scores in fp32 in every layer (and its FlashAttention-2 path ignores the
local window). Here a global layer is one causal call, and a local layer scores each block of queries against its own
and the previous block of keys only: exact, and linear in S. Scale is 1.0: GPT-Neo does not divide by sqrt(head_dim).
State dict and generation are untouched, since only the forward pass of training and evaluation goes through here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def hidden_states(transformer: Any, input_ids: Tensor) -> Tensor:
    """GPT-Neo's last hidden states for full, unpadded rows.

    Args:
        transformer: a `GPTNeoModel`.
        input_ids: `[batch, seq]` int64.

    Returns:
        `[batch, seq, hidden]`, equal to `transformer(input_ids).last_hidden_state` up to rounding.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    x = transformer.drop(transformer.wte(input_ids) + transformer.wpe(positions))
    for block in transformer.h:
        x = x + self_attention(block.attn.attention, block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
    return transformer.ln_f(x)


def self_attention(layer: Any, x: Tensor) -> Tensor:
    """One attention layer, `[batch, seq, hidden]` to the same; `layer` is a `GPTNeoSelfAttention`."""
    batch, seq, hidden = x.shape
    q, k, v = (
        proj(x).view(batch, seq, layer.num_heads, layer.head_dim).transpose(1, 2)
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    dropout = layer.attn_dropout.p if layer.training else 0.0
    if layer.attention_type == "local" and seq > layer.config.window_size:
        out = local_attention(q, k, v, layer.config.window_size, dropout)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, dropout_p=dropout)
    out = out.transpose(1, 2).reshape(batch, seq, hidden)
    return layer.resid_dropout(layer.out_proj(out))


def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float = 0.0) -> Tensor:
    """Attention of every token to itself and the `window - 1` tokens before it, `[batch, heads, seq, head_dim]`."""
    batch, heads, seq, dim = q.shape
    num_blocks = -(-seq // window)
    padding = num_blocks * window - seq
    q, k, v = (F.pad(each, (0, 0, 0, padding)).view(batch, heads, num_blocks, window, dim) for each in (q, k, v))
    k, v = (torch.cat((F.pad(each[:, :, :-1], (0, 0, 0, 0, 1, 0)), each), dim=3) for each in (k, v))
    # now k, v: [batch, heads, block, 2 * window, head_dim], the previous block's keys before the own ones
    query = torch.arange(window, device=q.device)[:, None] + window
    keys = torch.arange(2 * window, device=q.device)[None, :]
    band = (keys <= query) & (keys > query - window)
    exists = (torch.arange(num_blocks, device=q.device) > 0)[:, None, None] | (keys >= window)[None]
    mask = (band[None] & exists)[None]  # [1, block, query, key]: block 0 has no previous block
    q, k, v = (each.reshape(batch * heads, num_blocks, -1, dim) for each in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, dropout_p=dropout)
    return out.reshape(batch, heads, num_blocks * window, dim)[:, :, :seq]
