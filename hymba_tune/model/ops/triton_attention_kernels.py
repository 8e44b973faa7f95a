"""Attention of reference.py over a stream, forward and backward, in Triton; triton_attention.py launches the kernels.

Key j has place j, query i place i + `offset`. A query sees a key that is not behind it and whose `lasts` reaches it:
j <= place <= lasts[j]. The keys that a query sees are the `prefix` and one range that starts at its `firsts`; neither
end of the range ever decreases, so a block of queries sees the prefix and one range of keys, in whose middle part all
its queries see all keys: no mask is computed there. A block of keys is seen by one range of queries in the same way.

Softmax is computed by powers of two, in WIDE numbers: float32. `lse` (H, Q) is the logarithm of its denominator, in the
same base.
"""

# Triton's language is compiled, not run: it has types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def rows_at(base, start, n, stride, c):
    """Pointers to rows start + n; so many rows may there be that only their start needs 64 bits."""
    return base + tl.cast(start, tl.int64) * stride + n[:, None] * stride + c[None, :]


@triton.jit
def inside(start, n, stop, c, COLUMNS: tl.constexpr):
    live = (start + n < stop)[:, None]
    return live if c.shape[0] == COLUMNS else live & (c < COLUMNS)[None, :]


@triton.jit
def load_rows(base, start, n, stop, stride, c, COLUMNS: tl.constexpr):
    """(rows, columns) of a row-major array of COLUMNS columns; zeros from row `stop` on."""
    return tl.load(rows_at(base, start, n, stride, c), mask=inside(start, n, stop, c, COLUMNS), other=0)


@triton.jit
def store_rows(base, start, n, stop, stride, c, value, COLUMNS: tl.constexpr):
    at = rows_at(base, start, n, stride, c)
    tl.store(at, value.to(base.dtype.element_ty), mask=inside(start, n, stop, c, COLUMNS))


@triton.jit
def product(a, b, sum, PRODUCT: tl.constexpr):
    """sum + a @ b."""
    return tl.dot(a.to(PRODUCT), b.to(PRODUCT), sum, input_precision="ieee", out_dtype=sum.dtype)


@triton.jit
def middle(start, stop, full_start, full_stop, SIZE: tl.constexpr):
    """Blocks of SIZE from start to stop -> where the first block of the part full_start .. full_stop starts, and the
    place behind the last whole one."""
    begin = tl.minimum(start + tl.cdiv(tl.maximum(full_start - start, 0), SIZE) * SIZE, stop)
    return begin, begin + tl.maximum(full_stop - begin, 0) // SIZE * SIZE


@triton.jit
def keys_of(firsts, block, queries, prefix, offset, ROWS: tl.constexpr, COLS: tl.constexpr):
    """What a block of queries sees: (stop of the prefix, start, begin of the full part, its end, stop)."""
    first, last = block * ROWS, tl.minimum(block * ROWS + ROWS, queries) - 1
    start, stop = tl.load(firsts + first), last + offset + 1
    begin, end = middle(start, stop, tl.load(firsts + last), first + offset + 1, COLS)
    return tl.where(first + offset >= prefix, prefix, 0), start, begin, end, stop


