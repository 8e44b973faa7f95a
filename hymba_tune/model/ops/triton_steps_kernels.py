"""Decoding steps of reference_steps.py in Triton: the kernels that triton_steps.py launches and explains.

A K/V pair is one K/V head of one row: pair = row * KV_HEADS + head, and its GROUP query heads are computed together.
WIDE numbers (scores, sums, states) are float32, or float64 for float64 input.
"""

# Triton's language is compiled, not run: it has types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl

from hymba_tune.model.ops.triton_scan_kernels import softplus

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(base, i, c, inside, COLUMNS: tl.constexpr):
    """(rows, columns) of a row-major array of COLUMNS columns; zeros outside."""
    live = inside[:, None]
    if c.shape[0] != COLUMNS:
        live = live & (c < COLUMNS)[None, :]
    return tl.load(base + i[:, None] * COLUMNS + c[None, :], mask=live, other=0)


@triton.jit
def take_in(query, keys, values, visible, peak, total, sums, scale, PRODUCT: tl.constexpr):
    """A block of keys into the running softmax of (queries,): its largest score, the sum of weights, that of values."""
    WIDE: tl.constexpr = sums.dtype
    scores = tl.dot(query, tl.trans(keys.to(PRODUCT)), input_precision="ieee", out_dtype=WIDE) * scale
    scores = tl.where(visible[None, :], scores, float("-inf"))
    highest = tl.maximum(peak, tl.max(scores, 1))
    shift = tl.where(highest == float("-inf"), 0.0, highest)  # nothing visible so far
    weights, fading = tl.exp2(scores - shift[:, None]), tl.exp2(peak - shift)
    total = total * fading + tl.sum(weights, 1)
    rounded = weights.to(values.dtype).to(PRODUCT)
    sums = tl.dot(rounded, values.to(PRODUCT), sums * fading[:, None], input_precision="ieee", out_dtype=WIDE)
    return highest, total, sums


