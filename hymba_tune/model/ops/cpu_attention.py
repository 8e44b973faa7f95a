"""Segment attention on the CPU as matrix products over blocks of queries; the truth it must equal: reference.py.

The stream is cut into blocks of QUERIES tokens, whatever the segments. A block scores the prefix and one range of keys,
from the first that its first query sees to its own end; what single queries must not see gets -inf, whose weight is
exactly 0. So many short segments share a block, a long one costs L x window, and nothing L x L is ever held. The
backward pass scores each block again instead of keeping the weights.

Legend: T tokens, P prefix tokens, S segments, H query heads, Hkv key/value heads, G = H // Hkv, d query/key width,
dv value width. Rows are (query, head of its group), T * G of them a key/value head: a block's are n * G in a row.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Wider blocks score more keys that their queries must not see, narrower ones make smaller products.
QUERIES = 128
# Ranges of keys start at multiples of this, so that few shapes of matrix products occur: each is set up once.
ALIGNMENT = 64


class Strip(NamedTuple):
    """Keys of a block that not every query sees, counted from its first key; bias (n, 1, width), 0 or -inf."""

    start: int
    stop: int
    bias: Tensor


class Block(NamedTuple):
    """Queries start:stop, which see no keys before first_key but the prefix."""

    start: int
    stop: int
    first_key: int
    strips: tuple[Strip, ...]


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Windowed causal attention over segments with a shared prefix -> (T, H, dv); see reference.segment_attention.

    Scores and weights are float32 (float64 for float64 input); for 16-bit input the weights are rounded to 16 bits
    before they meet the values, as in torch's flash attention.
    """
    if prefix_k is None or prefix_v is None:
        prefix_k, prefix_v = k[:0], v[:0]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (k, v, prefix_k, prefix_v)), q.dtype)
    operands = [t.to(dtype) for t in (q, k, v, prefix_k, prefix_v)]
    # Every product below has its precision; autocast would round float32 scores.
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(*operands, tuple(cu_seqlens.tolist()), window).to(q.dtype)


@functools.lru_cache(maxsize=8)
def plan(boundaries: tuple[int, ...], window: int | None) -> tuple[Block, ...]:
    """The blocks of segments boundaries[s] : boundaries[s + 1]; every layer of a forward pass asks for the same."""
    tokens = boundaries[-1]
    starts = torch.tensor(boundaries[:-1]).repeat_interleave(torch.tensor(boundaries).diff())
    first_seen = starts if window is None else torch.maximum(starts, torch.arange(tokens) - window)
    return tuple(_block(i, min(i + QUERIES, tokens), first_seen) for i in range(0, tokens, QUERIES))


