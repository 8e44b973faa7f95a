"""Selective scan of reference.py in Triton: the kernels that triton_scan.py launches and explains.

A program computes BLOCK channels over one chunk of CHUNK tokens. A thread holds all states of its channel: they are a
tuple of STATES vectors (BLOCK,), so that sums over states need no other thread, and only sums over channels do.
Arrays of states lie as (.., STATES, channels) here. `bc` (T, a power of two) holds B, then C of each token, `delta` (T,
channels) the time steps, softplus already taken. Tokens carry marks, segment * 4 + 2 (the segment's last) + 1 (its
first); `bc` and `marks` are padded with zeros to whole tiles of TILE tokens. Rates are A * log2(e), so that a decay is
one exp2. WIDE numbers (states, sums) are float32, or float64 for float64 input.
"""

# Triton's language is compiled, not run: it has types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def time_steps(dt, delta, elements, TERMS: tl.constexpr, SIZE: tl.constexpr):
    """delta = log(1 + exp(dt)) by the series of atanh: the hardware's logarithm is too coarse near 1."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    z = tl.load(dt + i, mask=i < elements, other=0)
    u = tl.exp(-tl.abs(z))
    s = u / (2 + u)
    square = s * s
    series = square * 0 + 1.0 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - k) - 1)
    tl.store(delta + i, tl.maximum(z, 0) + 2 * s * series, mask=i < elements)


@triton.jit
def step_gradient(delta, TERMS: tl.constexpr):
    """d softplus(dt) / d dt = 1 - exp(-delta), by its series where the difference would lose digits."""
    series = delta * 0 + 1.0
    for k in tl.static_range(TERMS):
        series = 1 - series * delta / (TERMS + 1 - k)
    return tl.where(delta < 0.25, delta * series, 1 - tl.exp(-delta))


@triton.jit
def load_row(base, token, row, d, channels, tokens, WIDE: tl.constexpr):
    """The channels `d` of a token's row, widened; zeros beyond the channels and tokens."""
    return tl.load(base + token * row + d, mask=(d < channels) & (token < tokens), other=0).to(WIDE)


@triton.jit
def load_states(base, index, d, channels, STATES: tl.constexpr):
    h = ()
    for n in tl.static_range(STATES):
        h = h + (tl.load(base + (index * STATES + n) * channels + d, mask=d < channels, other=0),)
    return h


@triton.jit
def store_states(base, index, d, channels, h, STATES: tl.constexpr):
    for n in tl.static_range(STATES):
        tl.store(base + (index * STATES + n) * channels + d, h[n], mask=d < channels)


@triton.jit
def zero_states(like, STATES: tl.constexpr):
    h = ()
    for _ in tl.static_range(STATES):
        h = h + (tl.zeros_like(like),)
    return h


@triton.jit
def initial_state(base, segment, row, d, channels, like, STATES: tl.constexpr, GIVEN: tl.constexpr):
    """The states before a segment; `row` is 0 where all segments share them, else 1."""
    if GIVEN:
        h = load_states(base, segment.to(tl.int64) * row, d, channels, STATES)
    else:
        h = zero_states(like, STATES)  # not a product with 0: a NaN of the document before must not get here
    return h


@triton.jit
def load_bc(bc, token, STATES: tl.constexpr):
    """B and C of a token, one a thread: what `pick` takes from there needs no memory."""
    SIZE: tl.constexpr = triton.next_power_of_2(2 * STATES)
    return tl.load(bc + token * SIZE + tl.arange(0, SIZE))


@triton.jit
def pick(row, i: tl.constexpr, like):
    """Element i of a row, for every channel of `like`."""
    return tl.gather(row, tl.full(like.shape, i, tl.int32), 0)


@triton.jit
def advance(h, delta, drive, rate, row, STATES: tl.constexpr):
    """The states after a token, from those before it; `row` holds the token's B and C."""
    after = ()
    for n in tl.static_range(STATES):
        after = after + (tl.exp2(delta * rate[n]) * h[n] + drive * pick(row, n, drive),)
    return after