@triton.jit
def attend(
    q, k, v, meta_k, meta_v, cached_k, cached_v, lengths, out, sums_out, peaks_out, totals_out,
    pairs, slots, meta, window, scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, SPLITS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, PRODUCT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A pair's queries over one of SPLITS equal parts of the slots that they see; part 0 has meta tokens and self too.

    Writes the output where there is one part, else what `join` needs. `scale` turns products into powers of two.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = pair % KV_HEADS
    g, d, e, n = tl.arange(0, QUERIES), tl.arange(0, D), tl.arange(0, E), tl.arange(0, BLOCK)
    at = pair * GROUP + g
    query = load_rows(q, at, d, g < GROUP, DIM)

    own_key = tl.load(k + pair * DIM + d, mask=d < DIM, other=0).to(WIDE)
    own_value = tl.load(v + pair * VALUE_DIM + e, mask=e < VALUE_DIM, other=0).to(WIDE)
    first = split == 0
    peak = tl.where(first, tl.sum(query.to(WIDE) * own_key[None, :], 1) * scale, float("-inf"))
    total = tl.where(first, 1.0, 0.0).to(WIDE) + tl.zeros((QUERIES,), WIDE)
    sums = tl.where(first, own_value[None, :], 0.0) + tl.zeros((QUERIES, E), WIDE)
    query = query.to(PRODUCT)

    for start in range(0, tl.where(first, meta, 0), BLOCK):
        i = start + n
        keys = load_rows(meta_k + head * DIM, i * KV_HEADS, d, i < meta, DIM)
        values = load_rows(meta_v + head * VALUE_DIM, i * KV_HEADS, e, i < meta, VALUE_DIM)
        peak, total, sums = take_in(query, keys, values, i < meta, peak, total, sums, scale, PRODUCT)

    # Slots hold the last `slots` positions in a ring; `age` is how many tokens lie between a slot's and the new one.
    length = tl.load(lengths + pair // KV_HEADS).to(tl.int32)
    newest, reach = (length - 1) % slots, tl.minimum(length, window)
    stop = tl.minimum(length, slots)
    begin = tl.where(length <= slots, tl.maximum(length - window, 0), 0)
    part = tl.cdiv(tl.cdiv(stop - begin, SPLITS), BLOCK) * BLOCK
    begin = begin + split * part
    stop = tl.minimum(stop, begin + part)
    pair_k, pair_v = cached_k + pair * slots * DIM, cached_v + pair * slots * VALUE_DIM
    for start in range(begin, stop, BLOCK):
        i = start + n
        age = newest - i
        age = tl.where(age < 0, age + slots, age)
        keys = load_rows(pair_k, i, d, i < stop, DIM)
        values = load_rows(pair_v, i, e, i < stop, VALUE_DIM)
        visible = (i < stop) & (age < reach)
        peak, total, sums = take_in(query, keys, values, visible, peak, total, sums, scale, PRODUCT)

    inside = (g < GROUP)[:, None] & (e < VALUE_DIM)[None, :]
    if SPLITS == 1:
        tl.store(out + at[:, None] * VALUE_DIM + e[None, :], (sums / total[:, None]).to(out.dtype.element_ty), inside)
    else:
        at += split * pairs * GROUP
        tl.store(sums_out + at[:, None] * VALUE_DIM + e[None, :], sums, inside)
        tl.store(peaks_out + at, peak, g < GROUP)
        tl.store(totals_out + at, total, g < GROUP)


@triton.jit
def join(
    sums, peaks, totals, out, queries, VALUE_DIM: tl.constexpr, SPLITS: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    TOGETHER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The softmax over all parts of the slots, for one query, TOGETHER parts at a time."""
    query = tl.program_id(0).to(tl.int64)
    every, few, e = tl.arange(0, S), tl.arange(0, TOGETHER), tl.arange(0, E)
    peak = tl.max(tl.load(peaks + every * queries + query, mask=every < SPLITS, other=float("-inf")), 0)
    share_of_all, joined = tl.zeros((TOGETHER,), WIDE), tl.zeros((TOGETHER, E), WIDE)
    for start in range(0, SPLITS, TOGETHER):
        s = start + few
        at = s * queries + query
        share = tl.exp2(tl.load(peaks + at, mask=s < SPLITS, other=float("-inf")) - peak)
        share_of_all += share * tl.load(totals + at, mask=s < SPLITS, other=0)
        inside = (s < SPLITS)[:, None] & (e < VALUE_DIM)[None, :]
        joined += share[:, None] * tl.load(sums + at[:, None] * VALUE_DIM + e[None, :], mask=inside, other=0)
    value = tl.sum(joined, 0) / tl.sum(share_of_all, 0)
    tl.store(out + query * VALUE_DIM + e, value.to(out.dtype.element_ty), mask=e < VALUE_DIM)


@triton.jit
def append(
    k, v, cached_k, cached_v, lengths, slots, KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """A pair's new key and value into its slot."""
    pair, n = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    at = pair * slots + tl.load(lengths + pair // KV_HEADS) % slots
    key = tl.load(k + pair * DIM + n, mask=n < DIM)
    value = tl.load(v + pair * VALUE_DIM + n, mask=n < VALUE_DIM)
    tl.store(cached_k + at * DIM + n, key.to(cached_k.dtype.element_ty), mask=n < DIM)
    tl.store(cached_v + at * VALUE_DIM + n, value.to(cached_v.dtype.element_ty), mask=n < VALUE_DIM)


@triton.jit
def conv(x, weight, bias, state, y, channels, x_row, K: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """One row's token: push x into the state, then bias + sum over taps, silu."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < channels
    own = state + (row * channels + d) * K
    newest = tl.load(x + row * x_row + d, mask=inside, other=0)
    z = tl.load(bias + d, mask=inside, other=0).to(WIDE)
    z += tl.load(weight + d * K + K - 1, mask=inside, other=0).to(WIDE) * newest.to(WIDE)
    kept = ()
    for i in tl.static_range(K - 1):
        value = tl.load(own + i + 1, mask=inside, other=0)
        z += tl.load(weight + d * K + i, mask=inside, other=0).to(WIDE) * value.to(WIDE)
        kept = kept + (value,)
    tl.debug_barrier()  # a slot is written only after every thread has read its own
    for i in tl.static_range(K - 1):
        tl.store(own + i, kept[i], mask=inside)
    tl.store(own + K - 1, newest, mask=inside)
    tl.store(y + row * channels + d, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def scan(
    x, dt, A_log, B, C, D, gate, state, y, rows, channels, x_row, dt_row, B_row, C_row, gate_row,
    STATES: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TERMS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The next state and output of BLOCK channels in ROWS rows."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    live, channel = (r < rows)[:, None], (d < channels)[None, :]
    inside, of_state = live & channel, live & (n < STATES)[None, :]
    held = inside[:, :, None] & (n < STATES)[None, None, :]
    at = ((r[:, None] * channels + d[None, :]) * STATES)[:, :, None] + n[None, None, :]
    h = tl.load(state + at, mask=held, other=0)
    rate = tl.load(A_log + d[:, None] * STATES + n[None, :], (d < channels)[:, None] & (n < STATES)[None, :], other=0)
    rate = tl.exp2(rate.to(WIDE) * LOG2E) * -LOG2E
    delta = softplus(tl.load(dt + r[:, None] * dt_row + d[None, :], mask=inside, other=0).to(WIDE), TERMS)
    u = tl.load(x + r[:, None] * x_row + d[None, :], mask=inside, other=0).to(WIDE)
    z = tl.load(gate + r[:, None] * gate_row + d[None, :], mask=inside, other=0).to(WIDE)
    b = tl.load(B + r[:, None] * B_row + n[None, :], mask=of_state, other=0).to(WIDE)
    c = tl.load(C + r[:, None] * C_row + n[None, :], mask=of_state, other=0).to(WIDE)
    h = tl.exp2(delta[:, :, None] * rate[None, :, :]) * h + (delta * u)[:, :, None] * b[:, None, :]
    tl.store(state + at, h, mask=held)
    skip = tl.load(D + d, mask=d < channels, other=0).to(WIDE)
    out = (tl.sum(h * c[:, None, :], 2) + skip[None, :] * u) * z * tl.sigmoid(z)
    tl.store(y + r[:, None] * channels + d[None, :], out.to(y.dtype.element_ty), mask=inside)
