"""The truth: the three sequence operations of Hymba in plain torch, differentiable in every tensor argument.

Legend: T tokens of all segments end to end, S segments, L the longest segment, Dn SSM channels, N states a channel,
K conv taps, H query heads, Hkv key/value heads, d query/key width, dv value width, P prefix tokens.
`cu_seqlens` (S+1,) int64 marks the segments: segment s is tokens cu_seqlens[s] : cu_seqlens[s+1], and may be empty.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# From here on log(1 + exp(z)) is z in float64 too; torch's own threshold of 20 leaves an error of 2e-9.
LINEAR_SOFTPLUS = 40.0

DEVICES = ("cpu", "cuda", "mps", "meta")
META_FIRST: frozenset[str] = frozenset()


def available(op: str) -> tuple[bool, str]:
    return True, "plain torch, the truth that the other backends are tested against; slow"


def takes_queries(dtype: torch.dtype) -> bool:
    return True


def elementwise() -> None:
    """No kernels: the model's own formulas compute norms, RoPE and SwiGLU."""


def steps() -> ModuleType:
    """See ops.steps."""
    from hymba_tune.model.ops import reference_steps

    return reference_steps


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
    """Mamba's selective state space model (arXiv 2312.00752, equation 2), gated, over separate segments.

        delta = softplus(dt)
        h_t   = exp(delta_t A) h_{t-1} + delta_t B_t x_t
        y_t   = (C_t . h_t + D x_t) silu(gate_t)

    Args:
        x, gate: (T, Dn). dt: (T, Dn), before softplus, bias included. A: (Dn, N), negative. B, C: (T, N). D: (Dn,).
        initial_state: (S, Dn, N), or (1, Dn, N) shared by all segments; None is zeros.

    Returns:
        y (T, Dn) in x's dtype, and the states after the last token of each segment (S, Dn, N), float32 (float64 for
        float64 input). An empty segment returns its initial state.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    lengths = cu_seqlens.diff().tolist()
    wide_x = x.to(dtype)
    delta = F.softplus(dt.to(dtype), threshold=LINEAR_SOFTPLUS)
    # A padded step has delta = 0: the state is multiplied by exp(0) = 1, 0 added; each segment keeps its last state.
    delta_LSD, x_LSD, B_LSN, C_LSN = (pad(t, lengths) for t in (delta, wide_x, B.to(dtype), C.to(dtype)))
    decay = torch.exp(delta_LSD.unsqueeze(-1) * A.to(dtype))
    drive = (delta_LSD * x_LSD).unsqueeze(-1) * B_LSN.unsqueeze(2)

    state = _initial(initial_state, (len(lengths), *A.shape), x).to(dtype)
    outputs = []
    for decay_t, drive_t, C_t in zip(decay.unbind(), drive.unbind(), C_LSN.unsqueeze(2).unbind(), strict=True):
        state = decay_t * state + drive_t
        outputs.append((state * C_t).sum(-1))
    y = unpad(outputs, lengths, like=delta)
    y = (y + D.to(dtype) * wide_x) * F.silu(gate.to(dtype))
    return y.to(x.dtype), state


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, bias, silu, over separate segments.

    Args:
        x: (T, Dn). weight: (Dn, K), newest tap last. bias: (Dn,).
        initial_state: (S, Dn, K) or (1, Dn, K) shared: the last K inputs before the segment, newest last (the oldest is
            never read); None is zeros.

    Returns:
        y (T, Dn) and the last K inputs of each segment, initial state included, (S, Dn, K), both in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels, taps = weight.shape
    kernel, bias = weight.to(dtype).unsqueeze(1), bias.to(dtype)
    segments = x.to(dtype).split(cu_seqlens.diff().tolist())
    initial = _initial(initial_state, (len(segments), channels, taps), x).to(dtype)
    outputs, finals = [x[:0].to(dtype)], [initial[:0]]
    for segment, before in zip(segments, initial, strict=True):
        history = torch.cat([before, segment.t()], dim=1)
        y = F.conv1d(history, kernel, bias, groups=channels)
        outputs.append(F.silu(y[:, 1:].t()))
        finals.append(history[:, history.shape[1] - taps :].unsqueeze(0))
    return torch.cat(outputs).to(x.dtype), torch.cat(finals).to(x.dtype)


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
    """Causal attention inside each segment, with grouped key/value heads and a prefix that every token sees.

    A query sees every prefix token and, in its own segment, itself and the earlier tokens with `query - key <= window`.
    Query head h reads key/value head h // (H // Hkv); the scale is d ** -0.5; rotary embedding is already applied.

    Args:
        q: (T, H, d). k: (T, Hkv, d). v: (T, Hkv, dv). prefix_k: (P, Hkv, d). prefix_v: (P, Hkv, dv).
        window: past tokens a query sees besides itself; None is all of them.
        queries: (Q,) rising; only these tokens ask, q is (Q, H, d). None is all of them.

    Returns:
        (T, H, dv), or (Q, H, dv), in q's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    visible = visible_tokens(cu_seqlens, len(k), window)
    visible = visible if queries is None else visible[queries]
    if prefix_k is not None and prefix_v is not None:
        k, v = torch.cat([prefix_k, k]), torch.cat([prefix_v, v])
        visible = F.pad(visible, (len(prefix_k), 0), value=True)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.to(dtype).repeat_interleave(groups, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype), k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khv->qhv", weights, v).to(q.dtype)


def visible_tokens(cu_seqlens: Tensor, tokens: int, window: int | None) -> Tensor:
    """(T, T) bool: may query (row) see key (column)?"""
    position = torch.arange(tokens, device=cu_seqlens.device)
    segment = torch.bucketize(position, cu_seqlens[1:], right=True)
    distance = position.unsqueeze(1) - position
    visible = (segment.unsqueeze(1) == segment) & (distance >= 0)
    return visible if window is None else visible & (distance <= window)


def _initial(state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_zeros(shape) if state is None else state.expand(shape)


def pad(t: Tensor, lengths: list[int]) -> Tensor:
    """(T, n) -> (L, S, n), zeros after each segment's end."""
    return pad_sequence(list(t.split(lengths))) if lengths else t.unsqueeze(1)[:, :0]


def unpad(steps: tuple[Tensor, ...] | list[Tensor], lengths: list[int], like: Tensor) -> Tensor:
    """L tensors (S, n) -> (T, n)."""
    if not steps:
        return torch.zeros_like(like)
    columns = torch.stack(steps, dim=1)
    return torch.cat([column[:length] for column, length in zip(columns, lengths, strict=True)])
