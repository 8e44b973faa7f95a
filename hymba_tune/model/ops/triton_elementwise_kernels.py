"""Norms, RoPE and SwiGLU in Triton, one pass over memory each; triton_elementwise.py launches the kernels.

A program of a norm holds ROWS whole rows, padded to COLS; backward, it walks over every num_programs-th group of rows
and leaves its part of the weight's gradient as one row of (programs, size). Rows of x lie x_row elements apart, rows of
what the kernels write `size`. WIDE numbers are float32, or float64 for float64 input.
"""

# Triton's language is compiled, not run: it has types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def load_rows(base, row, c, tokens, size, stride, WIDE: tl.constexpr):
    """(ROWS, COLS), widened; zeros outside."""
    inside = (row < tokens)[:, None] & (c < size)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0).to(WIDE)


@triton.jit
def store_rows(base, row, c, tokens, size, value):
    inside = (row < tokens)[:, None] & (c < size)[None, :]
    at = row.to(tl.int64)[:, None] * size + c[None, :]
    tl.store(base + at, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def inverse_rms(x, size, EPS: tl.constexpr):
    return 1 / tl.sqrt(tl.sum(x * x, 1) / size + EPS)


@triton.jit
def through_norm(grad, weight, normed, scale, c, size):
    """Gradient of x, where normed = x * scale. The weight comes from the cache each time: registers are scarce here."""
    d_normed = grad * tl.load(weight + c, mask=c < size, other=0).to(normed.dtype)[None, :]
    mean = tl.sum(d_normed * normed, 1) / size
    return (d_normed - normed * mean[:, None]) * scale[:, None]


@triton.jit
def norm(x, weight, y, scales, tokens, size, x_row, EPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    WIDE: tl.constexpr = scales.dtype.element_ty
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    value = load_rows(x, row, c, tokens, size, x_row, WIDE)
    scale = inverse_rms(value, size, EPS)
    w = tl.load(weight + c, mask=c < size, other=0).to(WIDE)
    store_rows(y, row, c, tokens, size, value * scale[:, None] * w[None, :])
    tl.store(scales + row, scale, mask=row < tokens)


@triton.jit
def norm_gradient(
    x, weight, scales, dy, dx, dweight, tokens, size, x_row, dy_row, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    WIDE: tl.constexpr = scales.dtype.element_ty
    c = tl.arange(0, COLS)
    of_weight = tl.zeros((COLS,), WIDE)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        scale = tl.load(scales + row, mask=row < tokens, other=0)
        normed = load_rows(x, row, c, tokens, size, x_row, WIDE) * scale[:, None]
        grad = load_rows(dy, row, c, tokens, size, dy_row, WIDE)
        of_weight += tl.sum(grad * normed, 0)
        store_rows(dx, row, c, tokens, size, through_norm(grad, weight, normed, scale, c, size))
    tl.store(dweight + tl.program_id(0) * size + c, of_weight, mask=c < size)


@triton.jit
def mean_of_norms(
    a, b, weight_a, weight_b, y, scales_a, scales_b, tokens, size, a_row, b_row,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = scales_a.dtype.element_ty
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    value_a, value_b = load_rows(a, row, c, tokens, size, a_row, WIDE), load_rows(b, row, c, tokens, size, b_row, WIDE)
    scale_a, scale_b = inverse_rms(value_a, size, EPS), inverse_rms(value_b, size, EPS)
    w_a = tl.load(weight_a + c, mask=c < size, other=0).to(WIDE)
    w_b = tl.load(weight_b + c, mask=c < size, other=0).to(WIDE)
    total = value_a * scale_a[:, None] * w_a[None, :] + value_b * scale_b[:, None] * w_b[None, :]
    store_rows(y, row, c, tokens, size, total * 0.5)
    tl.store(scales_a + row, scale_a, mask=row < tokens)
    tl.store(scales_b + row, scale_b, mask=row < tokens)


@triton.jit
def mean_of_norms_gradient(
    a, b, weight_a, weight_b, scales_a, scales_b, dy, da, db, dweight_a, dweight_b, tokens, size, a_row, b_row, dy_row,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = scales_a.dtype.element_ty
    c = tl.arange(0, COLS)
    of_a, of_b = tl.zeros((COLS,), WIDE), tl.zeros((COLS,), WIDE)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        scale_a = tl.load(scales_a + row, mask=row < tokens, other=0)
        scale_b = tl.load(scales_b + row, mask=row < tokens, other=0)
        grad = load_rows(dy, row, c, tokens, size, dy_row, WIDE) * 0.5
        normed_a = load_rows(a, row, c, tokens, size, a_row, WIDE) * scale_a[:, None]
        normed_b = load_rows(b, row, c, tokens, size, b_row, WIDE) * scale_b[:, None]
        of_a += tl.sum(grad * normed_a, 0)
        of_b += tl.sum(grad * normed_b, 0)
        store_rows(da, row, c, tokens, size, through_norm(grad, weight_a, normed_a, scale_a, c, size))
        store_rows(db, row, c, tokens, size, through_norm(grad, weight_b, normed_b, scale_b, c, size))
    tl.store(dweight_a + tl.program_id(0) * size + c, of_a, mask=c < size)
    tl.store(dweight_b + tl.program_id(0) * size + c, of_b, mask=c < size)


@triton.jit
def rotate(
    x, cos, sin, y, rows, x_token, x_head, SIGN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Rows are (token, head), their halves the pairs; the table (T, 2 HALF) holds each angle twice. SIGN -1: back."""
    WIDE: tl.constexpr = cos.dtype.element_ty
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)[None, :]
    token = (row // HEADS).to(tl.int64)[:, None]
    inside = (row < rows)[:, None] & (c < HALF)
    source = x + token * x_token + (row % HEADS)[:, None] * x_head + c
    first = tl.load(source, mask=inside, other=0).to(WIDE)
    second = tl.load(source + HALF, mask=inside, other=0).to(WIDE)
    cosine = tl.load(cos + token * (2 * HALF) + c, mask=inside, other=0)
    sine = tl.load(sin + token * (2 * HALF) + c, mask=inside, other=0) * SIGN
    target = y + row.to(tl.int64)[:, None] * (2 * HALF) + c
    tl.store(target, (first * cosine - second * sine).to(y.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * cosine + first * sine).to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(gate, up, y, elements, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < elements, other=0).to(WIDE)
    u = tl.load(up + i, mask=i < elements, other=0).to(WIDE)
    tl.store(y + i, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=i < elements)


@triton.jit
def swiglu_gradient(gate, up, dy, dgate, dup, elements, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < elements, other=0).to(WIDE)
    u = tl.load(up + i, mask=i < elements, other=0).to(WIDE)
    grad = tl.load(dy + i, mask=i < elements, other=0).to(WIDE)
    sigmoid = tl.sigmoid(g)
    of_gate = grad * u * sigmoid * (1 + g * (1 - sigmoid))
    tl.store(dgate + i, of_gate.to(dgate.dtype.element_ty), mask=i < elements)
    tl.store(dup + i, (grad * g * sigmoid).to(dup.dtype.element_ty), mask=i < elements)
