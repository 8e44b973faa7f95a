"""Decoding on the CPU: one token a row through the compiled kernels of attention_step.h and state_steps.h.

Signatures, shapes and semantics: reference_steps.py, which also computes what is of a type without kernels. Attention
reads what a row sees of its cache, once. States cost no copy where they are as the prefill leaves them, (R, Dn, n)
views of (R, n, Dn) memory.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hymba_tune.model.ops import reference_steps
from hymba_tune.model.ops.cpu_library import io_dtype, kernel, rows_of, structure

_SIZES = "threads rows heads group meta slots size value_size window"
_Step = structure(f"{_SIZES} scale lengths q k v meta_k meta_v cached_k cached_v out", _SIZES, "scale")
_SIZES = "threads rows channels states x_stride gate_stride dt_stride"
_Scan = structure(f"{_SIZES} x gate dt A_log B C D state y", _SIZES)
_SIZES = "threads rows channels taps x_stride"
_Conv = structure(f"{_SIZES} x weight bias state y", _SIZES)


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
    """Compiled; see reference_steps.attention_step."""
    tensors = (q, k, v, meta_k, meta_v, cached_k, cached_v)
    if not _compiled(q.dtype, *tensors):
        return reference_steps.attention_step(*tensors, lengths, window)
    (rows, heads, size), (_, kv_heads, value_size), slots = q.shape, v.shape, cached_k.shape[2]
    out = q.new_empty(rows, heads, value_size)
    sizes = (rows, kv_heads, heads // kv_heads, len(meta_k), slots, size, value_size)
    seen, scale = slots if window is None else max(0, window), size**-0.5 * math.log2(math.e)
    inputs = [t.contiguous() for t in (lengths.long(), *tensors)]
    _run("attention_step", q.dtype, _Step, (*sizes, seen, scale), *inputs, out)
    return out


def append_step(k: Tensor, v: Tensor, cached_k: Tensor, cached_v: Tensor, lengths: Tensor) -> None:
    """Compiled; see reference_steps.append_step."""
    caches = (cached_k, cached_v)
    if not (_compiled(k.dtype, k, v, *caches) and all(cache.is_contiguous() for cache in caches)):
        reference_steps.append_step(k, v, *caches, lengths)
        return
    (rows, heads, size), slots, value_size = k.shape, cached_k.shape[2], v.shape[2]
    lengths, k, v = lengths.long().contiguous(), k.contiguous(), v.contiguous()
    sizes = (rows, heads, 1, 0, slots, size, value_size, 0, 0.0)
    _run("append_step", k.dtype, _Step, sizes, lengths, None, k, v, None, None, *caches, None)
    increment_version(caches)


def conv_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """Compiled; see reference_steps.conv_step."""
    if not _compiled(x.dtype, x, state):
        return reference_steps.conv_step(x, weight, bias, state)
    (rows, channels), taps, wide = x.shape, weight.shape[1], torch.promote_types(x.dtype, torch.float32)
    x, weight, bias, y = rows_of(x), weight.to(wide).contiguous(), bias.to(wide).contiguous(), x.new_empty(x.shape)
    with _transposed(state) as memory:
        _run("conv_step", x.dtype, _Conv, (rows, channels, taps, x.stride(0)), x, weight, bias, memory, y)
    return y


def scan_step(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor, state: Tensor
) -> Tensor:
    """Compiled; see reference_steps.scan_step."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not (_compiled(x.dtype, x, gate) and _compiled(wide, state)):
        return reference_steps.scan_step(x, dt, A_log, B, C, D, gate, state)
    x, dt, gate, y = rows_of(x), rows_of(dt.to(wide)), rows_of(gate), x.new_empty(x.shape)
    selected = [t.to(wide).contiguous() for t in (A_log, B, C, D)]
    sizes = (*x.shape, A_log.shape[1], x.stride(0), gate.stride(0), dt.stride(0))
    with _transposed(state) as memory:
        _run("scan_step", x.dtype, _Scan, sizes, x, gate, dt, *selected, memory, y)
    return y


def _compiled(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether the kernels know the type, and all tensors are of it."""
    return io_dtype(dtype) == dtype and all(t.dtype == dtype for t in tensors)


def _run(
    name: str,
    dtype: torch.dtype,
    kind: type[ctypes.Structure],
    numbers: tuple[float, ...],
    *tensors: Tensor | None,
) -> None:
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    kernel(name, dtype)(ctypes.byref(kind(torch.get_num_threads(), *numbers, *pointers)))


@contextmanager
def _transposed(state: Tensor) -> Iterator[Tensor]:
    """A state (R, Dn, n) as memory (R, n, Dn), which the block changes."""
    lying = state.transpose(1, 2)
    memory = lying.contiguous()
    yield memory
    if memory is lying:
        increment_version(state)
    else:
        lying.copy_(memory)
