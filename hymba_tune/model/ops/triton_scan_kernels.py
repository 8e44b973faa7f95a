"""Selective scan of reference.py in Triton: the kernels that triton_scan.py launches and explains.

A program computes BLOCK channels over one chunk of up to CHUNK tokens of one segment: a document, or the meta tokens
that come before all documents (META is then 1, and they are segment 0). A thread holds all states of its channel: they
are a tuple of STATES vectors (BLOCK,), so that sums over states need no other thread, and only sums over channels do.
Arrays of states lie as (.., STATES, channels) here. `dt` (T, channels) is before softplus, `delta` behind it. `table`
(chunks, COLUMNS) int64 says of a chunk: its first token, the token behind its last one, those of its segment, the
segment, and its first tile of TILE tokens; unused chunks are empty. Inside a chunk tokens are counted from its first,
in 32 bits. Rates are A * log2(e), so that a decay is one exp2. WIDE numbers (states, sums) are of A's type: float32, or
float64 for float64 input.
"""

# Triton's language is compiled, not run: it has types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

COLUMNS: tl.constexpr = tl.constexpr(6)


@triton.jit
def exp(z):
    """By exp2, which flushes what is too small for a normal number to zero: tl.exp takes 3 instructions more for it."""
    return tl.exp2(z * LOG2E)


@triton.jit
def sigmoid(z):
    return 1 / (1 + exp(-z))


@triton.jit
def softplus(z, TERMS: tl.constexpr):
    """log(1 + exp(z)) by the series of atanh: the hardware's logarithm is too coarse near 1, where small steps are."""
    u = exp(-tl.abs(z))
    s = u / (2 + u)
    square = s * s
    series = square * 0 + 1.0 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - k) - 1)
    return tl.maximum(z, 0) + 2 * s * series


@triton.jit
def step_gradient(delta, TERMS: tl.constexpr):
    """d softplus(dt) / d dt = 1 - exp(-delta), by its series where the difference would lose digits."""
    series = delta * 0 + 1.0
    for k in tl.static_range(TERMS):
        series = 1 - series * delta / (TERMS + 1 - k)
    return tl.where(delta < 0.25, delta * series, 1 - exp(-delta))


@triton.jit
def load_tile(base, start, stop, row, d, channels, TILE: tl.constexpr, OTHER: tl.constexpr = 0,
              KEPT: tl.constexpr = False):  # fmt: skip
    """The channels `d` of TILE tokens; OTHER beyond the channels and from `stop` on.

    What is loaded together overlaps, as long as nothing waits in between: so they are widened only where they are used.
    """
    rows = ()
    for i in tl.static_range(TILE):
        inside = (d < channels) & (start + i < stop)
        at = base + (start + i) * row + d
        rows = rows + (tl.load(at, mask=inside, other=OTHER, eviction_policy="evict_last" if KEPT else ""),)
    return rows


