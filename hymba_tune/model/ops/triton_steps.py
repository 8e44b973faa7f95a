"""Decoding on a GPU: one token a row through the Triton kernels of triton_steps_kernels.py.

Signatures, shapes and semantics: reference_steps.py. Each step is bound by the memory that it reads: attention by the
K/V that a row's length and window let it see, the scan by its states. Rows times K/V heads alone are too few programs
for a large GPU where the batch is small or the context long, so the slots of each are shared out to several, and a
second kernel joins their softmaxes. Deterministic: how much is shared out depends on the shapes only. Nothing is
asked of the GPU and no kernel depends on a length, so that a CUDA graph can hold the step.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from hymba_tune.model.ops import triton_steps_kernels as kernels
from hymba_tune.model.ops.triton_scan import TERMS, rows_of

# Attention: keys of a block; enough programs to fill the GPU, none with more slots than this in a full cache.
KEYS, KEY_WARPS, KEY_STAGES = 32, 4, 3
PROGRAMS, LONGEST_PART = 528, 2048
# Parts that are joined at a time.
JOINED = 8
# Conv: channels of a program. Scan: rows and channels of one.
CONV_BLOCK = 128
SCAN_ROWS, SCAN_BLOCK, SCAN_WARPS = 1, 128, 4
# The tensor cores' smallest product.
SMALLEST = 16

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}
# Triton's interpreter multiplies the bits of bfloat16 matrices as integers.
PRODUCTS = TYPES | ({torch.bfloat16: tl.float32} if os.environ.get("TRITON_INTERPRET") == "1" else {})


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
    """Triton; see reference_steps.attention_step."""
    (rows, heads, dim), (kv_heads, value_dim) = q.shape, v.shape[1:]
    pairs, slots, wide = rows * kv_heads, cached_k.shape[2], torch.promote_types(q.dtype, torch.float32)
    splits = parts(pairs, slots)
    out = q.new_empty(rows, heads, value_dim)
    sums = peaks = totals = None
    if splits > 1:
        sums = q.new_empty(splits, rows * heads, value_dim, dtype=wide)
        peaks, totals = (q.new_empty(splits, rows * heads, dtype=wide) for _ in range(2))
    tensors = [q, k, v, meta_k, meta_v, cached_k, cached_v, lengths]
    width = max(SMALLEST, triton.next_power_of_2(value_dim))
    kernels.attend[(pairs, splits)](
        *(t.contiguous() for t in tensors), out, sums, peaks, totals, pairs, max(slots, 1), len(meta_k),
        slots if window is None else window, dim**-0.5 * math.log2(math.e), KV_HEADS=kv_heads, GROUP=heads // kv_heads,
        DIM=dim, VALUE_DIM=value_dim, SPLITS=splits, QUERIES=max(SMALLEST, triton.next_power_of_2(heads // kv_heads)),
        D=max(SMALLEST, triton.next_power_of_2(dim)), E=width, BLOCK=KEYS, PRODUCT=PRODUCTS[q.dtype],
        WIDE=TYPES[wide], num_warps=KEY_WARPS, num_stages=KEY_STAGES,
    )  # fmt: skip
    if splits > 1:
        kernels.join[(rows * heads,)](
            sums, peaks, totals, out, rows * heads, VALUE_DIM=value_dim, SPLITS=splits,
            S=triton.next_power_of_2(splits), E=width, TOGETHER=min(JOINED, triton.next_power_of_2(splits)),
            WIDE=TYPES[wide],
        )  # fmt: skip
    return out


def append_step(k: Tensor, v: Tensor, cached_k: Tensor, cached_v: Tensor, lengths: Tensor) -> None:
    """Triton; see reference_steps.append_step."""
    (rows, kv_heads, dim), value_dim, slots = k.shape, v.shape[2], cached_k.shape[2]
    kernels.append[(rows * kv_heads,)](
        k.contiguous(), v.contiguous(), _in_place(cached_k), _in_place(cached_v), lengths, slots, KV_HEADS=kv_heads,
        DIM=dim, VALUE_DIM=value_dim, SIZE=triton.next_power_of_2(max(dim, value_dim)), num_warps=1,
    )  # fmt: skip


def parts(pairs: int, slots: int) -> int:
    """Into how many programs the slots of each pair of row and K/V head go."""
    enough = min(triton.cdiv(PROGRAMS, max(pairs, 1)), triton.cdiv(slots, KEYS))
    return max(1, enough, triton.cdiv(slots, LONGEST_PART))


def conv_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """Triton; see reference_steps.conv_step."""
    (rows, channels), taps, x = x.shape, weight.shape[1], rows_of(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wide = TYPES[torch.promote_types(x.dtype, torch.float32)]
    kernels.conv[(rows, triton.cdiv(channels, CONV_BLOCK))](
        x, weight.contiguous(), bias, _in_place(state), y, channels, x.stride(0), K=taps, BLOCK=CONV_BLOCK, WIDE=wide
    )
    return y


def scan_step(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor, state: Tensor
) -> Tensor:
    """Triton; see reference_steps.scan_step."""
    (rows, channels), states, wide = x.shape, A_log.shape[1], torch.promote_types(x.dtype, torch.float32)
    x, dt, B, C, gate = (rows_of(t) for t in (x, dt, B, C, gate))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels.scan[(triton.cdiv(rows, SCAN_ROWS), triton.cdiv(channels, SCAN_BLOCK))](
        x, dt, A_log.contiguous(), B, C, D, gate, _in_place(state), y, rows, channels,
        *(t.stride(0) for t in (x, dt, B, C, gate)), STATES=states, N=triton.next_power_of_2(states), ROWS=SCAN_ROWS,
        BLOCK=SCAN_BLOCK, TERMS=TERMS[wide], WIDE=TYPES[wide], num_warps=SCAN_WARPS,
    )  # fmt: skip
    return y


def _in_place(state: Tensor) -> Tensor:
    if not state.is_contiguous():
        raise ValueError(f"a state that is changed in place must be contiguous, its strides are {state.stride()}")
    return state
