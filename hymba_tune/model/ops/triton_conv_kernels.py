"""Causal conv of reference.py (depthwise, with bias and silu) in Triton; triton_conv.py launches the kernels.

A program owns BLOCK channels, walks over a run of tokens of one document and holds their last K inputs in registers
(the window: a tuple of K vectors, newest last), so that memory is read once. GROUP tokens are loaded together: their
loads overlap.

`table` (runs, COLUMNS) int64 says of a run: its first row of x, the row behind its last one, those of its document, and
the document; unused runs are empty. The meta tokens are document -1 and begin with zeros. The others begin with the
last K of the `meta` meta tokens if META, with `initial` if GIVEN, with zeros if neither.
"""

# Triton's language is compiled, not run: it has types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl

COLUMNS: tl.constexpr = tl.constexpr(5)


@triton.jit
def place(table, channels, BLOCK: tl.constexpr):
    """The run of this program, its channels, and what the table says of the run."""
    blocks = tl.cdiv(channels, BLOCK)
    run = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = table + run * COLUMNS
    return run, d, tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def load_group(base, inside, live, row, GROUP: tl.constexpr):
    """GROUP rows from base on in their own type, so that they fill fewer registers; zeros from row `live` on."""
    rows = ()
    for i in tl.static_range(GROUP):
        rows = rows + (tl.load(base + i * row, mask=inside & (i < live), other=0),)
    return rows