@triton.jit
def chunk_ends(
    x, delta, rates, bc, marks, cu_seqlens, initial, ends, steps, through, tokens, channels, x_row, initial_row,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The state after each chunk if the one before it were zeros, and the sum of its time steps: what `carry` joins.

    Only the last segment of the chunk matters, and only if it goes on in the next chunk. `through` (chunks,) says
    whether one segment is all of the chunk and began before it.
    """
    WIDE: tl.constexpr = rates.dtype.element_ty
    chunk = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, stop = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tokens)
    segment = tl.load(marks + stop - 1) >> 2
    begin = tl.load(cu_seqlens + segment)
    rate = load_states(rates, 0, d, channels, STATES)
    total = tl.zeros((BLOCK,), WIDE)
    h = zero_states(total, STATES)
    if begin >= first:
        h = initial_state(initial, segment, initial_row, d, channels, total, STATES, GIVEN)
    start = tl.maximum(begin, first)
    if tl.load(cu_seqlens + segment + 1) == stop:
        start = stop
    for tile in range(0, tl.cdiv(stop - start, TILE)):
        deltas = ()
        xs = ()
        rows = ()
        for i in tl.static_range(TILE):
            t = start + tile * TILE + i
            deltas = deltas + (load_row(delta, t, channels, d, channels, stop, WIDE),)
            xs = xs + (load_row(x, t, x_row, d, channels, stop, WIDE),)
            # Past the stop the time step is 0, which keeps the state.
            rows = rows + (load_bc(bc, tl.minimum(t, stop - 1), STATES),)
        for i in tl.static_range(TILE):
            h = advance(h, deltas[i], deltas[i] * xs[i], rate, rows[i], STATES)
            total += deltas[i]
    store_states(ends, chunk, d, channels, h, STATES)
    tl.store(through + chunk, (begin < first).to(tl.int32))
    tl.store(steps + chunk * channels + d, total, mask=d < channels)


@triton.jit
def carry(
    ends, steps, through, rates, chunks, channels,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """In place, from what each chunk adds to what enters it: states from the left, or gradients from the right.

    Chunks are loaded GROUP at a time, since each waits for the one before it.
    """
    d, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    rate = tl.load(rates + n * channels + d, mask=d < channels, other=0)
    entering = tl.zeros_like(rate)
    for group in range(0, tl.cdiv(chunks, GROUP)):
        added = ()
        decays = ()
        for i in tl.static_range(GROUP):
            chunk = tl.cast(group * GROUP + i, tl.int64)
            if REVERSE:
                chunk = chunks - 1 - chunk
            live = (d < channels) & (chunk >= 0) & (chunk < chunks)
            added = added + (tl.load(ends + (chunk * STATES + n) * channels + d, mask=live, other=0),)
            decay = tl.exp2(tl.load(steps + chunk * channels + d, mask=live, other=0) * rate)
            joined = tl.load(through + chunk, mask=(chunk >= 0) & (chunk < chunks), other=0)
            decays = decays + (tl.where(joined != 0, decay, -1.0),)
        for i in tl.static_range(GROUP):
            chunk = tl.cast(group * GROUP + i, tl.int64)
            if REVERSE:
                chunk = chunks - 1 - chunk
            live = (d < channels) & (chunk >= 0) & (chunk < chunks)
            tl.store(ends + (chunk * STATES + n) * channels + d, entering, mask=live)
            # Not a product with 0: what a document did not write, NaN included, must not reach it.
            entering = added[i] + tl.where(decays[i] < 0, 0.0, decays[i] * entering)


@triton.jit
def outputs(
    x, delta, rates, bc, D, gate, marks, initial, ends, y, final, tokens, channels, x_row, gate_row, initial_row,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """y and the final states, from the states that enter the chunks."""
    WIDE: tl.constexpr = rates.dtype.element_ty
    chunk = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rate = load_states(rates, 0, d, channels, STATES)
    skip = tl.load(D + d, mask=d < channels, other=0)
    h = load_states(ends, chunk, d, channels, STATES)
    for tile in range(0, tl.cdiv(tl.minimum(CHUNK, tokens - chunk * CHUNK), TILE)):
        start = chunk * CHUNK + tile * TILE
        deltas = ()
        xs = ()
        gates = ()
        rows = ()
        # The loads of a tile come before its stores, so that they overlap.
        for i in tl.static_range(TILE):
            deltas = deltas + (load_row(delta, start + i, channels, d, channels, tokens, WIDE),)
            xs = xs + (load_row(x, start + i, x_row, d, channels, tokens, WIDE),)
            gates = gates + (load_row(gate, start + i, gate_row, d, channels, tokens, WIDE),)
            rows = rows + (load_bc(bc, start + i, STATES),)
        for i in tl.static_range(TILE):
            t = start + i
            mark = tl.load(marks + t)
            if mark & 1:
                h = initial_state(initial, mark >> 2, initial_row, d, channels, skip, STATES, GIVEN)
            h = advance(h, deltas[i], deltas[i] * xs[i], rate, rows[i], STATES)
            v = skip * xs[i]
            for n in tl.static_range(STATES):
                v += h[n] * pick(rows[i], STATES + n, v)
            out = v * gates[i] * tl.sigmoid(gates[i])
            tl.store(y + t * channels + d, out.to(y.dtype.element_ty), mask=(d < channels) & (t < tokens))
            if mark & 2:
                store_states(final, (mark >> 2).to(tl.int64), d, channels, h, STATES)


@triton.jit
def tile_starts(
    x, delta, rates, bc, marks, initial, ends, kept, tokens, channels, x_row, initial_row,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The states before every TILE-th token, from those that enter the chunks: what `gradients` starts from."""
    WIDE: tl.constexpr = rates.dtype.element_ty
    chunk = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rate = load_states(rates, 0, d, channels, STATES)
    h = load_states(ends, chunk, d, channels, STATES)
    for tile in range(0, tl.cdiv(tl.minimum(CHUNK, tokens - chunk * CHUNK), TILE)):
        start = chunk * CHUNK + tile * TILE
        deltas = ()
        xs = ()
        rows = ()
        for i in tl.static_range(TILE):
            deltas = deltas + (load_row(delta, start + i, channels, d, channels, tokens, WIDE),)
            xs = xs + (load_row(x, start + i, x_row, d, channels, tokens, WIDE),)
            rows = rows + (load_bc(bc, start + i, STATES),)
        store_states(kept, start // TILE, d, channels, h, STATES)
        for i in tl.static_range(TILE):
            mark = tl.load(marks + start + i)
            if mark & 1:
                h = initial_state(initial, mark >> 2, initial_row, d, channels, xs[i], STATES, GIVEN)
            h = advance(h, deltas[i], deltas[i] * xs[i], rate, rows[i], STATES)


@triton.jit
def chunk_gradients(
    delta, rates, bc, gate, dy, dfinal, marks, cu_seqlens, entering, tokens, channels, gate_row,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """The gradient of the states before each chunk if that of the states after it were zeros.

    Only the first segment of the chunk matters, and only if it began before.
    """
    WIDE: tl.constexpr = rates.dtype.element_ty
    chunk = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, stop = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, tokens)
    mark = tl.load(marks + first)
    segment_end = tl.load(cu_seqlens + (mark >> 2) + 1)
    rate = load_states(rates, 0, d, channels, STATES)
    g = zero_states(rate[0], STATES)
    end = tl.minimum(segment_end, stop)
    if mark & 1:
        end = first
    if end == segment_end:
        g = load_states(dfinal, (mark >> 2).to(tl.int64), d, channels, STATES)
    for tile in range(0, tl.cdiv(end - first, TILE)):
        deltas = ()
        upstream = ()
        rows = ()
        for i in tl.static_range(TILE):
            t = end - 1 - tile * TILE - i
            # Before the chunk the time step is 0 and nothing comes from upstream, which keeps the gradient.
            at = tl.where(t < first, tokens, t)
            deltas = deltas + (load_row(delta, at, channels, d, channels, tokens, WIDE),)
            z = load_row(gate, at, gate_row, d, channels, tokens, WIDE)
            upstream = upstream + (load_row(dy, at, channels, d, channels, tokens, WIDE) * z * tl.sigmoid(z),)
            rows = rows + (load_bc(bc, tl.maximum(t, first), STATES),)
        for i in tl.static_range(TILE):
            before = ()
            for n in tl.static_range(STATES):
                c = pick(rows[i], STATES + n, upstream[i])
                before = before + (tl.exp2(deltas[i] * rate[n]) * (g[n] + upstream[i] * c),)
            g = before
    store_states(entering, chunk, d, channels, g, STATES)


@triton.jit
def exchange_halves(values, lane, HALF: tl.constexpr):
    """2 * HALF vectors -> HALF: i is the sum of i and i + HALF, over pairs of lanes that are HALF apart."""
    upper = (lane & HALF) != 0
    halved = ()
    for i in tl.static_range(HALF):
        sent = tl.where(upper, values[i], values[i + HALF])
        halved = halved + (tl.where(upper, values[i + HALF], values[i]) + tl.gather(sent, lane ^ HALF, 0),)
    return halved


@triton.jit
def store_sums(base, values, lane, live, STATES: tl.constexpr, WIDTH: tl.constexpr, HALVINGS: tl.constexpr,
               EXCHANGES: tl.constexpr):  # fmt: skip
    """Sum each of STATES vectors (BLOCK,) over its channels, and store the sums at base.

    WIDTH = 2 ** HALVINGS vectors are summed together: threads exchange halves of them, so that it takes WIDTH exchanges
    and not WIDTH * log2(BLOCK); BLOCK = WIDTH * 2 ** EXCHANGES.
    """
    for group in tl.static_range((STATES + WIDTH - 1) // WIDTH):
        sums = ()
        for i in tl.static_range(WIDTH):
            if group * WIDTH + i < STATES:
                sums = sums + (values[group * WIDTH + i],)
            else:
                sums = sums + (tl.zeros_like(values[0]),)
        for k in tl.static_range(HALVINGS):
            sums = exchange_halves(sums, lane, WIDTH >> (k + 1))
        total = sums[0]
        for k in tl.static_range(EXCHANGES):
            total += tl.gather(total, lane ^ (WIDTH << k), 0)
        n = group * WIDTH + lane
        tl.store(base + n, total, mask=(lane < WIDTH) & (n < STATES) & live)


@triton.jit
def gradients(
    x, delta, rates, bc, D, gate, dy, dfinal, marks, initial, kept, entering,
    dx, ddt, dgate, dinitial, dB, dC, drates, dD, tokens, channels, x_row, gate_row, initial_row,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, GIVEN: tl.constexpr,
    WIDTH: tl.constexpr, HALVINGS: tl.constexpr, EXCHANGES: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Every gradient. dB, dC (blocks, T, STATES), drates and dD (chunks, ..) are partial sums, one a program.

    Tile by tile from the right: the states of a tile are computed again from the kept ones and stay in registers.
    """
    WIDE: tl.constexpr = rates.dtype.element_ty
    chunk = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    d = block * BLOCK + lane
    rate = load_states(rates, 0, d, channels, STATES)
    skip = tl.load(D + d, mask=d < channels, other=0)
    sum_D = tl.zeros((BLOCK,), WIDE)
    sum_rates = zero_states(sum_D, STATES)
    g = load_states(entering, chunk, d, channels, STATES)
    tiles = tl.cdiv(tl.minimum(CHUNK, tokens - chunk * CHUNK), TILE)
    for k in range(0, tiles):
        start = chunk * CHUNK + (tiles - 1 - k) * TILE
        h = load_states(kept, start // TILE, d, channels, STATES)
        deltas = ()
        xs = ()
        gates = ()
        dys = ()
        rows = ()
        for i in tl.static_range(TILE):
            deltas = deltas + (load_row(delta, start + i, channels, d, channels, tokens, WIDE),)
            xs = xs + (load_row(x, start + i, x_row, d, channels, tokens, WIDE),)
            gates = gates + (load_row(gate, start + i, gate_row, d, channels, tokens, WIDE),)
            dys = dys + (load_row(dy, start + i, channels, d, channels, tokens, WIDE),)
            rows = rows + (load_bc(bc, start + i, STATES),)
        decays = ()
        decayed = ()
        dvs = ()
        for i in tl.static_range(TILE):
            t = start + i
            mark = tl.load(marks + t)
            if mark & 1:
                h = initial_state(initial, mark >> 2, initial_row, d, channels, skip, STATES, GIVEN)
            drive = deltas[i] * xs[i]
            after = ()
            for n in tl.static_range(STATES):
                decay = tl.exp2(deltas[i] * rate[n])
                decays = decays + (decay,)
                decayed = decayed + (decay * h[n],)
                after = after + (decay * h[n] + drive * pick(rows[i], n, drive),)
            h = after
            v = skip * xs[i]
            for n in tl.static_range(STATES):
                v += h[n] * pick(rows[i], STATES + n, v)
            sigmoid = tl.sigmoid(gates[i])
            dvs = dvs + (dys[i] * gates[i] * sigmoid,)
            dz = dys[i] * v * sigmoid * (1 + gates[i] * (1 - sigmoid))
            live = t < tokens
            tl.store(dgate + t * channels + d, dz.to(dgate.dtype.element_ty), mask=(d < channels) & live)
            products = ()
            for n in tl.static_range(STATES):
                products = products + (h[n] * dvs[i],)
            store_sums(dC + (block * tokens + t) * STATES, products, lane, live, STATES, WIDTH, HALVINGS, EXCHANGES)
        # Read again: kept from above, what was picked from the rows would fill more registers than there are.
        rows = ()
        for i in tl.static_range(TILE):
            rows = rows + (load_bc(bc, start + i, STATES),)
        for i in tl.static_range(TILE - 1, -1, -1):
            t = start + i
            mark = tl.load(marks + t)
            if mark & 2:
                g = load_states(dfinal, (mark >> 2).to(tl.int64), d, channels, STATES)
            drive = deltas[i] * xs[i]
            ddrive = tl.zeros_like(skip)
            by_rate = tl.zeros_like(skip)
            before = ()
            sums = ()
            products = ()
            for n in tl.static_range(STATES):
                dh = g[n] + dvs[i] * pick(rows[i], STATES + n, drive)
                dlog = dh * decayed[i * STATES + n]
                ddrive += dh * pick(rows[i], n, drive)
                by_rate += dlog * rate[n]
                sums = sums + (sum_rates[n] + dlog * deltas[i],)
                products = products + (dh * drive,)
                before = before + (decays[i * STATES + n] * dh,)
            g = before
            sum_rates = sums
            sum_D += dvs[i] * xs[i]
            live = t < tokens
            du = ddrive * deltas[i] + skip * dvs[i]
            ddelta = by_rate * LN2 + ddrive * xs[i]
            tl.store(dx + t * channels + d, du.to(dx.dtype.element_ty), mask=(d < channels) & live)
            tl.store(ddt + t * channels + d, ddelta * step_gradient(deltas[i], TERMS), mask=(d < channels) & live)
            store_sums(dB + (block * tokens + t) * STATES, products, lane, live, STATES, WIDTH, HALVINGS, EXCHANGES)
            if GIVEN:
                if mark & 1:
                    store_states(dinitial, (mark >> 2).to(tl.int64), d, channels, g, STATES)
    store_states(drates, chunk, d, channels, sum_rates, STATES)
    tl.store(dD + chunk * channels + d, sum_D, mask=d < channels)
