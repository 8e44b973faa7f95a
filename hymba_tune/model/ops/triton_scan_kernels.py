"""Selective scan of reference.py in Triton: the kernels that triton_scan.py launches and explains.

A program computes BLOCK channels, with all N states of each (padded to a power of two), over one chunk of CHUNK tokens.
Tokens carry marks, segment * 4 + 2 (the segment's last) + 1 (its first). A state (BLOCK, N) lies at [.., channel,
state] of a row-major array. Rates are A * log2(e), so that a decay is one exp2. WIDE numbers (states, sums) are
float32, or float64 for float64 input.
"""

# Triton's language is compiled, not run: it has types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(z, TERMS: tl.constexpr):
    """log(1 + exp(z)) by the series of atanh: the hardware's logarithm is too coarse near 1, where small steps are."""
    u = tl.exp(-tl.abs(z))
    s = u / (2 + u)
    square = s * s
    series = square * 0 + 1.0 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - k) - 1)
    return tl.maximum(z, 0) + 2 * s * series


@triton.jit
def load_row(base, token, row, i, size, live, WIDE: tl.constexpr):
    """Elements `i` of the row of a token, widened; zeros beyond `size` and where not `live`."""
    return tl.load(base + token * row + i, mask=(i < size) & live, other=0).to(WIDE)


@triton.jit
def load_state(base, index, d, n, channels, states):
    inside = (d < channels)[:, None] & (n < states)[None, :]
    return tl.load(base + (index * channels + d[:, None]) * states + n[None, :], mask=inside, other=0)


@triton.jit
def store_state(base, index, d, n, channels, states, value):
    inside = (d < channels)[:, None] & (n < states)[None, :]
    tl.store(base + (index * channels + d[:, None]) * states + n[None, :], value, mask=inside)


@triton.jit
def initial_state(base, segment, row, d, n, channels, states, like, GIVEN: tl.constexpr):
    """The state before a segment; `row` is 0 where all segments share one, else 1."""
    state = tl.zeros_like(like)  # not like * 0: a NaN of the document before must not get here
    if GIVEN:
        state = load_state(base, segment.to(tl.int64) * row, d, n, channels, states)
    return state


@triton.jit
def chunk_ends(
    x, dt, rates, B, marks, cu_seqlens, initial, ends, steps, tokens, channels, states, x_row, dt_row, B_row,
    initial_row, CHUNK: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, GIVEN: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """The state after each chunk if the one before it were zeros, and the sum of its time steps: what `carry` joins.

    Only the last segment of the chunk matters, and only if it goes on in the next chunk.
    """
    WIDE: tl.constexpr = rates.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    first, stop = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tokens)
    segment = tl.load(marks + stop - 1) >> 2
    begin = tl.load(cu_seqlens + segment)
    rate = load_state(rates, 0, d, n, channels, states)
    h, total = tl.zeros((BLOCK, N), WIDE), tl.zeros((BLOCK,), WIDE)
    if begin >= first:
        h = initial_state(initial, segment, initial_row, d, n, channels, states, h, GIVEN)
    start = tl.maximum(begin, first)
    if tl.load(cu_seqlens + segment + 1) == stop:
        start = stop
    for t in range(start, stop):
        delta = softplus(load_row(dt, t, dt_row, d, channels, True, WIDE), TERMS)
        drive = delta * load_row(x, t, x_row, d, channels, True, WIDE)
        h = tl.exp2(delta[:, None] * rate) * h + drive[:, None] * load_row(B, t, B_row, n, states, True, WIDE)[None, :]
        total += delta
    store_state(ends, chunk, d, n, channels, states, h)
    tl.store(steps + chunk * channels + d, total, mask=d < channels)


