"""The meta tokens in front of the documents, for backends whose operations take one kind of segment at a time.

M meta tokens are a segment of their own. Every document continues it: the conv and the scan from its state, attention
with its keys and values as the prefix. cu_seqlens counts over the other tokens. `op` is a backend's operation without
meta tokens; shapes and semantics: reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hymba_tune.model.ops import segments

Op = Callable[..., Any]


def selective_scan(
    op: Op,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    meta: int,
) -> tuple[Tensor, Tensor]:
    """y (M + T, Dn), and the states after the documents (S, Dn, N)."""
    (x_m, dt_m, B_m, C_m, gate_m), (x, dt, B, C, gate) = _split((x, dt, B, C, gate), meta)
    y_m, state = op(x_m, dt_m, A, B_m, C_m, D, gate_m, _alone(cu_seqlens, meta))
    y, final = op(x, dt, A, B, C, D, gate, cu_seqlens, state)
    return torch.cat([y_m, y]), final


def causal_conv1d(
    op: Op, x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, meta: int
) -> tuple[Tensor, Tensor]:
    """y (M + T, Dn), and the last inputs of the documents (S, Dn, K)."""
    (x_m,), (x,) = _split((x,), meta)
    y_m, state = op(x_m, weight, bias, _alone(cu_seqlens, meta))
    y, final = op(x, weight, bias, cu_seqlens, state)
    return torch.cat([y_m, y]), final


def segment_attention(
    op: Op,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int | None,
    meta: int,
    queries: Tensor | None = None,
) -> Tensor:
    """(M + T, H, dv), of `queries`, which are not meta tokens, (Q, H, dv); no window counts between meta tokens."""
    if queries is not None:
        (k_m, v_m), (k, v) = _split((k, v), meta)
        some: Tensor = op(q, k, v, cu_seqlens, k_m, v_m, window, queries=queries)
        return some
    (q_m, k_m, v_m), (q, k, v) = _split((q, k, v), meta)
    of_meta = op(q_m, k_m, v_m, _alone(cu_seqlens, meta))
    return torch.cat([of_meta, op(q, k, v, cu_seqlens, k_m, v_m, window)])


def _split(streams: Iterable[Tensor], meta: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The meta tokens' rows and the others': a split, whose backward is one copy where slices take six."""
    of_meta, others = zip(*(t.split([meta, t.shape[0] - meta]) for t in streams), strict=True)
    return of_meta, others


def _alone(cu_seqlens: Tensor, meta: int) -> Tensor:
    """(2,): the meta tokens as a segment; one tensor for all layers, which keep what they derive from it."""
    return segments.kept(cu_seqlens, ("meta", meta), lambda: torch.tensor([0, meta], device=cu_seqlens.device))
