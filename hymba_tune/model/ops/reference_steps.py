"""The truth of decoding: what attention, conv and scan do to one more token a row, in plain torch, without gradients.

What a row has cached is changed in place. Legend: R rows, M meta tokens, P cached slots; the other letters as in
reference.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_tune.model.ops.reference import LINEAR_SOFTPLUS


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta_k: Tensor,
    meta_v: Tensor,
    cached_k: Tensor,
    cached_v: Tensor,
    lengths: Tensor,
    window: int | None = None,
) -> Tensor:
    """Attention of one token a row over the meta tokens, the row's cached tokens and itself.

    Position p of a row lies in slot p % P, so the slots hold the last P of its positions.

    Args:
        q: (R, H, d). k: (R, Hkv, d). v: (R, Hkv, dv). meta_k: (M, Hkv, d). meta_v: (M, Hkv, dv).
        cached_k: (R, Hkv, P, d). cached_v: (R, Hkv, P, dv). lengths: (R,) tokens that each row has cached so far.
        window: cached tokens back that are seen; None is all of them.

    Returns:
        (R, H, dv) in q's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    grouped = (q.to(dtype) * q.shape[-1] ** -0.5).unflatten(1, (-1, groups))
    scores = torch.cat(
        [
            torch.einsum("bhgd,mhd->bhgm", grouped, meta_k.to(dtype)),
            (grouped @ cached_k.to(dtype).transpose(-1, -2)).masked_fill(
                ~_seen_slots(lengths, cached_k.shape[2], window)[:, None, None], float("-inf")
            ),
            grouped @ k.to(dtype).unsqueeze(-1),
        ],
        dim=-1,
    )
    meta, cached, own = scores.softmax(-1).split([len(meta_k), cached_k.shape[2], 1], dim=-1)
    of_meta = torch.einsum("bhgm,mhv->bhgv", meta, meta_v.to(dtype))
    out = of_meta + cached @ cached_v.to(dtype) + own * v.to(dtype).unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype)


def append_step(k: Tensor, v: Tensor, cached_k: Tensor, cached_v: Tensor, lengths: Tensor) -> None:
    """Write a token a row, k (R, Hkv, d) and v (R, Hkv, dv), into the slot of its position; see attention_step."""
    row, slot = torch.arange(len(k), device=k.device), lengths % cached_k.shape[2]
    cached_k[row, :, slot] = k.to(cached_k.dtype)
    cached_v[row, :, slot] = v.to(cached_v.dtype)


def _seen_slots(lengths: Tensor, slots: int, window: int | None) -> Tensor:
    """(R, P): does the slot hold a token, and does the next one see it?"""
    age = (lengths[:, None] - 1 - torch.arange(slots, device=lengths.device)) % slots
    seen = age < lengths[:, None]
    return seen if window is None else seen & (age < window)


def conv_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """One token of reference.causal_conv1d in every row.

    Args:
        x: (R, Dn). weight: (Dn, K). bias: (Dn,). state: (R, Dn, K), the last inputs, newest last; x is pushed into it.

    Returns:
        (R, Dn) in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    state.copy_(torch.cat([state[..., 1:], x.unsqueeze(-1)], dim=-1))
    return F.silu((state.to(dtype) * weight.to(dtype)).sum(-1) + bias.to(dtype)).to(x.dtype)


def scan_step(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor, state: Tensor
) -> Tensor:
    """One token of reference.selective_scan in every row, with A = -exp(A_log).

    Args:
        x, gate, dt: (R, Dn). A_log: (Dn, N). B, C: (R, N). D: (Dn,). state: (R, Dn, N) float32 (float64 for float64
            input), replaced by the one after the token.

    Returns:
        (R, Dn) in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_wide, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    delta = F.softplus(dt.to(dtype), threshold=LINEAR_SOFTPLUS)
    decay = torch.exp(delta.unsqueeze(-1) * -torch.exp(A_log.to(dtype)))
    state.copy_(decay * state + (delta * x_wide).unsqueeze(-1) * B.unsqueeze(1))
    y = (state * C.unsqueeze(1)).sum(-1) + D.to(dtype) * x_wide
    return (y * F.silu(gate.to(dtype))).to(x.dtype)