@triton.jit
def carry(
    ends, steps, rates, marks, cu_seqlens, tokens, chunks, channels, states,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """In place, from what each chunk adds to what enters it: states from the left, or gradients from the right."""
    WIDE: tl.constexpr = rates.dtype.element_ty
    d, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    rate = load_state(rates, 0, d, n, channels, states)
    entering = tl.zeros((BLOCK, N), WIDE)
    for i in range(0, chunks):
        chunk = tl.cast(i, tl.int64)
        if REVERSE:
            chunk = chunks - 1 - chunk
        added = load_state(ends, chunk, d, n, channels, states)
        store_state(ends, chunk, d, n, channels, states, entering)
        last = tl.minimum((chunk + 1) * CHUNK, tokens) - 1
        through = tl.load(cu_seqlens + (tl.load(marks + last) >> 2)) < chunk * CHUNK
        step = tl.load(steps + chunk * channels + d, mask=d < channels, other=0)
        # Not a product with 0: what a document did not write, NaN included, must not reach it.
        entering = added + tl.where(through, tl.exp2(step[:, None] * rate) * entering, 0.0)


@triton.jit
def outputs(
    x, dt, rates, B, C, D, gate, marks, initial, ends, y, final, tokens, channels, states,
    x_row, dt_row, B_row, C_row, gate_row, initial_row, CHUNK: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
    GIVEN: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """y and the final states, from the states that enter the chunks."""
    WIDE: tl.constexpr = rates.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    rate = load_state(rates, 0, d, n, channels, states)
    skip = load_row(D, 0, 0, d, channels, True, WIDE)
    h = load_state(ends, chunk, d, n, channels, states)
    for t in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tokens)):
        mark = tl.load(marks + t)
        if mark & 1:
            h = initial_state(initial, mark >> 2, initial_row, d, n, channels, states, h, GIVEN)
        delta = softplus(load_row(dt, t, dt_row, d, channels, True, WIDE), TERMS)
        u = load_row(x, t, x_row, d, channels, True, WIDE)
        b, c = load_row(B, t, B_row, n, states, True, WIDE), load_row(C, t, C_row, n, states, True, WIDE)
        h = tl.exp2(delta[:, None] * rate) * h + (delta * u)[:, None] * b[None, :]
        g = load_row(gate, t, gate_row, d, channels, True, WIDE)
        out = (tl.sum(h * c[None, :], 1) + skip * u) * g * tl.sigmoid(g)
        tl.store(y + t * channels + d, out.to(y.dtype.element_ty), mask=d < channels)
        if mark & 2:
            store_state(final, (mark >> 2).to(tl.int64), d, n, channels, states, h)