def _block(start: int, stop: int, first_seen: Tensor) -> Block:
    """first_seen (T,): the earliest key that a query sees. It never decreases, so neither does what a block sees."""
    earliest, latest = int(first_seen[start]), int(first_seen[stop - 1])
    first_key = earliest // ALIGNMENT * ALIGNMENT
    # All queries see latest : start + 1; only the keys on both sides need a bias.
    edges = [(first_key, latest), (start + 1, stop)] if latest <= start + 1 else [(first_key, stop)]
    query, seen = torch.arange(start, stop)[:, None], first_seen[start:stop, None]
    strips = []
    for first, last in edges:
        key = torch.arange(first, last)
        hidden = (key < seen) | (key > query)
        if hidden.any():
            bias = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")).unsqueeze(1)
            strips.append(Strip(first - first_key, last - first_key, bias))
    return Block(start, stop, first_key, tuple(strips))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        boundaries: tuple[int, ...],
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v)
        ctx.boundaries, ctx.window = boundaries, window
        out = _Heads(q, k, v, prefix_k, prefix_v).forward(plan(boundaries, window))
        return _from_rows(out, q.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v = ctx.saved_tensors
        # A backward pass may run inside an autocast block too.
        with torch.autocast("cpu", enabled=False):
            heads = _Heads(q, k, v, prefix_k, prefix_v)
            grad_queries, grad_keys, grad_values = heads.backward(grad_out, plan(ctx.boundaries, ctx.window))
        grad_q = _from_rows(grad_queries, q.shape[1]).to(q.dtype)
        grad_prefix_k, grad_k = grad_keys.transpose(0, 1).to(k.dtype).split([len(prefix_k), len(k)])
        grad_prefix_v, grad_v = grad_values.transpose(0, 1).to(v.dtype).split([len(prefix_v), len(v)])
        return grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v, None, None


class _Heads:
    """The operands as one matrix a key/value head: queries (Hkv, T * G, d), scaled; keys (Hkv, P + T, d); values."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> None:
        self.dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        self.scale = q.shape[-1] ** -0.5
        self.group, self.prefix = q.shape[1] // k.shape[1], len(prefix_k)
        self.queries = _to_rows(q, k.shape[1]).to(wide) * self.scale
        self.keys = torch.cat([prefix_k, k]).transpose(0, 1).contiguous().to(wide)
        self.values = torch.cat([prefix_v, v]).transpose(0, 1).contiguous()

    def forward(self, blocks: tuple[Block, ...]) -> Tensor:
        """-> (Hkv, T * G, dv)"""
        out = self.values.new_empty(*self.queries.shape[:2], self.values.shape[2])
        for block in blocks:
            rows, ranges = self._rows(block), self._ranges(block)
            weights = self._weights(block).to(self.dtype)
            _sum_over_ranges(out[:, rows], weights, self.values, ranges)
        return out

    def backward(self, grad_out: Tensor, blocks: tuple[Block, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q (Hkv, T * G, d), and in float32 at least of keys and values, prefix first."""
        grad_rows = _to_rows(grad_out, len(self.keys))
        queries, keys = self.queries.to(self.dtype), self.keys.to(self.dtype)
        grad_queries = torch.empty_like(queries)
        grad_keys = torch.zeros_like(self.keys)
        grad_values = torch.zeros_like(self.values, dtype=self.keys.dtype)
        for block in blocks:
            rows, ranges = self._rows(block), self._ranges(block)
            weights = self._weights(block)
            grad_weights = _against_ranges(grad_rows[:, rows], self.values, ranges).to(weights.dtype)
            _add_to_ranges(grad_values, weights.to(self.dtype), grad_rows[:, rows], ranges)
            # (grad_weights - sum(grad_weights * weights)) * weights
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).to(self.dtype)
            _sum_over_ranges(grad_queries[:, rows], grad_scores, keys, ranges)
            _add_to_ranges(grad_keys, grad_scores, queries[:, rows], ranges)
        return grad_queries.mul_(self.scale), grad_keys, grad_values

    def _rows(self, block: Block) -> slice:
        return slice(block.start * self.group, block.stop * self.group)

    def _ranges(self, block: Block) -> tuple[slice, ...]:
        """Of the prefix and the tokens, end to end: what a block scores."""
        seen = slice(self.prefix + block.first_key, self.prefix + block.stop)
        if self.prefix == 0:
            return (seen,)
        return (slice(0, seen.stop),) if block.first_key == 0 else (slice(0, self.prefix), seen)

    def _weights(self, block: Block) -> Tensor:
        """softmax of a block's scores (Hkv, n * G, prefix + keys)"""
        scores = _against_ranges(self.queries[:, self._rows(block)], self.keys, self._ranges(block))
        by_query = scores.unflatten(1, (-1, self.group))
        for strip in block.strips:
            by_query[..., self.prefix + strip.start : self.prefix + strip.stop] += strip.bias
        return torch.softmax(scores, -1, out=scores)


def _to_rows(t: Tensor, kv_heads: int) -> Tensor:
    """(T, H, n) -> (Hkv, T * G, n), a copy"""
    return t.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _from_rows(rows: Tensor, heads: int) -> Tensor:
    """(Hkv, T * G, n) -> (T, H, n), a copy"""
    return rows.unflatten(1, (-1, heads // len(rows))).transpose(0, 1).flatten(1, 2)


def _against_ranges(rows: Tensor, matrix: Tensor, ranges: tuple[slice, ...]) -> Tensor:
    """rows (Hkv, n, x) times the ranges of matrix (Hkv, m, x), transposed -> (Hkv, n, all ranges end to end)"""
    if len(ranges) == 1:
        return torch.bmm(rows, matrix[:, ranges[0]].mT)
    product = rows.new_empty(*rows.shape[:2], sum(r.stop - r.start for r in ranges))
    for columns, r in _split(product, ranges):
        torch.bmm(rows, matrix[:, r].mT, out=columns)
    return product


def _sum_over_ranges(out: Tensor, weights: Tensor, matrix: Tensor, ranges: tuple[slice, ...]) -> None:
    """out (Hkv, n, x) = weights (Hkv, n, all ranges) times the ranges of matrix (Hkv, m, x)"""
    (columns, r), *others = _split(weights, ranges)
    torch.bmm(columns, matrix[:, r], out=out)
    for columns, r in others:
        out.baddbmm_(columns, matrix[:, r])


def _add_to_ranges(out: Tensor, weights: Tensor, rows: Tensor, ranges: tuple[slice, ...]) -> None:
    """ranges of out (Hkv, m, x) += weights (Hkv, n, all ranges), transposed, times rows (Hkv, n, x)"""
    for columns, r in _split(weights, ranges):
        out[:, r] += torch.bmm(columns.mT, rows)


def _split(weights: Tensor, ranges: tuple[slice, ...]) -> list[tuple[Tensor, slice]]:
    """The columns of weights that belong to each range."""
    columns = weights.split([r.stop - r.start for r in ranges], dim=-1)
    return list(zip(columns, ranges, strict=True))
