"""Decoding on the CPU: attention of one token a row by the compiled kernel of cpu_kernels/steps.h.

Signatures, shapes and semantics: reference_steps.py. Only what a row sees of its cache is read, once.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from hymba_tune.model.ops import cpu_library, reference_steps
from hymba_tune.model.ops.reference_steps import append_step, conv_step, scan_step

__all__ = ["append_step", "attention_step", "conv_step", "scan_step"]

_SIZES = "threads rows heads group meta slots size value_size window"
_TENSORS = "lengths q k v meta_k meta_v cached_k cached_v out"


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES.split()),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _TENSORS.split()),
    )


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
    """Compiled where all tensors are of one type that the kernels know; see reference_steps.attention_step."""
    tensors = (q, k, v, meta_k, meta_v, cached_k, cached_v)
    if q.dtype not in (torch.float32, torch.float64, torch.bfloat16) or any(t.dtype != q.dtype for t in tensors):
        return reference_steps.attention_step(*tensors, lengths, window)
    (rows, heads, size), (_, kv_heads, value_size), slots = q.shape, v.shape, cached_k.shape[2]
    out = q.new_empty(rows, heads, value_size)
    inputs = [t.contiguous() for t in (lengths.long(), *tensors)]
    sizes = (rows, kv_heads, heads // kv_heads, len(meta_k), slots, size, value_size)
    seen = slots if window is None else max(0, window)
    scale = size**-0.5 * math.log2(math.e)
    pointers = (t.data_ptr() for t in (*inputs, out))
    step = _Step(torch.get_num_threads(), *sizes, seen, scale, *pointers)
    cpu_library.kernel("attention_step", q.dtype)(ctypes.byref(step))
    return out
