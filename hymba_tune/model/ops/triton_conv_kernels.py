"""Causal conv of reference.py (depthwise, with bias and silu) in Triton; triton_conv.py launches the kernels.

The history of a segment is its initial state (K inputs, newest last), then its inputs: token i of the segment reads
history i + 1 .. i + K. A program computes TOKENS tokens of BLOCK channels. `firsts` (T,) holds the token that the
token's segment starts with, `segments` (T,) the segment.
"""

# Triton's language is compiled, not run: it has types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def read_history(
    x, initial, segment, first, source, d, channels, x_row, initial_row, live, K: tl.constexpr, GIVEN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """(TOKENS, BLOCK): the input at token `source` of each segment; where that lies before `first`, initial state."""
    inside = live[:, None] & (d < channels)[None, :]
    own = (source >= first)[:, None]
    value = tl.load(x + source[:, None] * x_row + d[None, :], mask=inside & own, other=0).to(WIDE)
    if GIVEN:
        slot = K + source - first
        at = (segment[:, None] * initial_row * channels + d[None, :]) * K + slot[:, None]
        value += tl.load(initial + at, mask=inside & (own == 0), other=0).to(WIDE)
    return value


@triton.jit
def convolve(
    x, weight, bias, initial, segments, firsts, t, d, tokens, channels, x_row, initial_row,
    K: tl.constexpr, GIVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """bias + sum over taps, before silu."""
    live = t < tokens
    segment = tl.load(segments + t, mask=live, other=0)
    first = tl.load(firsts + t, mask=live, other=0)
    z = tl.load(bias + d, mask=d < channels, other=0)[None, :] + tl.zeros((t.shape[0], d.shape[0]), WIDE)
    for k in tl.static_range(K):
        tap = tl.load(weight + d * K + k, mask=d < channels, other=0)
        z += tap[None, :] * read_history(
            x, initial, segment, first, t - (K - 1 - k), d, channels, x_row, initial_row, live, K, GIVEN, WIDE
        )
    return z


@triton.jit
def forward(
    x, weight, bias, initial, segments, firsts, y, tokens, channels, x_row, initial_row,
    K: tl.constexpr, GIVEN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = weight.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = convolve(x, weight, bias, initial, segments, firsts, t, d, tokens, channels, x_row, initial_row, K, GIVEN, WIDE)
    inside = (t < tokens)[:, None] & (d < channels)[None, :]
    tl.store(y + t[:, None] * channels + d[None, :], (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def before_silu(
    x, weight, bias, initial, segments, firsts, dy, dz, dweight, dbias, tokens, channels, x_row, initial_row,
    K: tl.constexpr, GIVEN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of what silu reads, (T, channels), and partial sums, one a program: dweight (programs, channels, K)."""
    WIDE: tl.constexpr = weight.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    t = program * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = t < tokens
    z = convolve(x, weight, bias, initial, segments, firsts, t, d, tokens, channels, x_row, initial_row, K, GIVEN, WIDE)
    inside = live[:, None] & (d < channels)[None, :]
    sigmoid = tl.sigmoid(z)
    at = t[:, None] * channels + d[None, :]
    grad = tl.load(dy + at, mask=inside, other=0).to(WIDE) * sigmoid * (1 + z * (1 - sigmoid))
    tl.store(dz + at, grad, mask=inside)
    grad = tl.where(inside, grad, 0.0)
    tl.store(dbias + program * channels + d, tl.sum(grad, 0), mask=d < channels)
    segment = tl.load(segments + t, mask=live, other=0)
    first = tl.load(firsts + t, mask=live, other=0)
    for k in tl.static_range(K):
        value = read_history(
            x, initial, segment, first, t - (K - 1 - k), d, channels, x_row, initial_row, live, K, GIVEN, WIDE
        )
        tl.store(dweight + (program * channels + d) * K + k, tl.sum(grad * value, 0), mask=d < channels)


@triton.jit
def history_gradient(dz, dfinal, weight, segment, start, length, j, d, channels, live, K: tl.constexpr):
    """Gradient of history j of a segment: of the tokens that read it, and of the final state that holds it."""
    inside = live[:, None] & (d < channels)[None, :]
    slot = j - length
    held = inside & ((slot >= 0) & (slot < K))[:, None]
    grad = tl.load(dfinal + (segment[:, None] * channels + d[None, :]) * K + slot[:, None], mask=held, other=0)
    grad = grad.to(dz.dtype.element_ty)
    for k in tl.static_range(K):
        reader = j - 1 - k
        reads = inside & ((reader >= 0) & (reader < length))[:, None]
        tap = tl.load(weight + d * K + k, mask=d < channels, other=0)
        at = (start + reader)[:, None] * channels + d[None, :]
        grad += tap[None, :] * tl.load(dz + at, mask=reads, other=0)
    return grad


@triton.jit
def inputs_gradient(
    dz, dfinal, weight, segments, cu_seqlens, dx, tokens, channels,
    K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = t < tokens
    segment = tl.load(segments + t, mask=live, other=0)
    start = tl.load(cu_seqlens + segment, mask=live, other=0)
    length = tl.load(cu_seqlens + segment + 1, mask=live, other=0) - start
    grad = history_gradient(dz, dfinal, weight, segment, start, length, K + t - start, d, channels, live, K)
    inside = live[:, None] & (d < channels)[None, :]
    tl.store(dx + t[:, None] * channels + d[None, :], grad.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def initial_gradient(
    dz, dfinal, weight, cu_seqlens, dinitial, segments_in_all, channels,
    K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dinitial (S, channels, K), one entry a segment also where they share a state."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    segment, j = row // K, row % K
    live = segment < segments_in_all
    start = tl.load(cu_seqlens + segment, mask=live, other=0)
    length = tl.load(cu_seqlens + segment + 1, mask=live, other=0) - start
    grad = history_gradient(dz, dfinal, weight, segment, start, length, j, d, channels, live, K)
    inside = live[:, None] & (d < channels)[None, :]
    tl.store(dinitial + (segment[:, None] * channels + d[None, :]) * K + j[:, None], grad, mask=inside)


@triton.jit
def final_states(
    x, initial, cu_seqlens, final, segments_in_all, channels, x_row, initial_row,
    K: tl.constexpr, GIVEN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last K of each segment's history, (S, channels, K)."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    segment, slot = row // K, row % K
    live = segment < segments_in_all
    start = tl.load(cu_seqlens + segment, mask=live, other=0)
    stop = tl.load(cu_seqlens + segment + 1, mask=live, other=0)
    TYPE: tl.constexpr = final.dtype.element_ty
    value = read_history(
        x, initial, segment, start, stop - K + slot, d, channels, x_row, initial_row, live, K, GIVEN, TYPE
    )
    inside = live[:, None] & (d < channels)[None, :]
    tl.store(final + (segment[:, None] * channels + d[None, :]) * K + slot[:, None], value, mask=inside)
