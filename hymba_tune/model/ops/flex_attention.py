"""Attention on a GPU by torch's FlexAttention: blocks of tokens that may not see each other are never computed.

Signature, shapes and semantics: reference.py. Which tokens a query sees depends on the documents and the window alone,
so a forward pass needs two block masks, one for the global layers and one for the windowed ones. They are kept as long
as the tensor that marks the documents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_Kind = tuple[int, int, int | None]

NARROWEST = 16
"""Features of a head that the compiled kernel needs at least."""

_block_masks = WeakTensorKeyDictionary()
"""cu_seqlens -> {(tokens, prefix tokens, window): its block mask}."""


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """FlexAttention; see reference.segment_attention."""
    tokens, prefix = len(q), 0
    if not tokens:
        return q.new_zeros(0, q.shape[1], v.shape[2])
    if prefix_k is not None and prefix_v is not None:
        prefix = len(prefix_k)
        k, v = torch.cat([prefix_k, k]), torch.cat([prefix_v, v])
    width, value_width = q.shape[-1], v.shape[-1]
    # The compiled kernel refuses narrow heads; zeros behind them change no product.
    q, k, v = (F.pad(t, (0, max(0, NARROWEST - t.shape[-1]))) for t in (q, k, v))
    heads_first = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
    mask = block_mask(cu_seqlens, tokens, prefix, window, q.device)
    grouped = q.shape[1] != k.shape[1]
    out: Tensor = _attend(q.device.type)(*heads_first, block_mask=mask, scale=width**-0.5, enable_gqa=grouped)
    return out[..., :value_width].squeeze(0).transpose(0, 1)


def block_mask(cu_seqlens: Tensor, tokens: int, prefix: int, window: int | None, device: torch.device) -> BlockMask:
    """The block mask of (tokens, prefix + tokens), made once for each tensor of document boundaries."""
    masks: dict[_Kind, BlockMask] = _block_masks.setdefault(cu_seqlens, {})
    kind = (tokens, prefix, window)
    if kind not in masks:
        visible = visible_tokens(cu_seqlens.to(device), tokens, prefix, window)
        compiled = device.type == "cuda"  # else the whole mask is laid out in memory
        masks[kind] = create_block_mask(visible, None, None, tokens, prefix + tokens, str(device), _compile=compiled)
    return masks[kind]


def visible_tokens(cu_seqlens: Tensor, tokens: int, prefix: int, window: int | None) -> Visible:
    """FlexAttention's mask function: may a query see a key? Keys before `prefix` are the prefix."""
    segment = torch.bucketize(torch.arange(tokens, device=cu_seqlens.device), cu_seqlens[1:], right=True)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        token = key - prefix
        same = segment[query] == segment[token.clamp(min=0)]
        seen = same & (token >= 0) & (token <= query)
        if window is not None:
            seen = seen & (query - token <= window)
        return (key < prefix) | seen

    return visible


@functools.cache
def _attend(device: str) -> Callable[..., Tensor]:
    """Compiled where that gives a kernel; elsewhere every product is computed and masked."""
    attend: Any = flex_attention
    # Not dynamic=False: packed rows have ever new lengths, and past eight recompilations nothing would be compiled.
    return torch.compile(attend) if device == "cuda" else attend