@triton.jit
def tile_starts(
    x, dt, rates, B, marks, initial, ends, kept, tokens, channels, states, x_row, dt_row, B_row, initial_row,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, GIVEN: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """The state before every TILE-th token, from the states that enter the chunks: what `gradients` starts from."""
    WIDE: tl.constexpr = rates.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    rate = load_state(rates, 0, d, n, channels, states)
    h = load_state(ends, chunk, d, n, channels, states)
    for t in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tokens)):
        if t % TILE == 0:
            store_state(kept, t // TILE, d, n, channels, states, h)
        mark = tl.load(marks + t)
        if mark & 1:
            h = initial_state(initial, mark >> 2, initial_row, d, n, channels, states, h, GIVEN)
        delta = softplus(load_row(dt, t, dt_row, d, channels, True, WIDE), TERMS)
        drive = delta * load_row(x, t, x_row, d, channels, True, WIDE)
        h = tl.exp2(delta[:, None] * rate) * h + drive[:, None] * load_row(B, t, B_row, n, states, True, WIDE)[None, :]


@triton.jit
def chunk_gradients(
    dt, rates, C, gate, dy, dfinal, marks, cu_seqlens, entering, tokens, channels, states,
    dt_row, C_row, gate_row, CHUNK: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before each chunk if that of the state after it were zeros.

    Only the first segment of the chunk matters, and only if it began before.
    """
    WIDE: tl.constexpr = rates.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    d, n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    first, stop = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tokens)
    mark = tl.load(marks + first)
    segment_end = tl.load(cu_seqlens + (mark >> 2) + 1)
    rate = load_state(rates, 0, d, n, channels, states)
    g = tl.zeros((BLOCK, N), WIDE)
    end = tl.minimum(segment_end, stop)
    if mark & 1:
        end = first
    if end == segment_end:
        g = load_state(dfinal, (mark >> 2).to(tl.int64), d, n, channels, states)
    for i in range(0, end - first):
        t = end - 1 - i
        delta = softplus(load_row(dt, t, dt_row, d, channels, True, WIDE), TERMS)
        z = load_row(gate, t, gate_row, d, channels, True, WIDE)
        dv = load_row(dy, t, channels, d, channels, True, WIDE) * z * tl.sigmoid(z)
        c = load_row(C, t, C_row, n, states, True, WIDE)
        g = tl.exp2(delta[:, None] * rate) * (g + dv[:, None] * c[None, :])
    store_state(entering, chunk, d, n, channels, states, g)


@triton.jit
def gradients(
    x, dt, rates, B, C, D, gate, dy, dfinal, marks, initial, kept, entering,
    dx, ddt, dgate, dinitial, dB, dC, drates, dD, tokens, channels, states,
    x_row, dt_row, B_row, C_row, gate_row, initial_row, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    N: tl.constexpr, GIVEN: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Every gradient. dB, dC (blocks, T, states), drates and dD (chunks, ..) are partial sums, one a program.

    Tile by tile from the right: the states of a tile are computed again from the kept one and stay in registers.
    """
    WIDE: tl.constexpr = rates.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    d, n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N)
    rate = load_state(rates, 0, d, n, channels, states)
    skip = load_row(D, 0, 0, d, channels, True, WIDE)
    sum_rates, sum_D = tl.zeros((BLOCK, N), WIDE), tl.zeros((BLOCK,), WIDE)
    g = load_state(entering, chunk, d, n, channels, states)
    tiles = tl.cdiv(tl.minimum(CHUNK, tokens - chunk * CHUNK), TILE)
    for k in range(0, tiles):
        tile = chunk * (CHUNK // TILE) + tiles - 1 - k
        h = load_state(kept, tile, d, n, channels, states)
        decays = ()
        decayed = ()
        for i in tl.static_range(TILE):
            t = tile * TILE + i
            live = t < tokens
            mark = tl.load(marks + t, mask=live, other=0)
            if mark & 1:
                h = initial_state(initial, mark >> 2, initial_row, d, n, channels, states, h, GIVEN)
            delta = tl.where(live, softplus(load_row(dt, t, dt_row, d, channels, live, WIDE), TERMS), 0.0)
            u, b = load_row(x, t, x_row, d, channels, live, WIDE), load_row(B, t, B_row, n, states, live, WIDE)
            decay = tl.exp2(delta[:, None] * rate)
            decays = decays + (decay,)
            decayed = decayed + (decay * h,)
            h = decay * h + (delta * u)[:, None] * b[None, :]
            c, z = load_row(C, t, C_row, n, states, live, WIDE), load_row(gate, t, gate_row, d, channels, live, WIDE)
            dout, sigmoid = load_row(dy, t, channels, d, channels, live, WIDE), tl.sigmoid(z)
            v = tl.sum(h * c[None, :], 1) + skip * u
            dz = dout * v * sigmoid * (1 + z * (1 - sigmoid))
            tl.store(dgate + t * channels + d, dz.to(dgate.dtype.element_ty), mask=(d < channels) & live)
            by_state = tl.sum(h * (dout * z * sigmoid)[:, None], 0)
            tl.store(dC + (block * tokens + t) * states + n, by_state, mask=(n < states) & live)
        for j in tl.static_range(TILE):
            t = tile * TILE + TILE - 1 - j
            live = t < tokens
            mark = tl.load(marks + t, mask=live, other=0)
            if mark & 2:
                g = load_state(dfinal, (mark >> 2).to(tl.int64), d, n, channels, states)
            z = load_row(gate, t, gate_row, d, channels, live, WIDE)
            dv = load_row(dy, t, channels, d, channels, live, WIDE) * z * tl.sigmoid(z)
            dh = g + dv[:, None] * load_row(C, t, C_row, n, states, live, WIDE)[None, :]
            raw = load_row(dt, t, dt_row, d, channels, live, WIDE)
            delta = tl.where(live, softplus(raw, TERMS), 0.0)
            u, b = load_row(x, t, x_row, d, channels, live, WIDE), load_row(B, t, B_row, n, states, live, WIDE)
            dlog = dh * decayed[TILE - 1 - j]
            ddrive = tl.sum(dh * b[None, :], 1)
            sum_rates += dlog * delta[:, None]
            sum_D += dv * u
            du = ddrive * delta + skip * dv
            ddelta = tl.sum(dlog * rate, 1) * LN2 + ddrive * u
            inside = (d < channels) & live
            tl.store(dx + t * channels + d, du.to(dx.dtype.element_ty), mask=inside)
            tl.store(ddt + t * channels + d, ddelta * tl.sigmoid(raw), mask=inside)
            by_state = tl.sum(dh * (delta * u)[:, None], 0)
            tl.store(dB + (block * tokens + t) * states + n, by_state, mask=(n < states) & live)
            g = decays[TILE - 1 - j] * dh
            if GIVEN:
                if mark & 1:
                    store_state(dinitial, (mark >> 2).to(tl.int64), d, n, channels, states, g)
    store_state(drates, chunk, d, n, channels, states, sum_rates)
    tl.store(dD + chunk * channels + d, sum_D, mask=d < channels)
