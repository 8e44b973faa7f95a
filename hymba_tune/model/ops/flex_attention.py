"""Attention on a GPU by torch's FlexAttention: blocks of tokens that may not see each other are never computed.

Signature, shapes and semantics: reference.py. Besides the prefix a query sees one range of keys, from the first that
its document and its window leave it to its own. Neither end of that range ever decreases along the stream, so the
ranges at the borders of two blocks say whether their tokens see each other, and no mask of tokens by tokens is laid
out. Which blocks those are depends on the documents and the window alone: a forward pass derives it twice, for the
global layers and for the windowed ones.

Documents, window, prefix and lengths reach the compiled function as values of tensors and as dimensions that it takes
as varying. So one kernel serves all layers and rows of any length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hymba_tune.model.ops import reference, segments

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

NARROWEST = 16
"""Features of a head that the compiled kernel needs at least."""

BLOCK = 128
"""Queries and keys of a block."""

DENSE = 256
"""Tokens of a stream that is as well computed densely: the meta tokens, a short question."""

KERNELS = 64
"""Compiled at most: one for each geometry of heads and dtype, with gradients and without. torch's limit is 8."""


class Seen(NamedTuple):
    """What T queries see of P prefix keys and T others, key 0 being the prefix's first; int32.

    R blocks of queries, C blocks of keys. A pair of blocks is partial where some of its pairs of tokens see each other,
    full where all do. Counts and indices as BlockMask has them, for queries' blocks and the other way round.
    """

    first: Tensor
    """(T,) the first key behind the prefix that a query sees."""
    own: Tensor
    """(T,) the query's own key, the last that it sees: P + query."""
    kv_num_blocks: Tensor
    """(1, 1, R) partial blocks of keys; likewise below."""
    kv_indices: Tensor
    """(1, 1, R, C)"""
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    """(1, 1, C) partial blocks of queries."""
    q_indices: Tensor
    """(1, 1, C, R)"""
    full_q_num_blocks: Tensor
    full_q_indices: Tensor

    def block_mask(self, queries: int, keys: int) -> BlockMask:
        blocks = self._asdict()
        visible = visible_keys(blocks.pop("first"), blocks.pop("own"))
        return BlockMask(seq_lengths=(queries, keys), **blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """FlexAttention, short streams densely; see reference.segment_attention."""
    ends = segments.boundaries(cu_seqlens, q.device)
    if len(q) <= DENSE:
        with torch.autocast(q.device.type, enabled=False):
            return reference.segment_attention(q, k, v, ends, prefix_k, prefix_v, window)
    prefix = 0
    if prefix_k is not None and prefix_v is not None:
        prefix = len(prefix_k)
        k, v = torch.cat([prefix_k, k]), torch.cat([prefix_v, v])
    scale, value_width = q.shape[-1] ** -0.5, v.shape[-1]
    of = seen(ends, len(q), prefix, window)
    q, k, v = (_wide(t).transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out = (_compiled if q.is_cuda else _attend)(q, k, v, of, scale)
    return out[..., :value_width].squeeze(0).transpose(0, 1)


def seen(cu_seqlens: Tensor, tokens: int, prefix: int, window: int | None) -> Seen:
    """Made once for each tensor of document boundaries."""
    kind = ("seen", tokens, prefix, window)
    return segments.kept(cu_seqlens, kind, lambda: _seen(cu_seqlens, tokens, prefix, window))


def visible_keys(first: Tensor, own: Tensor) -> MaskFunction:
    """FlexAttention's mask function: may a query see a key?"""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        prefix = own[query] - query
        return (key < prefix) | ((key >= first[query]) & (key <= own[query]))

    return visible


def _seen(cu_seqlens: Tensor, tokens: int, prefix: int, window: int | None) -> Seen:
    query = torch.arange(tokens, device=cu_seqlens.device)
    first = segments.owners(cu_seqlens, tokens).firsts
    if window is not None:
        first = torch.maximum(first, query - window)
    first, own = prefix + first, prefix + query
    some, every = _pairs_of_blocks(first, own, prefix)
    partial = some & ~every
    listed = (tensor for grid in (partial, every, partial.t(), every.t()) for tensor in _listed(grid))
    return Seen(first.int(), own.int(), *listed)


def _pairs_of_blocks(first: Tensor, own: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """(R, C) bool: does some query of a block see some key of another, does every query see every key?

    Neighbours' ranges touch, so together the queries of a block see all keys from the first one's first to the last
    one's own. An incomplete block at an end of the stream is never full.
    """
    tokens, keys = len(own), prefix + len(own)
    start = torch.arange(0, tokens, BLOCK, device=own.device).unsqueeze(1)
    stop = (start + BLOCK).clamp(max=tokens)
    key_start = torch.arange(0, keys, BLOCK, device=own.device)
    key_stop = (key_start + BLOCK).clamp(max=keys)
    some = (key_start < prefix) | ((key_stop > first[start]) & (key_start <= own[stop - 1]))
    in_range = (key_start.clamp(min=prefix) >= first[stop - 1]) & (key_stop <= own[start] + 1)
    complete = (start + BLOCK <= tokens) & (key_start + BLOCK <= keys)
    return some, complete & ((key_stop <= prefix) | in_range)


def _listed(grid: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) bool -> how many are set in a row (1, 1, n), and their columns, then the others' (1, 1, n, m); int32."""
    columns = grid.int().argsort(dim=-1, descending=True, stable=True)
    # The kernels read rows without gaps, whatever the strides say, and a sorted transpose is a transpose again.
    return grid.sum(-1, dtype=torch.int32)[None, None], columns.int().contiguous()[None, None]


def _wide(t: Tensor) -> Tensor:
    """Zeros behind a head that is too narrow for the compiled kernel change no product."""
    missing = NARROWEST - t.shape[-1]
    return F.pad(t, (0, missing)) if missing > 0 else t


def _attend(q: Tensor, k: Tensor, v: Tensor, of: Seen, scale: float) -> Tensor:
    """q (1, H, T, d), k (1, Hkv, P + T, d), v (1, Hkv, P + T, dv) -> (1, H, T, dv)."""
    mask = of.block_mask(q.shape[2], k.shape[2])
    attend: Any = flex_attention
    out: Tensor = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out


def _compiled(q: Tensor, k: Tensor, v: Tensor, of: Seen, scale: float) -> Tensor:
    """_attend as a kernel."""
    mark_lengths(q, k, v, of)
    with torch._dynamo.config.patch(recompile_limit=KERNELS):
        out: Tensor = compiled("inductor")(q, k, v, of, scale)
    return out


def mark_lengths(q: Tensor, k: Tensor, v: Tensor, of: Seen) -> None:
    """Packed rows have ever new lengths; what is compiled must not depend on the first one's."""
    for t in (q, k, v):
        torch._dynamo.maybe_mark_dynamic(t, 2)
    for t in of:
        torch._dynamo.maybe_mark_dynamic(t, [dimension for dimension, n in enumerate(t.shape) if n > 1])


@functools.cache
def compiled(backend: Any) -> Callable[..., Tensor]:
    """Nothing but the marked dimensions is dynamic: as a varying number the scale could not be built in."""
    return torch.compile(_attend, backend=backend, dynamic=False, fullgraph=True)