@triton.jit
def scores_of(query, key, j, place, lasts, stop, scale, MASKED: tl.constexpr, PRODUCT: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    """(queries, keys), in powers of two."""
    scores = product(query, tl.trans(key), tl.zeros((query.shape[0], key.shape[0]), WIDE), PRODUCT) * scale
    if MASKED:
        last = tl.load(lasts + j, mask=j < stop, other=-1)
        seen = (j[None, :] <= place[:, None]) & (place[:, None] <= last[None, :])
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def take_in(
    query, k, v, lasts, start, stop, place, peak, total, sums, scale, k_row, v_row,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr, E: tl.constexpr, COLS: tl.constexpr,
    MASKED: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Keys start .. stop into the running softmax: its largest score, sum of weights, sum of values."""
    WIDE: tl.constexpr = sums.dtype
    n, d, e = tl.arange(0, COLS), tl.arange(0, D), tl.arange(0, E)
    for at in range(start, stop, COLS):
        j = at + n
        key = load_rows(k, at, n, stop, k_row, d, DIM)
        scores = scores_of(query, key, j, place, lasts, stop, scale, MASKED, PRODUCT, WIDE)
        highest = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
        weights, fading = tl.exp2(scores - shift[:, None]), tl.exp2(peak - shift)
        total = total * fading + tl.sum(weights, 1)
        value = load_rows(v, at, n, stop, v_row, e, VALUE_DIM)
        sums = product(weights.to(value.dtype), value, sums * fading[:, None], PRODUCT)
        peak = highest
    return peak, total, sums


@triton.jit
def attention_forward(
    q, k, v, firsts, lasts, out, lse, queries, prefix, offset, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PRODUCT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # The last blocks see most where nothing is windowed: they start first.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    at, n, d, e = block * ROWS, tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, E)
    i = at + n
    live, place = i < queries, i + offset
    k_row, v_row = HEADS // GROUP * DIM, HEADS // GROUP * VALUE_DIM
    k += head // GROUP * DIM
    v += head // GROUP * VALUE_DIM
    query = load_rows(q + head * DIM, at, n, queries, HEADS * DIM, d, DIM)
    peak = tl.full((ROWS,), float("-inf"), WIDE)
    total, sums = tl.zeros((ROWS,), WIDE), tl.zeros((ROWS, E), WIDE)
    before, start, begin, end, stop = keys_of(firsts, block, queries, prefix, offset, ROWS, COLS)
    peak, total, sums = take_in(query, k, v, lasts, 0, before, place, peak, total, sums, scale, k_row, v_row,
                                DIM, VALUE_DIM, D, E, COLS, True, PRODUCT)  # fmt: skip
    peak, total, sums = take_in(query, k, v, lasts, start, begin, place, peak, total, sums, scale, k_row, v_row,
                                DIM, VALUE_DIM, D, E, COLS, True, PRODUCT)  # fmt: skip
    peak, total, sums = take_in(query, k, v, lasts, begin, end, place, peak, total, sums, scale, k_row, v_row,
                                DIM, VALUE_DIM, D, E, COLS, False, PRODUCT)  # fmt: skip
    peak, total, sums = take_in(query, k, v, lasts, end, stop, place, peak, total, sums, scale, k_row, v_row,
                                DIM, VALUE_DIM, D, E, COLS, True, PRODUCT)  # fmt: skip
    store_rows(out + head * VALUE_DIM, at, n, queries, HEADS * VALUE_DIM, e, sums / total[:, None], VALUE_DIM)
    tl.store(lse + head * queries + i, peak + tl.log2(total), mask=live)


@triton.jit
def add_query_gradient(
    query, grad, k, v, lasts, start, stop, place, denominator, delta, dquery, scale, k_row, v_row,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr, E: tl.constexpr, COLS: tl.constexpr,
    MASKED: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """What keys start .. stop add to the gradient of the queries, without the scale."""
    WIDE: tl.constexpr = dquery.dtype
    n, d, e = tl.arange(0, COLS), tl.arange(0, D), tl.arange(0, E)
    for at in range(start, stop, COLS):
        j = at + n
        key = load_rows(k, at, n, stop, k_row, d, DIM)
        value = load_rows(v, at, n, stop, v_row, e, VALUE_DIM)
        scores = scores_of(query, key, j, place, lasts, stop, scale, MASKED, PRODUCT, WIDE)
        weights = tl.exp2(scores - denominator[:, None])
        dweights = product(grad, tl.trans(value), tl.zeros((grad.shape[0], COLS), WIDE), PRODUCT)
        dscores = weights * (dweights - delta[:, None])
        dquery = product(dscores.to(key.dtype), key, dquery, PRODUCT)
    return dquery


@triton.jit
def attention_query_gradient(
    q, k, v, firsts, lasts, out, lse, dout, dq, deltas, queries, prefix, offset, scale, unit,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PRODUCT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq, and `deltas` (H, Q) for `attention_key_gradients`: the products of each output and its gradient."""
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    at, n, d, e = block * ROWS, tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, E)
    i = at + n
    live, place = i < queries, i + offset
    k_row, v_row = HEADS // GROUP * DIM, HEADS // GROUP * VALUE_DIM
    k += head // GROUP * DIM
    v += head // GROUP * VALUE_DIM
    query = load_rows(q + head * DIM, at, n, queries, HEADS * DIM, d, DIM)
    grad = load_rows(dout + head * VALUE_DIM, at, n, queries, HEADS * VALUE_DIM, e, VALUE_DIM)
    output = load_rows(out + head * VALUE_DIM, at, n, queries, HEADS * VALUE_DIM, e, VALUE_DIM)
    delta = tl.sum(grad.to(WIDE) * output.to(WIDE), 1)
    tl.store(deltas + head * queries + i, delta, mask=live)
    denominator = tl.load(lse + head * queries + i, mask=live, other=0)
    dquery = tl.zeros((ROWS, D), WIDE)
    before, start, begin, end, stop = keys_of(firsts, block, queries, prefix, offset, ROWS, COLS)
    dquery = add_query_gradient(query, grad, k, v, lasts, 0, before, place, denominator, delta, dquery, scale,
                                k_row, v_row, DIM, VALUE_DIM, D, E, COLS, True, PRODUCT)  # fmt: skip
    dquery = add_query_gradient(query, grad, k, v, lasts, start, begin, place, denominator, delta, dquery, scale,
                                k_row, v_row, DIM, VALUE_DIM, D, E, COLS, True, PRODUCT)  # fmt: skip
    dquery = add_query_gradient(query, grad, k, v, lasts, begin, end, place, denominator, delta, dquery, scale,
                                k_row, v_row, DIM, VALUE_DIM, D, E, COLS, False, PRODUCT)  # fmt: skip
    dquery = add_query_gradient(query, grad, k, v, lasts, end, stop, place, denominator, delta, dquery, scale,
                                k_row, v_row, DIM, VALUE_DIM, D, E, COLS, True, PRODUCT)  # fmt: skip
    store_rows(dq + head * DIM, at, n, queries, HEADS * DIM, d, dquery * unit, DIM)


@triton.jit
def add_key_gradients(
    q, dout, lse, deltas, key, value, j, last, start, stop, offset, dkey, dvalue, scale, q_row, dout_row,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """What queries start .. stop of one head add to the gradients of the keys, without the scale, and of the values."""
    WIDE: tl.constexpr = dkey.dtype
    n, d, e = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, E)
    for at in range(start, stop, ROWS):
        i = at + n
        query = load_rows(q, at, n, stop, q_row, d, DIM)
        grad = load_rows(dout, at, n, stop, dout_row, e, VALUE_DIM)
        # Queries that are not there are far from every key.
        denominator = tl.load(lse + i, mask=i < stop, other=float("inf"))
        delta = tl.load(deltas + i, mask=i < stop, other=0)
        scores = product(key, tl.trans(query), tl.zeros((key.shape[0], ROWS), WIDE), PRODUCT) * scale
        weights = tl.exp2(scores - denominator[None, :])
        if MASKED:
            place = (i + offset)[None, :]
            weights = tl.where((j[:, None] <= place) & (place <= last[:, None]), weights, 0.0)
        dvalue = product(weights.to(grad.dtype), grad, dvalue, PRODUCT)
        dweights = product(value, tl.trans(grad), tl.zeros((value.shape[0], ROWS), WIDE), PRODUCT)
        dscores = weights * (dweights - delta[None, :])
        dkey = product(dscores.to(query.dtype), query, dkey, PRODUCT)
    return dkey, dvalue


@triton.jit
def attention_key_gradients(
    q, k, v, lasts, lse, dout, deltas, dk, dv, dk_parts, dv_parts, queries, keys, prefix, offset, scale, unit,
    prefix_programs, PARTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, D: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PRODUCT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv of COLS keys from all queries that see them; of the prefix from one of PARTS equal parts of them.

    The parts go to dk_parts (PARTS, P, Hkv, d) and dv_parts: all queries would be too many for one program.
    """
    program, kv_head = tl.program_id(0), tl.program_id(1)
    KV_HEADS: tl.constexpr = HEADS // GROUP
    in_prefix = program < prefix_programs
    first = tl.where(in_prefix, program // PARTS * COLS, prefix + (program - prefix_programs) * COLS)
    behind = tl.minimum(first + COLS, tl.where(in_prefix, prefix, keys))
    n, d, e = tl.arange(0, COLS), tl.arange(0, D), tl.arange(0, E)
    j = first + n
    key = load_rows(k + kv_head * DIM, first, n, behind, KV_HEADS * DIM, d, DIM)
    value = load_rows(v + kv_head * VALUE_DIM, first, n, behind, KV_HEADS * VALUE_DIM, e, VALUE_DIM)
    last = tl.load(lasts + j, mask=j < behind, other=-1)

    start = tl.maximum(first - offset, 0)
    stop = tl.load(lasts + behind - 1) - offset + 1
    size = tl.where(in_prefix, tl.cdiv(tl.cdiv(stop - start, PARTS), ROWS) * ROWS, stop - start)
    start += tl.where(in_prefix, program % PARTS * size, 0)
    stop = tl.minimum(stop, start + size)
    begin, end = middle(start, stop, behind - 1 - offset, tl.load(lasts + first) - offset + 1, ROWS)
    # The last part may be short or empty, and then so is what lies between.
    begin, end = tl.minimum(begin, stop), tl.minimum(end, begin + tl.maximum(stop - begin, 0) // ROWS * ROWS)

    dkey, dvalue = tl.zeros((COLS, D), WIDE), tl.zeros((COLS, E), WIDE)
    for g in range(GROUP):
        head = kv_head * GROUP + g
        of_q, of_dout = q + head * DIM, dout + head * VALUE_DIM
        of_lse, of_deltas = lse + head * queries, deltas + head * queries
        dkey, dvalue = add_key_gradients(
            of_q, of_dout, of_lse, of_deltas, key, value, j, last, start, begin, offset, dkey, dvalue, scale,
            HEADS * DIM, HEADS * VALUE_DIM, DIM, VALUE_DIM, D, E, ROWS, True, PRODUCT)  # fmt: skip
        dkey, dvalue = add_key_gradients(
            of_q, of_dout, of_lse, of_deltas, key, value, j, last, begin, end, offset, dkey, dvalue, scale,
            HEADS * DIM, HEADS * VALUE_DIM, DIM, VALUE_DIM, D, E, ROWS, False, PRODUCT)  # fmt: skip
        dkey, dvalue = add_key_gradients(
            of_q, of_dout, of_lse, of_deltas, key, value, j, last, end, stop, offset, dkey, dvalue, scale,
            HEADS * DIM, HEADS * VALUE_DIM, DIM, VALUE_DIM, D, E, ROWS, True, PRODUCT)  # fmt: skip
    dkey *= unit
    if in_prefix:
        dk_parts += program % PARTS * prefix * KV_HEADS * DIM
        dv_parts += program % PARTS * prefix * KV_HEADS * VALUE_DIM
        store_rows(dk_parts + kv_head * DIM, first, n, behind, KV_HEADS * DIM, d, dkey, DIM)
        store_rows(dv_parts + kv_head * VALUE_DIM, first, n, behind, KV_HEADS * VALUE_DIM, e, dvalue, VALUE_DIM)
    else:
        store_rows(dk + kv_head * DIM, first, n, behind, KV_HEADS * DIM, d, dkey, DIM)
        store_rows(dv + kv_head * VALUE_DIM, first, n, behind, KV_HEADS * VALUE_DIM, e, dvalue, VALUE_DIM)


@triton.jit
def attention_parts(dk_parts, dv_parts, dk, dv, dk_size, dv_size, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """The prefix's gradients: dk_size and dv_size numbers, the same in each of PARTS parts."""
    n = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    dkey, dvalue = tl.zeros((SIZE,), dk_parts.dtype.element_ty), tl.zeros((SIZE,), dv_parts.dtype.element_ty)
    for part in range(PARTS):
        dkey += tl.load(dk_parts + part * dk_size + n, mask=n < dk_size, other=0)
        dvalue += tl.load(dv_parts + part * dv_size + n, mask=n < dv_size, other=0)
    tl.store(dk + n, dkey.to(dk.dtype.element_ty), mask=n < dk_size)
    tl.store(dv + n, dvalue.to(dv.dtype.element_ty), mask=n < dv_size)
