"""Attention on a GPU: autograd around the Triton kernels of triton_attention_kernels.py.

Signature, shapes and semantics: reference.py. A FlashAttention-2 (arXiv 2307.08691) for what Hymba's queries see: the
meta tokens, and one range of keys that its document and its window bound. No mask of tokens by tokens and no list of
blocks is laid out; where the ranges start and end is derived once a forward for the global layers and once for the
windowed ones. Deterministic: no atomics, the gradients of keys are summed by the program that owns them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_tune.model.ops import meta_first, reference, segments
from hymba_tune.model.ops import triton_attention_kernels as kernels
from hymba_tune.model.ops.triton_steps import PRODUCTS, SMALLEST, TYPES

# The parts that the queries go to for the gradients of the prefix's keys, which all of them see.
PARTS = 24
# Numbers of the prefix's gradients that a program sums.
SUMMED = 1024


class Shape(NamedTuple):
    """Queries and keys of a block, and how a program computes it."""

    ROWS: int
    COLS: int
    num_warps: int
    num_stages: int


FORWARD, QUERY_GRADIENT, KEY_GRADIENTS = Shape(64, 64, 4, 3), Shape(64, 64, 4, 3), Shape(64, 64, 4, 2)
# Without tensor cores, products in registers.
WIDE_SHAPE = Shape(32, 16, 4, 1)


class Ranges(NamedTuple):
    """What sees what; int32."""

    firsts: Tensor
    """(Q,) the first key behind the prefix that a query sees; 0 for a query in the prefix."""
    lasts: Tensor
    """(keys,) the place of the last query that sees a key."""


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    window: int | None = None,
    num_meta: int = 0,
) -> Tensor:
    """Triton; see reference.segment_attention. float64, for which GPUs have no such products, by the reference."""
    if q.dtype == torch.float64 and q.is_cuda:
        if num_meta:
            return meta_first.segment_attention(reference.segment_attention, q, k, v, cu_seqlens, window, num_meta)
        return reference.segment_attention(q, k, v, cu_seqlens, prefix_k, prefix_v, window)
    ends = segments.boundaries(cu_seqlens, q.device)
    prefix, offset = num_meta, 0
    if prefix_k is not None and prefix_v is not None:
        prefix = offset = len(prefix_k)
        k, v = torch.cat([prefix_k, k]), torch.cat([prefix_v, v])
    kind = ("ranges", len(q), prefix, offset, window)
    ranges = segments.kept(ends, kind, lambda: _ranges(ends, len(q), prefix, offset, window))
    return _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), *ranges, prefix, offset)


def _ranges(cu_seqlens: Tensor, queries: int, prefix: int, offset: int, window: int | None) -> Ranges:
    """Meta tokens are queries where the prefix is the queries' own: then `offset` is 0."""
    meta = prefix - offset
    token = torch.arange(queries - meta, device=cu_seqlens.device)
    document, firsts = segments.owners(cu_seqlens, queries - meta)
    lasts = cu_seqlens[document + 1] - 1
    if window is not None:
        firsts, lasts = torch.maximum(firsts, token - window), torch.minimum(lasts, token + window)
    of_meta = firsts.new_zeros(meta)
    everyone = lasts.new_full((prefix,), queries + offset - 1)
    return Ranges(torch.cat([of_meta, prefix + firsts]).int(), torch.cat([everyone, prefix + lasts]).int())


class _Attention(torch.autograd.Function):
    """q (Q, H, d), k (keys, Hkv, d), v (keys, Hkv, dv) -> (Q, H, dv); all contiguous, the first keys are the prefix."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, firsts: Tensor, lasts: Tensor, prefix: int, offset: int
    ) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[2])
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
        launch = _Launch(q, v, prefix, offset)
        given = {"q": q, "k": k, "v": v, "firsts": firsts, "lasts": lasts}
        launch(kernels.attention_forward, FORWARD, launch.query_blocks, **given, out=out, lse=lse)
        ctx.save_for_backward(q, k, v, firsts, lasts, out, lse)
        ctx.places = (prefix, offset)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, firsts, lasts, out, lse = ctx.saved_tensors
        prefix, _ = ctx.places
        launch = _Launch(q, v, *ctx.places)
        dq, dk, dv, deltas = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
        given = {"q": q, "k": k, "v": v, "lasts": lasts, "lse": lse, "dout": dout.contiguous(), "deltas": deltas}
        launch(kernels.attention_query_gradient, QUERY_GRADIENT, launch.query_blocks, **given, firsts=firsts, out=out,
               dq=dq, unit=launch.unit)  # fmt: skip
        dk_parts, dv_parts = (lse.new_empty(PARTS, prefix, *t.shape[1:]) for t in (k, v))
        launch(kernels.attention_key_gradients, KEY_GRADIENTS, launch.key_blocks(len(k)), **given, dk=dk, dv=dv,
               dk_parts=dk_parts, dv_parts=dv_parts, keys=len(k), prefix_programs=launch.prefix_programs(), PARTS=PARTS,
               unit=launch.unit)  # fmt: skip
        if prefix:
            sizes = (dk_parts[0].numel(), dv_parts[0].numel())
            kernels.attention_parts[(triton.cdiv(max(sizes), SUMMED),)](
                dk_parts, dv_parts, dk, dv, *sizes, PARTS=PARTS, SIZE=SUMMED
            )
        return dq, dk, dv, None, None, None, None


class _Launch:
    """What the kernels of one call share, by the names of their parameters."""

    def __init__(self, q: Tensor, v: Tensor, prefix: int, offset: int) -> None:
        (self.queries, self.heads, dim), (_, self.kv_heads, value_dim) = q.shape, v.shape
        self.prefix, self.narrow = prefix, q.element_size() == 2
        self.unit = dim**-0.5
        self.common: dict[str, Any] = {
            "queries": self.queries, "prefix": prefix, "offset": offset, "scale": self.unit * math.log2(math.e),
            "HEADS": self.heads, "GROUP": self.heads // self.kv_heads, "DIM": dim, "VALUE_DIM": value_dim,
            "D": max(SMALLEST, triton.next_power_of_2(dim)), "E": max(SMALLEST, triton.next_power_of_2(value_dim)),
            "PRODUCT": PRODUCTS[q.dtype], "WIDE": TYPES[torch.promote_types(q.dtype, torch.float32)],
        }  # fmt: skip

    def __call__(self, kernel: Any, shape: Shape, grid: Any, **arguments: Any) -> None:
        shape = self.shape(shape)
        programs = grid(shape)
        if programs[0]:
            kernel[programs](**arguments, **self.common, **shape._asdict())

    def shape(self, wanted: Shape) -> Shape:
        return wanted if self.narrow else WIDE_SHAPE

    def query_blocks(self, shape: Shape) -> tuple[int, int]:
        return triton.cdiv(self.queries, shape.ROWS), self.heads

    def prefix_programs(self) -> int:
        return triton.cdiv(self.prefix, self.shape(KEY_GRADIENTS).COLS) * PARTS

    def key_blocks(self, keys: int) -> Any:
        """Those of the prefix first: a part of all queries is more than most keys are seen by."""
        return lambda shape: (self.prefix_programs() + triton.cdiv(keys - self.prefix, shape.COLS), self.kv_heads)