@triton.jit
def load_steps(dt, start, stop, row, d, channels, TERMS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """The time steps of TILE tokens; 0 from `stop` on, where a token then changes nothing."""
    before = load_tile(dt, start, stop, row, d, channels, TILE, float("-inf"))
    steps = ()
    for i in tl.static_range(TILE):
        steps = steps + (softplus(before[i].to(WIDE), TERMS),)
    return steps


@triton.jit
def load_rates(A, d, channels, STATES: tl.constexpr):
    """A (channels, STATES) in powers of two."""
    rate = ()
    for n in tl.static_range(STATES):
        rate = rate + (tl.load(A + d * STATES + n, mask=d < channels, other=0) * LOG2E,)
    return rate


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
def lanes_bc(B, C, STATES: tl.constexpr):
    """Where B, then C (T, STATES) of token 0 lie, one a thread."""
    n = tl.arange(0, triton.next_power_of_2(2 * STATES))
    return tl.where(n < STATES, B + n, C + (n - STATES))


@triton.jit
def load_bc(lanes, start, stop, TILE: tl.constexpr, STATES: tl.constexpr, KEPT: tl.constexpr = False):
    """B and C of TILE tokens, one a thread: what `pick` takes from there needs no memory.

    From `stop` on they are the last token's, whose time step of 0 makes them count nothing.
    """
    live = tl.arange(0, triton.next_power_of_2(2 * STATES)) < 2 * STATES
    rows = ()
    for i in tl.static_range(TILE):
        token = tl.minimum(start + i, stop - 1)
        at = lanes + token * STATES
        rows = rows + (tl.load(at, mask=live, other=0, eviction_policy="evict_last" if KEPT else ""),)
    return rows


@triton.jit
def pick(row, i: tl.constexpr, like):
    """Element i of a row, for every channel of `like`."""
    return tl.gather(row.to(like.dtype), tl.full(like.shape, i, tl.int32), 0)


@triton.jit
def advance(h, delta, drive, rate, row, STATES: tl.constexpr):
    """The states after a token, from those before it; `row` holds the token's B and C."""
    after = ()
    for n in tl.static_range(STATES):
        after = after + (tl.exp2(delta * rate[n]) * h[n] + drive * pick(row, n, drive),)
    return after


@triton.jit
def scan_chunk_ends(
    x, dt, A, B, C, table, ends, steps, channels, x_row, dt_row,
    META: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """The state after each chunk if the one before it were zeros, and the sum of its time steps: what `carry` joins.

    A document's last chunk has none to hand it on to.
    """
    WIDE: tl.constexpr = A.dtype.element_ty
    chunk = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = table + chunk * COLUMNS
    start, stop, end, segment = tl.load(row), tl.load(row + 1), tl.load(row + 3), tl.load(row + 4)
    count = (stop - start).to(tl.int32)
    if (stop < end) | (segment < META):
        rate = load_rates(A, d, channels, STATES)
        lanes = lanes_bc(B + start * STATES, C + start * STATES, STATES)
        x, dt = x + start * x_row, dt + start * dt_row
        total = tl.zeros((BLOCK,), WIDE)
        h = zero_states(total, STATES)
        for tile in range(0, tl.cdiv(count, TILE)):
            at = tile * TILE
            deltas = load_steps(dt, at, count, dt_row, d, channels, TERMS, TILE, WIDE)
            xs = load_tile(x, at, count, x_row, d, channels, TILE)
            rows = load_bc(lanes, at, count, TILE, STATES)
            for i in tl.static_range(TILE):
                h = advance(h, deltas[i], deltas[i] * xs[i].to(WIDE), rate, rows[i], STATES)
                total += deltas[i]
        store_states(ends, chunk, d, channels, h, STATES)
        tl.store(steps + chunk * channels + d, total, mask=d < channels)


@triton.jit(do_not_specialize=["before", "meta_chunks"])
def scan_carry(
    added, steps, A, begins, first, entering, left, before, meta_chunks, first_row, channels,
    META: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds to what enters it: states from the left, or gradients from the right.

    A program follows one state of a segment through its chunks, `begins[segment]` to `begins[segment + 1]`; program 0
    has the segment behind `before` others. What enters the first chunk is `first` of the segment (of all, where
    `first_row` is 0), or zeros; a document's first walks through the `meta_chunks` chunks that come before all
    documents. What leaves the last chunk goes to `left`; from the left that is known of empty segments only. Chunks are
    loaded GROUP at a time, since each waits for the one before it.
    """
    d, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    inside = d < channels
    segment = tl.program_id(2).to(tl.int64) + before
    begin, stop = tl.load(begins + segment), tl.load(begins + segment + 1)
    rate = tl.load(A + d * STATES + n, mask=inside, other=0) * LOG2E
    state = tl.zeros_like(rate)
    if first is not None:
        state = tl.load(first + ((segment - META) * first_row * STATES + n) * channels + d, mask=inside, other=0)
    for i in range(0, tl.where(segment < META, 0, meta_chunks)):
        decay = tl.exp2(tl.load(steps + i * channels + d, mask=inside, other=0) * rate)
        state = tl.load(added + (i * STATES + n) * channels + d, mask=inside, other=0) + decay * state
    for group in range(0, tl.cdiv(stop - begin, GROUP)):
        adds = ()
        decays = ()
        for k in tl.static_range(GROUP):
            chunk = begin + group * GROUP + k
            if REVERSE:
                chunk = stop - 1 - group * GROUP - k
            live = inside & (chunk >= begin) & (chunk < stop)
            adds = adds + (tl.load(added + (chunk * STATES + n) * channels + d, mask=live, other=0),)
            decays = decays + (tl.exp2(tl.load(steps + chunk * channels + d, mask=live, other=0) * rate),)
        for k in tl.static_range(GROUP):
            chunk = begin + group * GROUP + k
            if REVERSE:
                chunk = stop - 1 - group * GROUP - k
            live = inside & (chunk >= begin) & (chunk < stop)
            tl.store(entering + (chunk * STATES + n) * channels + d, state, mask=live)
            state = adds[k] + decays[k] * state
    if left is not None:
        known = inside & (segment >= META) & (REVERSE | (begin == stop))
        tl.store(left + ((segment - META) * STATES + n) * channels + d, state, mask=known)


@triton.jit
def scan_outputs(
    x, dt, A, B, C, D, gate, table, entering, y, final, delta, channels, x_row, dt_row, gate_row,
    META: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """y, the final states of documents with tokens, and the time steps, from the states that enter the chunks."""
    WIDE: tl.constexpr = A.dtype.element_ty
    chunk = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = table + chunk * COLUMNS
    start, stop, end, segment = tl.load(row), tl.load(row + 1), tl.load(row + 3), tl.load(row + 4)
    count = (stop - start).to(tl.int32)
    rate = load_rates(A, d, channels, STATES)
    lanes = lanes_bc(B + start * STATES, C + start * STATES, STATES)
    x, dt, gate = x + start * x_row, dt + start * dt_row, gate + start * gate_row
    y = y + start * channels
    if delta is not None:
        delta = delta + start * channels
    skip = tl.load(D + d, mask=d < channels, other=0)
    h = load_states(entering, chunk, d, channels, STATES)
    for tile in range(0, tl.cdiv(count, TILE)):
        at = tile * TILE
        deltas = load_steps(dt, at, count, dt_row, d, channels, TERMS, TILE, WIDE)
        xs = load_tile(x, at, count, x_row, d, channels, TILE)
        gates = load_tile(gate, at, count, gate_row, d, channels, TILE)
        rows = load_bc(lanes, at, count, TILE, STATES)
        for i in tl.static_range(TILE):
            t = at + i
            inside = (d < channels) & (t < count)
            h = advance(h, deltas[i], deltas[i] * xs[i].to(WIDE), rate, rows[i], STATES)
            v = skip * xs[i].to(WIDE)
            for n in tl.static_range(STATES):
                v += h[n] * pick(rows[i], STATES + n, v)
            z = gates[i].to(WIDE)
            out = v * z * sigmoid(z)
            tl.store(y + t * channels + d, out.to(y.dtype.element_ty), mask=inside)
            if delta is not None:
                tl.store(delta + t * channels + d, deltas[i], mask=inside)
    if (start < stop) & (stop == end) & (segment >= META):
        store_states(final, segment - META, d, channels, h, STATES)


@triton.jit
def scan_tile_starts(
    x, delta, A, B, C, table, ends, kept, channels, x_row,
    TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """The states before every tile, from those that enter the chunks: what `gradients` starts from."""
    WIDE: tl.constexpr = A.dtype.element_ty
    chunk = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = table + chunk * COLUMNS
    start, stop, first_tile = tl.load(row), tl.load(row + 1), tl.load(row + 5)
    count = (stop - start).to(tl.int32)
    rate = load_rates(A, d, channels, STATES)
    lanes = lanes_bc(B + start * STATES, C + start * STATES, STATES)
    x, delta = x + start * x_row, delta + start * channels
    kept = kept + first_tile * STATES * channels
    h = load_states(ends, chunk, d, channels, STATES)
    for tile in range(0, tl.cdiv(count, TILE)):
        at = tile * TILE
        deltas = load_tile(delta, at, count, channels, d, channels, TILE)
        xs = load_tile(x, at, count, x_row, d, channels, TILE)
        rows = load_bc(lanes, at, count, TILE, STATES)
        store_states(kept, 0, d, channels, h, STATES)
        kept += STATES * channels
        for i in tl.static_range(TILE):
            h = advance(h, deltas[i], deltas[i] * xs[i].to(WIDE), rate, rows[i], STATES)


@triton.jit
def scan_chunk_gradients(
    delta, A, B, C, gate, dy, table, added, steps, channels, gate_row,
    FIRSTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """The gradient of the states before each chunk if that of the states after it were zeros, and its time steps.

    A segment's first chunk hands it on only where FIRSTS says that something came before the segment.
    """
    WIDE: tl.constexpr = A.dtype.element_ty
    chunk = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = table + chunk * COLUMNS
    start, stop, begin = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    count = (stop - start).to(tl.int32)
    if FIRSTS | (begin < start):
        rate = load_rates(A, d, channels, STATES)
        lanes = lanes_bc(B + start * STATES, C + start * STATES, STATES)
        delta, gate, dy = delta + start * channels, gate + start * gate_row, dy + start * channels
        total = tl.zeros((BLOCK,), WIDE)
        g = zero_states(total, STATES)
        tiles = tl.cdiv(count, TILE)
        for k in range(0, tiles):
            at = (tiles - 1 - k) * TILE
            deltas = load_tile(delta, at, count, channels, d, channels, TILE)
            gates = load_tile(gate, at, count, gate_row, d, channels, TILE)
            dys = load_tile(dy, at, count, channels, d, channels, TILE)
            rows = load_bc(lanes, at, count, TILE, STATES)
            for i in tl.static_range(TILE - 1, -1, -1):
                z = gates[i].to(WIDE)
                dv = dys[i].to(WIDE) * z * sigmoid(z)
                before = ()
                for n in tl.static_range(STATES):
                    c = pick(rows[i], STATES + n, total)
                    before = before + (tl.exp2(deltas[i] * rate[n]) * (g[n] + dv * c),)
                g = before
                total += deltas[i]
        store_states(added, chunk, d, channels, g, STATES)
        tl.store(steps + chunk * channels + d, total, mask=d < channels)


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
def scan_gradients(
    x, delta, A, B, C, D, gate, dy, table, kept, entering,
    dx, ddt, dgate, dBC, dAD, tokens, channels, x_row, gate_row,
    TILE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
    WIDTH: tl.constexpr, HALVINGS: tl.constexpr, EXCHANGES: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Every gradient of a token's, and partial sums of the others, one a program.

    dBC (blocks, 2, T, STATES) are those of B and C, dAD (chunks, STATES + 1, channels) those of A and then D.
    Tile by tile from the right: the states of a tile are computed again from the kept ones and stay in registers.
    Decays are computed twice: held, they would take the registers that let more programs share a multiprocessor.
    """
    WIDE: tl.constexpr = A.dtype.element_ty
    chunk = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    d = block * BLOCK + lane
    row = table + chunk * COLUMNS
    start, stop, first_tile = tl.load(row), tl.load(row + 1), tl.load(row + 5)
    count = (stop - start).to(tl.int32)
    rate = load_rates(A, d, channels, STATES)
    lanes = lanes_bc(B + start * STATES, C + start * STATES, STATES)
    x, gate = x + start * x_row, gate + start * gate_row
    delta, dy = delta + start * channels, dy + start * channels
    dx, ddt, dgate = dx + start * channels, ddt + start * channels, dgate + start * channels
    skip = tl.load(D + d, mask=d < channels, other=0)
    sum_D = tl.zeros((BLOCK,), WIDE)
    sum_rates = zero_states(sum_D, STATES)
    g = load_states(entering, chunk, d, channels, STATES)
    tiles = tl.cdiv(count, TILE)
    for k in range(0, tiles):
        tile = tiles - 1 - k
        h = load_states(kept, first_tile + tile, d, channels, STATES)
        at = tile * TILE
        deltas = load_tile(delta, at, count, channels, d, channels, TILE, KEPT=True)
        xs = load_tile(x, at, count, x_row, d, channels, TILE)
        rows = load_bc(lanes, at, count, TILE, STATES, KEPT=True)
        befores = ()
        for i in tl.static_range(TILE):
            befores = befores + (h,)
            h = advance(h, deltas[i], deltas[i] * xs[i].to(WIDE), rate, rows[i], STATES)
        # Read again: kept from above, what is made of them would fill more registers than there are. (A compiler that
        # sees the same load twice keeps it; these two differ in what they want of the cache.)
        deltas = load_tile(delta, at, count, channels, d, channels, TILE)
        rows = load_bc(lanes, at, count, TILE, STATES)
        gates = load_tile(gate, at, count, gate_row, d, channels, TILE)
        dys = load_tile(dy, at, count, channels, d, channels, TILE)
        for i in tl.static_range(TILE - 1, -1, -1):
            t = at + i
            x_t, z, dy_t = xs[i].to(WIDE), gates[i].to(WIDE), dys[i].to(WIDE)
            s = sigmoid(z)
            dv = dy_t * z * s
            drive = deltas[i] * x_t
            v = skip * x_t
            ddrive = tl.zeros_like(v)
            by_rate = tl.zeros_like(v)
            dbefores = ()
            sums = ()
            of_B = ()
            of_C = ()
            for n in tl.static_range(STATES):
                c = pick(rows[i], STATES + n, v)
                v += h[n] * c
                dh = g[n] + dv * c
                dbefore = tl.exp2(deltas[i] * rate[n]) * dh
                dlog = dbefore * befores[i][n]
                ddrive += dh * pick(rows[i], n, v)
                by_rate += dlog * rate[n]
                dbefores = dbefores + (dbefore,)
                sums = sums + (sum_rates[n] + dlog * deltas[i],)
                of_B = of_B + (dh * drive,)
                of_C = of_C + (h[n] * dv,)
            h = befores[i]
            g = dbefores
            sum_rates = sums
            sum_D += dv * x_t
            live = t < count
            inside = (d < channels) & live
            dz = dy_t * v * s * (1 + z * (1 - s))
            du = ddrive * deltas[i] + skip * dv
            of_dt = (by_rate * LN2 + ddrive * x_t) * step_gradient(deltas[i], TERMS)
            tl.store(dgate + t * channels + d, dz.to(dgate.dtype.element_ty), mask=inside)
            tl.store(dx + t * channels + d, du.to(dx.dtype.element_ty), mask=inside)
            tl.store(ddt + t * channels + d, of_dt.to(ddt.dtype.element_ty), mask=inside)
            sum_B = dBC + (2 * block * tokens + start + t) * STATES
            sum_C = sum_B + tokens * STATES
            store_sums(sum_B, of_B, lane, live, STATES, WIDTH, HALVINGS, EXCHANGES)
            store_sums(sum_C, of_C, lane, live, STATES, WIDTH, HALVINGS, EXCHANGES)
    partial = dAD + chunk * (STATES + 1) * channels
    store_states(partial, 0, d, channels, sum_rates, STATES)
    tl.store(partial + STATES * channels + d, sum_D, mask=d < channels)