@triton.jit
def sigmoid(z):
    return 1 / (1 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def load_taps(weight, d, channels, K: tl.constexpr, WIDE: tl.constexpr):
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (tl.load(weight + d * K + k, mask=d < channels, other=0).to(WIDE),)
    return taps


@triton.jit
def load_input(
    x, initial, source, begin, document, meta, d, channels, x_row, initial_row,
    K: tl.constexpr, META: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The input of a document at row `source` of x; where that lies before its `begin`, of what it begins with."""
    own = source >= begin
    entered = (source < begin) & (document >= 0)
    live = own
    if META:
        source = tl.where(own, source, meta + source - begin)
        live = own | (entered & (source >= 0))
    value = tl.load(x + source * x_row + d, mask=(d < channels) & live, other=0)
    if GIVEN:
        at = (document * initial_row * channels + d) * K + (K + source - begin)
        value += tl.load(initial + at, mask=(d < channels) & entered, other=0)
    return value


@triton.jit
def load_window(
    x, initial, start, begin, document, meta, d, channels, x_row, initial_row,
    K: tl.constexpr, META: tl.constexpr, GIVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The window before row `start`. Nothing reads its oldest input."""
    window = (tl.zeros(d.shape, WIDE),)
    for k in tl.static_range(1, K):
        value = load_input(
            x, initial, start - K + k, begin, document, meta, d, channels, x_row, initial_row, K, META, GIVEN
        )
        window = window + (value.to(WIDE),)
    return window


@triton.jit
def zeros(like, K: tl.constexpr):
    vectors = ()
    for _ in tl.static_range(K):
        vectors = vectors + (tl.zeros_like(like),)
    return vectors


@triton.jit
def push(window, row, K: tl.constexpr):
    moved = ()
    for k in tl.static_range(1, K):
        moved = moved + (window[k],)
    return moved + (row,)


@triton.jit
def convolve(window, taps, shift, K: tl.constexpr):
    """bias + sum over taps, before silu."""
    z = shift
    for k in tl.static_range(K):
        z += taps[k] * window[k]
    return z


@triton.jit
def conv_forward(
    x, weight, bias, initial, table, cu_seqlens, y, final, runs, meta, channels, x_row, initial_row,
    K: tl.constexpr, META: tl.constexpr, GIVEN: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs of runs, then of documents, which write final states."""
    if tl.program_id(0) < runs * tl.cdiv(channels, BLOCK):
        outputs(
            x, weight, bias, initial, table, y, meta, channels, x_row, initial_row, K, META, GIVEN, GROUP, BLOCK
        )  # fmt: skip
    else:
        final_state(
            x, initial, cu_seqlens, final, runs, meta, channels, x_row, initial_row, K, META, GIVEN, BLOCK
        )  # fmt: skip


@triton.jit
def outputs(
    x, weight, bias, initial, table, y, meta, channels, x_row, initial_row,
    K: tl.constexpr, META: tl.constexpr, GIVEN: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    _, d, start, stop, begin, _, document = place(table, channels, BLOCK)
    taps = load_taps(weight, d, channels, K, WIDE)
    shift = tl.load(bias + d, mask=d < channels, other=0).to(WIDE)
    window = load_window(
        x, initial, start, begin, document, meta, d, channels, x_row, initial_row, K, META, GIVEN, WIDE
    )  # fmt: skip
    inside = d < channels
    for at in range(start, stop, GROUP):
        live = (stop - at).to(tl.int32)
        rows = load_group(x + at * x_row + d, inside, live, x_row, GROUP)
        to = y + at * channels
        for i in tl.static_range(GROUP):
            window = push(window, rows[i].to(WIDE), K)
            z = convolve(window, taps, shift, K)
            tl.store(to + i * channels + d, (z * sigmoid(z)).to(y.dtype.element_ty), mask=inside & (i < live))


@triton.jit
def final_state(
    x, initial, cu_seqlens, final, runs, meta, channels, x_row, initial_row,
    K: tl.constexpr, META: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last K inputs of a document, those that it begins with included, into (documents, channels, K)."""
    blocks = tl.cdiv(channels, BLOCK)
    document = (tl.program_id(0) // blocks - runs).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    begin, end = meta + tl.load(cu_seqlens + document), meta + tl.load(cu_seqlens + document + 1)
    for k in tl.static_range(K):
        value = load_input(
            x, initial, end - K + k, begin, document, meta, d, channels, x_row, initial_row, K, META, GIVEN
        )
        tl.store(final + (document * channels + d) * K + k, value, mask=d < channels)


@triton.jit
def before_silu(z, dy):
    """Gradient of z, where y = silu(z)."""
    s = sigmoid(z)
    return dy * s * (1 + z * (1 - s))


@triton.jit
def spread(pending, dz, taps, K: tl.constexpr):
    """Gradients of the last K tokens, newest first, when dz of one more is known."""
    moved = (taps[K - 1] * dz,)
    for k in tl.static_range(1, K):
        moved = moved + (pending[k - 1] + taps[K - 1 - k] * dz,)
    return moved


@triton.jit
def held_by_final(dfinal, token, length, to_end, document, d, channels, K: tl.constexpr):
    """What the final state adds to the gradient of a token of a run, whose first token is `to_end` before the end."""
    slot = K + token - to_end
    held = (d < channels) & (token >= 0) & (token < length) & (slot >= 0) & (document >= 0)
    return tl.load(dfinal + (document * channels + d) * K + slot, mask=held, other=0)


@triton.jit
def conv_gradients(
    x, weight, bias, initial, table, dy, dfinal, dx, parts, dinitial, meta, channels, x_row, initial_row,
    K: tl.constexpr, META: tl.constexpr, GIVEN: tl.constexpr, FINAL: tl.constexpr, LEARNED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, and of each run a row of `parts`: if LEARNED dweight (channels, K) and dbias (channels), if META the gradient
    of the state that documents begin with (K, channels). If GIVEN that is dinitial (documents, channels, K).

    The gradient of a token is complete K - 1 tokens later, so the walk goes on for so many behind the run.
    """
    WIDE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    run, d, start, stop, begin, end, document = place(table, channels, BLOCK)
    taps = load_taps(weight, d, channels, K, WIDE)
    shift = tl.load(bias + d, mask=d < channels, other=0).to(WIDE)
    window = load_window(
        x, initial, start, begin, document, meta, d, channels, x_row, initial_row, K, META, GIVEN, WIDE
    )  # fmt: skip
    pending, dweight, dbias = zeros(shift, K), zeros(shift, K), tl.zeros_like(shift)
    inside, length = d < channels, (stop - start).to(tl.int32)
    for done in range(0, length, GROUP):
        at = start + done
        rows = load_group(x + at * x_row + d, inside, length - done, x_row, GROUP)
        upstream = load_group(dy + at * channels + d, inside, length - done, channels, GROUP)
        to = dx + (at - (K - 1)) * channels + d
        for i in tl.static_range(GROUP):
            window = push(window, rows[i].to(WIDE), K)
            dz = before_silu(convolve(window, taps, shift, K), upstream[i].to(WIDE))
            if LEARNED:
                dbias += dz
                summed = ()
                for k in tl.static_range(K):
                    summed = summed + (dweight[k] + dz * window[k],)
                dweight = summed
            pending = spread(pending, dz, taps, K)
            grad, token = pending[K - 1], done + (i - (K - 1))
            if FINAL:
                grad += held_by_final(dfinal, token, length, end - start, document, d, channels, K).to(WIDE)
            live = inside & (token >= 0) & (token < length)
            tl.store(to + i * channels, grad.to(dx.dtype.element_ty), mask=live)
    # Where the last group was not full the document ends: there is nothing behind it.
    done = tl.cdiv(length, GROUP) * GROUP
    at = start + done
    rows = load_group(x + at * x_row + d, inside, end - at, x_row, K - 1)
    upstream = load_group(dy + at * channels + d, inside, end - at, channels, K - 1)
    to = dx + (at - (K - 1)) * channels + d
    for i in tl.static_range(K - 1):
        window = push(window, rows[i].to(WIDE), K)
        dz = before_silu(convolve(window, taps, shift, K), upstream[i].to(WIDE))
        pending = spread(pending, dz, taps, K)
        grad, token = pending[K - 1], done + (i - (K - 1))
        if FINAL:
            grad += held_by_final(dfinal, token, length, end - start, document, d, channels, K).to(WIDE)
        live = inside & (token >= 0) & (token < length)
        tl.store(to + i * channels, grad.to(dx.dtype.element_ty), mask=live)
    part = parts + run * channels * (LEARNED * (K + 1) + META * K)
    if LEARNED:
        for k in tl.static_range(K):
            tl.store(part + d * K + k, dweight[k], mask=d < channels)
        tl.store(part + channels * K + d, dbias, mask=d < channels)
    first = (start < stop) & (start == begin) & (document >= 0)
    if META:
        base = part + channels * (LEARNED * (K + 1))
        state_gradient(
            x, initial, dy, base, channels, 1, first, start, end, document, meta, taps, shift, d, channels, x_row,
            initial_row, K, META, GIVEN, WIDE,
        )  # fmt: skip
    if GIVEN:
        if first:
            base = dinitial + document * channels * K
            state_gradient(
                x, initial, dy, base, 1, K, first, start, end, document, meta, taps, shift, d, channels, x_row,
                initial_row, K, META, GIVEN, WIDE,
            )  # fmt: skip


@triton.jit
def state_gradient(
    x, initial, dy, base, slot_stride, channel_stride, wanted, begin, end, document, meta, taps, shift, d, channels,
    x_row, initial_row, K: tl.constexpr, META: tl.constexpr, GIVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of what a document begins with, of its first K - 1 tokens, which are computed once more; zeros where it
    is not wanted."""
    window = load_window(
        x, initial, begin, begin, document, meta, d, channels, x_row, initial_row, K, META, GIVEN, WIDE
    )  # fmt: skip
    live = tl.where(wanted, tl.minimum(end - begin, K), 0).to(tl.int32)
    rows = load_group(x + begin * x_row + d, d < channels, live, x_row, K - 1)
    upstream = load_group(dy + begin * channels + d, d < channels, live, channels, K - 1)
    early = ()
    for i in tl.static_range(K - 1):
        window = push(window, rows[i].to(WIDE), K)
        dz = before_silu(convolve(window, taps, shift, K), upstream[i].to(WIDE))
        early = early + (tl.where(i < live, dz, 0.0),)
    for k in tl.static_range(K):
        grad = tl.zeros_like(shift)
        for i in tl.static_range(k):
            grad += taps[k - 1 - i] * early[i]
        tl.store(base + k * slot_stride + d * channel_stride, grad, mask=d < channels)
