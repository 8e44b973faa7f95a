"""mamba-ssm, causal-conv1d and flash-attn where they compute what reference.py does; elsewhere the Triton kernels.

Which calls they compute (releases 2.3, 1.7 and 2.8):

    selective_scan      one document, behind its meta tokens or not, without an initial state, all in float32:
                        the scan of mamba-ssm has neither document starts nor initial states, and takes dt in x's type
    causal_conv1d       one document: it has document starts or an initial state, not both
    segment_attention   16-bit types, and no document longer than the window (so every global layer): each document's
                        keys are repeated behind the prefix, and narrower heads are filled up with zeros

mamba-ssm gives no gradient for the final state, which here has none therefore. A user names this backend; `auto` takes
the Triton kernels for every call.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba_tune.model.ops import gpu, segments

DEVICES = ("cuda",)
META_FIRST = gpu.META_FIRST
elementwise, steps, takes_queries = gpu.elementwise, gpu.steps, gpu.takes_queries

_PACKAGES = {
    "selective_scan": ("mamba_ssm", "mamba-ssm for one document in float32"),
    "causal_conv1d": ("causal_conv1d", "causal-conv1d for one document"),
    "segment_attention": ("flash_attn", "flash-attn in 16 bits where no document is longer than the window"),
}


def available(op: str) -> tuple[bool, str]:
    """Whether both the package of an operation and Triton are here."""
    ok, technique = gpu.available(op)
    if not ok or op not in _PACKAGES:
        return ok, technique
    module, use = _PACKAGES[op]
    if importlib.util.find_spec(module) is None:
        return False, f"{module.replace('_', '-')} is not installed: pip install --no-build-isolation -e '.[cuda]'"
    return True, f"{use}; else {technique}"


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
    num_meta: int = 0,
) -> tuple[Tensor, Tensor]:
    """See reference.selective_scan, and `num_meta` in triton_scan."""
    inputs = (x, dt, A, B, C, D, gate)
    if initial_state is not None or not _lone(x, cu_seqlens) or any(t.dtype != torch.float32 for t in inputs):
        return gpu.selective_scan(*inputs, cu_seqlens, initial_state, num_meta=num_meta)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, b, c, z = (t.t().unsqueeze(0) for t in (x, dt, B, C, gate))
    y, state = selective_scan_fn(u, delta, A, b, c, D, z=z, delta_softplus=True, return_last_state=True)
    return y.squeeze(0).t(), state.detach()


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    num_meta: int = 0,
) -> tuple[Tensor, Tensor]:
    """See reference.causal_conv1d, and `num_meta` in triton_conv."""
    (channels, taps), rows = weight.shape, x.stride()
    laid_out = channels % 8 == 0 and rows[1] == 1 and rows[0] % 8 == 0 and 2 <= taps <= 4
    if not (laid_out and _lone(x, cu_seqlens) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)):
        return gpu.causal_conv1d(x, weight, bias, cu_seqlens, initial_state, num_meta=num_meta)
    from causal_conv1d import causal_conv1d_fn

    segments.refuse_two_beginnings(num_meta, initial_state)
    before = x.new_zeros(taps, channels) if initial_state is None else initial_state[0].t().to(x.dtype)
    # Channels lie next to each other, in the state too; its oldest input is never read.
    begun = None if initial_state is None else before[1:].contiguous().t().unsqueeze(0)
    y = causal_conv1d_fn(x.t().unsqueeze(0), weight, bias.to(weight.dtype), initial_states=begun, activation="silu")
    final = torch.cat([before, x[-taps:]])[-taps:]
    return y.squeeze(0).t(), final.t().unsqueeze(0)


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
    """See reference.segment_attention, and `num_meta` in triton_attention."""
    size, value_size = q.shape[2], v.shape[2]
    width = max(size, value_size)
    fits = width <= 256 and width % 8 == 0 and q.dtype == k.dtype == v.dtype in (torch.bfloat16, torch.float16)
    if not (fits and len(q) and (window is None or _longest(cu_seqlens) <= window + 1)):
        return gpu.segment_attention(q, k, v, cu_seqlens, prefix_k, prefix_v, window, num_meta=num_meta)
    from flash_attn import flash_attn_varlen_func

    keys, values, prefix = k, v, num_meta
    if prefix_k is not None and prefix_v is not None:
        prefix = len(prefix_k)
        keys, values = torch.cat([prefix_k.to(k.dtype), k]), torch.cat([prefix_v.to(v.dtype), v])
    plan = _behind(cu_seqlens, len(keys), prefix, alone=bool(num_meta))
    out: Tensor = flash_attn_varlen_func(
        _filled(q, width),
        _filled(keys[plan.rows], width),
        _filled(values[plan.rows], width),
        plan.cu_seqlens_q,
        plan.cu_seqlens_k,
        plan.longest_q,
        plan.longest_k,
        softmax_scale=size**-0.5,
        causal=True,
        deterministic=True,
    )
    return out[..., :value_size]


class _Plan(NamedTuple):
    """What flash-attn is to see: `rows` of prefix and tokens as its keys, in sequences of queries and keys."""

    rows: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int


def _behind(cu_seqlens: Tensor, keys: int, prefix: int, alone: bool) -> _Plan:
    """Each document behind its own copy of the prefix; `alone`: the prefix's tokens are a first sequence of queries."""
    return segments.kept(cu_seqlens, ("behind", keys, prefix, alone), lambda: _planned(cu_seqlens, keys, prefix, alone))


def _planned(cu_seqlens: Tensor, keys: int, prefix: int, alone: bool) -> _Plan:
    device, starts, lengths = cu_seqlens.device, cu_seqlens[:-1], cu_seqlens.diff()
    documents = torch.arange(len(lengths), device=device)
    owner = torch.repeat_interleave(documents, lengths + prefix, output_size=keys + prefix * (len(lengths) - 1))
    place = torch.arange(len(owner), device=device) - (starts + documents * prefix)[owner]
    rows = torch.where(place < prefix, place, place + starts[owner])
    ends_q, ends_k = cu_seqlens, cu_seqlens + prefix * torch.arange(len(cu_seqlens), device=device)
    longest_q, longest_k = _longest(cu_seqlens), _longest(cu_seqlens) + prefix
    if alone:
        rows = torch.cat([torch.arange(prefix, device=device), rows])
        ends_q, ends_k = (F.pad(ends + prefix, (1, 0)) for ends in (ends_q, ends_k))
        longest_q = max(longest_q, prefix)
    # Copies, of 32-bit boundaries too: see segments.kept.
    ends_q, ends_k = (ends.to(torch.int32, copy=True) for ends in (ends_q, ends_k))
    return _Plan(rows, ends_q, ends_k, longest_q, longest_k)


def _longest(cu_seqlens: Tensor) -> int:
    """Tokens of the longest document; on a GPU, waited for once a forward pass."""
    return segments.kept(cu_seqlens, "longest", lambda: int(cu_seqlens.diff().max()))


def _lone(x: Tensor, cu_seqlens: Tensor) -> bool:
    """Whether a stream is one document, with some token."""
    return len(cu_seqlens) == 2 and len(x) > 0


def _filled(heads: Tensor, width: int) -> Tensor:
    """(tokens, heads, d) -> (tokens, heads, width), zeros behind, which add nothing to a product."""
    return F.pad(heads, (0, width - heads.shape[2]))
