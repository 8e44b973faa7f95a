"""Scan and conv in torch alone, for CPUs without a compiler: slower than the kernels, far faster than a plain loop.

The conv also serves GPUs: it is one convolution over all segments.

The scan is an autograd function that keeps every CHUNK-th state and recomputes the others, so that autograd records
nothing inside the recurrence. Signatures and shapes: reference.py; here L steps of S padded segments at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymba_tune.model.ops.reference import LINEAR_SOFTPLUS, pad, unpad

# Steps computed at once: few enough for their states to stay in the cache.
CHUNK = 8


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Torch only; see reference.selective_scan."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    lengths, wide_x = cu_seqlens.diff().tolist(), x.to(dtype)
    delta = F.softplus(dt.to(dtype), threshold=LINEAR_SOFTPLUS)
    shape = (len(lengths), *A.shape)
    state = x.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype).expand(shape)
    padded = [pad(t.to(dtype), lengths) for t in (delta, wide_x, B, C)]
    y, final = _Recurrence.apply(*padded, A.to(dtype), state)
    y = unpad(y.unbind(), lengths, like=delta) + D.to(dtype) * wide_x
    return (y * F.silu(gate.to(dtype))).to(x.dtype), final


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One convolution over all segments, each behind its initial state; see reference.causal_conv1d."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels, taps = weight.shape
    segments, tokens = len(cu_seqlens) - 1, len(x)
    shape = (segments, channels, taps)
    initial = x.new_zeros(shape) if initial_state is None else initial_state.expand(shape)
    device = x.device
    cu_seqlens = cu_seqlens.to(device)
    position, segment, tap = (torch.arange(n, device=device) for n in (tokens, segments, taps))
    # Segment s starts at cu_seqlens[s] + s * taps of the history, its tokens `taps` later.
    starts = cu_seqlens[:-1] + segment * taps
    slots = position + (torch.bucketize(position, cu_seqlens[1:], right=True) + 1) * taps
    before = (starts.unsqueeze(1) + tap).flatten()
    history = x.new_empty(tokens + segments * taps, channels, dtype=dtype)
    history = history.index_copy(0, slots, x.to(dtype)).index_copy(
        0, before, initial.to(dtype).transpose(1, 2).flatten(0, 1)
    )
    padded = F.pad(history.t(), (taps - 1, 0))
    y = F.conv1d(padded, weight.to(dtype).unsqueeze(1), bias.to(dtype), groups=channels).t()[slots]
    last = (cu_seqlens[1:] + segment * taps).unsqueeze(1) + tap
    return F.silu(y).to(x.dtype), history[last].transpose(1, 2).to(x.dtype)


class _Recurrence(torch.autograd.Function):
    """delta, x (L, S, Dn), B, C (L, S, N), A (Dn, N), state (S, Dn, N) -> C . h (L, S, Dn), last state (S, Dn, N)."""

    @staticmethod
    def forward(
        ctx: Any, delta: Tensor, x: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, kept = torch.empty_like(delta), []
        for steps in _chunks(len(delta)):
            kept.append(state)
            _, states = _states(delta[steps], x[steps], B[steps], A, state)
            torch.sum(states * C[steps].unsqueeze(2), -1, out=y[steps])
            state = states[-1].clone()
        ctx.save_for_backward(delta, x, B, C, A, *kept)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
        delta, x, B, C, A, *kept = ctx.saved_tensors
        ddelta, dx, dB, dC = (torch.empty_like(t) for t in (delta, x, B, C))
        dA = torch.zeros_like(A)
        for steps, state in reversed(list(zip(_chunks(len(delta)), kept, strict=True))):
            decay, states = _states(delta[steps], x[steps], B[steps], A, state)
            grad = dy[steps].unsqueeze(-1) * C[steps].unsqueeze(2)
            grad[-1] += dstate
            for earlier, a, later in reversed(list(zip(grad[:-1], decay[1:], grad[1:], strict=True))):
                earlier.addcmul_(a, later)
            dstate = decay[0] * grad[0]
            ddrive = (grad * B[steps].unsqueeze(2)).sum(-1)
            dlog = grad * decay * torch.cat([state.unsqueeze(0), states[:-1]])
            dB[steps] = (grad * (delta[steps] * x[steps]).unsqueeze(-1)).sum(2)
            dC[steps] = (states * dy[steps].unsqueeze(-1)).sum(2)
            ddelta[steps] = (dlog * A).sum(-1) + ddrive * x[steps]
            dx[steps] = ddrive * delta[steps]
            dA += (dlog * delta[steps].unsqueeze(-1)).sum((0, 1))
        return ddelta, dx, dB, dC, dA, dstate


def _chunks(length: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, length, CHUNK)]


def _states(delta: Tensor, x: Tensor, B: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states of some steps, (steps, S, Dn, N) each, from the state before them."""
    decay = (delta.unsqueeze(-1) * A).exp_()
    states = (delta * x).unsqueeze(-1) * B.unsqueeze(2)
    for a, current in zip(decay, states, strict=True):
        current.addcmul_(a, state)
        state = current
    return decay, states
