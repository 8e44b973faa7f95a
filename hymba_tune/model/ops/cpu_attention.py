"""Segment attention on the CPU: a compiled kernel forward, and matrix products over blocks of queries.

The truth it must equal: reference.py. The kernel, cpu_kernels/attention.h, is for float32 and float64; 16-bit products
have units of their own, which matrix products use. These compute the backward pass, and the forward pass of 16-bit
input or without a compiler.

For them the stream is cut into blocks of QUERIES tokens, whatever the segments. A block scores the prefix and one range
of keys, from the first that its first query sees to its own end; what single queries must not see gets -inf, whose
weight is exactly 0. So many short segments share a block, a long one costs L x window, and nothing L x L is ever held.
The backward pass scores each block again, for no weights are kept.

Legend: T tokens, P prefix tokens, S segments, H query heads, Hkv key/value heads, G = H // Hkv, d query/key width,
dv value width. Rows are (query, head of its group), T * G of them a key/value head: a block's are n * G in a row.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_tune.model.ops import cpu_library

# Wider blocks score more keys that their queries must not see, narrower ones make smaller products.
QUERIES = 128
# Ranges of keys start at multiples of this, so that few shapes of matrix products occur: each is set up once.
ALIGNMENT = 64


_SIZES = "threads tokens queries prefix heads group size value_size segments window"
_Inputs = cpu_library.structure(f"{_SIZES} scale cu_seqlens asking q k v prefix_k prefix_v out", _SIZES, "scale")


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
    queries: Tensor | None = None,
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
        boundaries = tuple(cu_seqlens.tolist())
        if queries is not None:
            return _compiled(operands, boundaries, window, queries).to(q.dtype)
        return _Attention.apply(*operands, boundaries, window).to(q.dtype)


def takes_queries(dtype: torch.dtype) -> bool:
    """Whether segment_attention may be given `queries`: where the kernel computes, without gradients."""
    return _has_kernel(dtype) and not torch.is_grad_enabled()


@functools.lru_cache(maxsize=4)
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
        if _has_kernel(q.dtype):
            return _compiled((q, k, v, prefix_k, prefix_v), boundaries, window)
        return _Heads(q, k, v, prefix_k, prefix_v).forward(plan(boundaries, window))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v = ctx.saved_tensors
        # A backward pass may run inside an autocast block too.
        with torch.autocast("cpu", enabled=False):
            heads = _Heads(q, k, v, prefix_k, prefix_v)
            grad_q, grad_keys, grad_values = heads.backward(grad_out, plan(ctx.boundaries, ctx.window))
        grad_prefix_k, grad_k = grad_keys.transpose(0, 1).to(k.dtype).split([len(prefix_k), len(k)])
        grad_prefix_v, grad_v = grad_values.transpose(0, 1).to(v.dtype).split([len(prefix_v), len(v)])
        return grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v, None, None


def _has_kernel(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64) and cpu_library.problem() is None


def _compiled(
    operands: Sequence[Tensor], boundaries: tuple[int, ...], window: int | None, queries: Tensor | None = None
) -> Tensor:
    """-> (T, H, dv) by the C kernel, of the `queries` alone (Q, H, dv)."""
    q, _, v, prefix_k, _ = operands
    (asking, heads, size), (tokens, kv_heads, value_size) = q.shape, v.shape
    out = q.new_empty(asking, heads, value_size)
    sizes = (asking, len(prefix_k), kv_heads, heads // kv_heads, size, value_size, len(boundaries) - 1)
    numbers = (torch.get_num_threads(), tokens, *sizes, tokens if window is None else window)
    chosen = None if queries is None else queries.long().contiguous()
    inputs = [torch.tensor(boundaries), chosen, *(t.contiguous() for t in operands), out]
    scale = size**-0.5 * math.log2(math.e)
    of_call = _Inputs(*numbers, scale, *(None if t is None else t.data_ptr() for t in inputs))
    cpu_library.kernel("attention_forward", q.dtype)(ctypes.byref(of_call))
    return out


class _Heads:
    """The operands, keys and values as one matrix a key/value head: (Hkv, P + T, d) and (Hkv, P + T, dv).

    oneDNN, which multiplies 16-bit numbers, takes nothing but whole contiguous tensors (others are copied in every
    product), so a block copies its queries, and its range of keys and values unless a slice will do.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> None:
        self.q, self.prefix = q, len(prefix_k)
        self.scale, self.group = q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.keys, self.values = (
            torch.cat(pair).transpose(0, 1).contiguous() for pair in ((prefix_k, k), (prefix_v, v))
        )

    def forward(self, blocks: tuple[Block, ...]) -> Tensor:
        """-> (T, H, dv)"""
        out = self.q.new_empty(*self.q.shape[:2], self.values.shape[2])
        for block in blocks:
            weights = self._weights(block, self._queries(block), self._seen(self.keys, block))
            values = self._seen(self.values, block)
            out[block.start : block.stop] = self._by_token(weights.to(out.dtype) @ values)
        return out

    def backward(self, grad_out: Tensor, blocks: tuple[Block, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q (T, H, d), and of keys and values, prefix first, in float32 at least."""
        dtype = self.q.dtype
        grad_q = torch.empty_like(self.q)
        grad_keys, grad_values = (torch.zeros_like(t, dtype=self.wide) for t in (self.keys, self.values))
        for block in blocks:
            queries, keys, values = self._queries(block), self._seen(self.keys, block), self._seen(self.values, block)
            weights = self._weights(block, queries, keys)
            grad_rows = self._rows(grad_out, block)
            self._accumulate(grad_values, block, weights.to(dtype).mT, grad_rows)
            grad_weights = (grad_rows @ values.mT).to(self.wide)
            # (grad_weights - sum(grad_weights * weights)) * weights
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, self.wide).to(dtype)
            self._accumulate(grad_keys, block, grad_scores.mT, queries)
            grad_q[block.start : block.stop] = self._by_token(grad_scores @ keys).mul_(self.scale)
        return grad_q, grad_keys, grad_values

    def _weights(self, block: Block, queries: Tensor, keys: Tensor) -> Tensor:
        """softmax of a block's scores (Hkv, n * G, prefix + keys)"""
        scores = queries.to(self.wide) @ keys.to(self.wide).mT
        by_query = scores.unflatten(1, (-1, self.group))
        for strip in block.strips:
            by_query[..., self.prefix + strip.start : self.prefix + strip.stop] += strip.bias
        return torch.softmax(scores, -1, out=scores)

    def _queries(self, block: Block) -> Tensor:
        """(Hkv, n * G, d), scaled"""
        return self._rows(self.q, block).mul_(self.scale)

    def _rows(self, t: Tensor, block: Block) -> Tensor:
        """A block of t (T, H, x) as a new tensor (Hkv, n * G, x)"""
        by_head = t[block.start : block.stop].unflatten(1, (-1, self.group)).transpose(0, 1)
        return by_head.clone(memory_format=torch.contiguous_format).flatten(1, 2)

    def _by_token(self, rows: Tensor) -> Tensor:
        """(Hkv, n * G, x) -> (n, H, x)"""
        return rows.unflatten(1, (-1, self.group)).transpose(0, 1).flatten(1, 2)

    def _seen(self, matrix: Tensor, block: Block) -> Tensor:
        """What a block scores of matrix (Hkv, P + T, x): the prefix, then its range of keys."""
        first, last = self.prefix + block.first_key, self.prefix + block.stop
        if self.prefix < first:
            return torch.cat([matrix[:, : self.prefix], matrix[:, first:last]], 1)
        return matrix[:, :last] if matrix.dtype == self.wide else matrix[:, :last].contiguous()

    def _accumulate(self, total: Tensor, block: Block, a: Tensor, b: Tensor) -> None:
        """Add a @ b, what a block gives to the keys that it scores: the way back of _seen."""
        first, last = self.prefix + block.first_key, self.prefix + block.stop
        if self.prefix < first or a.dtype != total.dtype:
            part = a @ b
            total[:, : self.prefix] += part[:, : self.prefix]
            total[:, first:last] += part[:, self.prefix :]
        else:
            total[:, :last].baddbmm_(a, b)
