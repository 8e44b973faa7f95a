/* Selective scan of reference.py, forward and backward, vectorised over channels.

   Work is cut into groups of channels, which share nothing but the sums over channels in the gradients of B and C; each
   group goes through the segments in order. In a segment time is cut into chunks of SCAN_CHUNK tokens: the forward
   keeps the states at chunk starts (not of a segment's first: that's its initial state), and the backward recomputes
   a chunk's states and decays from there, which then fit into the cache. Where there are meta tokens, they are segment
   0, which starts from zeros and leaves its state in `initial`, where every other segment starts.

   Shapes, row-major: x, gate, y (T, channels) IO, dt (T, channels), A (states, channels), B, C (T, states), D
   (channels), initial, final (segments without meta tokens, states, channels). Rows may be slices of wider rows where a
   stride is given. Rates are A * log2(e).
   In a group, arrays of vectors are (blocks, states), and of a chunk (tokens, states). */

#define PADDING 9 /* vectors between arrays, lest equal indices compete for the same cache sets */

typedef struct {
    int64_t threads, segments, channels, states, meta; /* meta: 1 if segment 0 is the meta tokens, else 0 */
    const int64_t *cu_seqlens;
    const IO *x, *gate;
    int64_t x_stride, gate_stride, dt_stride;
    const REAL *dt, *A, *B, *C, *D;
    REAL *initial; /* or NULL: zeros */
    int64_t initial_stride; /* 0: one state shared by all segments */
    VEC *checkpoints; /* (T / SCAN_CHUNK, blocks of all channels, states), or NULL where no gradient is wanted */
} NAME(scan);

typedef struct {
    const IO *y;
    const REAL *final; /* or NULL: zeros */
    IO *x, *gate;
    REAL *dt, *A, *B, *C, *D;
    REAL *initial; /* or NULL: not wanted */
} NAME(scan_gradients);

/* (states, channels) in memory, NULL for zeros -> (blocks, states) vectors over lanes, and back. States are the outer
   loop, for neighbouring channels are neighbours in memory. */
INLINE void NAME(load_states)(VEC *to, const REAL *from, int states, int64_t channels, int64_t first, int blocks) {
    for (int n = 0; n < states; n++)
        for (int b = 0; b < blocks; b++) {
            int64_t channel = first + b * LANES;
            to[b * states + n] =
                from ? NAME(load)(from + n * channels + channel, NAME(lanes)(channels, channel)) : (VEC){0};
        }
}

INLINE void NAME(store_states)(REAL *to, const VEC *from, int states, int64_t channels, int64_t first, int blocks) {
    for (int n = 0; n < states; n++)
        for (int b = 0; b < blocks; b++) {
            int64_t channel = first + b * LANES;
            NAME(store)(to + n * channels + channel, from[b * states + n], NAME(lanes)(channels, channel));
        }
}

INLINE void NAME(load_rates)(VEC *rates, const NAME(scan) *in, int states, int64_t first, int blocks) {
    NAME(load_states)(rates, in->A, states, in->channels, first, blocks);
    for (int i = 0; i < blocks * states; i++) rates[i] *= LOG2E;
}

INLINE const REAL *NAME(initial)(const NAME(scan) *in, int64_t s) {
    return in->initial && s >= in->meta ? in->initial + s * in->initial_stride : NULL;
}

/* Where the state before chunk `c` >= 1 of the segment that starts at token `start` is kept. */
INLINE VEC *NAME(checkpoint)(const NAME(scan) *in, int64_t start, int64_t c, int64_t channel, int states) {
    int64_t blocks = (in->channels + LANES - 1) / LANES;
    return in->checkpoints + ((start / SCAN_CHUNK + c - 1) * blocks + channel / LANES) * states;
}

/* One block of channels through `length` tokens from `token`; `state` goes in and comes out. */
INLINE void NAME(scan_forward_block)(const NAME(scan) *in, int64_t token, int length, int64_t channel, int states,
                                     const VEC *rates, VEC *state, IO *y) {
    int lanes = NAME(lanes)(in->channels, channel);
    VEC skip = NAME(load)(in->D + channel, lanes);
    VEC registers[16], *h = states == 16 ? registers : state;
    if (states == 16) memcpy(registers, state, sizeof registers);
    for (int64_t t = token; t < token + length; t++) {
        VEC x = NAME(load_io)(in->x + t * in->x_stride + channel, lanes);
        VEC dt = NAME(load)(in->dt + t * in->dt_stride + channel, lanes);
        VEC gate = NAME(load_io)(in->gate + t * in->gate_stride + channel, lanes);
        VEC delta = NAME(softplus)(dt, NAME(exp_negative_magnitude)(dt));
        VEC drive = delta * x, sum = skip * x;
        const REAL *B = in->B + t * states, *C = in->C + t * states;
#pragma GCC unroll 16
        for (int n = 0; n < states; n++) {
            h[n] = NAME(exp2)(delta * rates[n]) * h[n] + drive * B[n];
            sum += h[n] * C[n];
        }
        sum *= gate * NAME(sigmoid)(gate, NAME(exp_negative_magnitude)(gate));
        NAME(store_io)(y + t * in->channels + channel, sum, lanes);
    }
    if (states == 16) memcpy(state, registers, sizeof registers);
}

INLINE void NAME(scan_forward_group)(const NAME(scan) *in, int64_t first, int states, IO *y, REAL *final) {
    int blocks = NAME(blocks_in_group)(in->channels, first);
    VEC *rates = aligned_alloc(VECTOR_BYTES, 2 * blocks * states * sizeof(VEC)), *state = rates + blocks * states;
    NAME(load_rates)(rates, in, states, first, blocks);
    for (int64_t s = 0; s < in->segments; s++) {
        int64_t start = in->cu_seqlens[s], end = in->cu_seqlens[s + 1];
        NAME(load_states)(state, NAME(initial)(in, s), states, in->channels, first, blocks);
        for (int64_t t = start, c = 0; t < end; t += SCAN_CHUNK, c++)
            for (int b = 0; b < blocks; b++) {
                int64_t channel = first + b * LANES;
                if (c && in->checkpoints)
                    memcpy(NAME(checkpoint)(in, start, c, channel, states), state + b * states, states * sizeof(VEC));
                NAME(scan_forward_block)(in, t, (int)MIN(SCAN_CHUNK, end - t), channel, states, rates + b * states,
                                         state + b * states, y);
            }
        REAL *end_state = s < in->meta ? in->initial : final + (s - in->meta) * states * in->channels;
        NAME(store_states)(end_state, state, states, in->channels, first, blocks);
    }
    free(rates);
}

void NAME(scan_forward)(const NAME(scan) *in, IO *y, REAL *final) {
    int64_t group = NAME(group_size)(in->channels);
#pragma omp parallel for num_threads(in->threads) schedule(dynamic)
    for (int64_t first = 0; first < in->channels; first += group)
        if (in->states == 16) NAME(scan_forward_group)(in, first, 16, y, final);
        else NAME(scan_forward_group)(in, first, (int)in->states, y, final);
}

/* What the backward of a group keeps between chunks (blocks, states) and inside one (tokens, states). */
typedef struct {
    int64_t first;
    int blocks;
    REAL *B, *C; /* (T, states): this group's part of the gradients */
    VEC *rates, *dstate, *dA, *dinitial;
    VEC *before, *decay, *dB, *dC; /* before: the state before each token, and after the last */
    VEC delta[SCAN_CHUNK], slope[SCAN_CHUNK], x[SCAN_CHUNK], dsum[SCAN_CHUNK]; /* slope: d delta / d dt */
    VEC dD[MAX_BLOCKS];
} NAME(scan_workspace);

/* Recomputes a chunk's states and decays; the gate's gradient needs no more than that. */
INLINE void NAME(scan_recompute_block)(const NAME(scan) *in, const NAME(scan_gradients) *grad, int64_t token,
                                       int length, int64_t channel, int states, const VEC *rates,
                                       NAME(scan_workspace) *w) {
    int lanes = NAME(lanes)(in->channels, channel);
    VEC skip = NAME(load)(in->D + channel, lanes);
    for (int i = 0; i < length; i++) {
        int64_t t = token + i;
        VEC x = NAME(load_io)(in->x + t * in->x_stride + channel, lanes);
        VEC dt = NAME(load)(in->dt + t * in->dt_stride + channel, lanes);
        VEC gate = NAME(load_io)(in->gate + t * in->gate_stride + channel, lanes);
        VEC dy = NAME(load_io)(grad->y + t * in->channels + channel, lanes);
        VEC u = NAME(exp_negative_magnitude)(dt), delta = NAME(softplus)(dt, u);
        VEC drive = delta * x, sum = skip * x;
        const REAL *B = in->B + t * states, *C = in->C + t * states;
        VEC *before = w->before + i * states, *after = before + states, *decay = w->decay + i * states;
#pragma GCC unroll 16
        for (int n = 0; n < states; n++) {
            decay[n] = NAME(exp2)(delta * rates[n]);
            after[n] = decay[n] * before[n] + drive * B[n];
            sum += after[n] * C[n];
        }
        VEC sigmoid = NAME(sigmoid)(gate, NAME(exp_negative_magnitude)(gate));
        NAME(store_io)(grad->gate + t * in->channels + channel, dy * sum * sigmoid * (1 + gate * (1 - sigmoid)), lanes);
        w->x[i] = x;
        w->delta[i] = delta;
        w->slope[i] = NAME(sigmoid)(dt, u);
        w->dsum[i] = dy * gate * sigmoid;
    }
}

/* Fetches row t of the block that comes next, in this chunk or, after its last block, in the chunk before: rows lie
   further apart than the hardware looks ahead. */
INLINE void NAME(prefetch_next_block)(const NAME(scan) *in, const NAME(scan_gradients) *grad, int64_t t,
                                      int64_t channel, const NAME(scan_workspace) *w) {
    channel += LANES;
    if (channel == w->first + w->blocks * LANES) channel = w->first, t = MAX(t - SCAN_CHUNK, 0);
    __builtin_prefetch(in->x + t * in->x_stride + channel);
    __builtin_prefetch(in->dt + t * in->dt_stride + channel);
    __builtin_prefetch(in->gate + t * in->gate_stride + channel);
    __builtin_prefetch(grad->y + t * in->channels + channel);
    __builtin_prefetch(grad->x + t * in->channels + channel, 1);
    __builtin_prefetch(grad->dt + t * in->channels + channel, 1);
    __builtin_prefetch(grad->gate + t * in->channels + channel, 1);
}

/* Goes through a recomputed chunk backwards; `b` is the block's number in its group. */
INLINE void NAME(scan_backward_block)(const NAME(scan) *in, const NAME(scan_gradients) *grad, int64_t token, int length,
                                      int b, int states, NAME(scan_workspace) *w) {
    int64_t channel = w->first + b * LANES;
    int lanes = NAME(lanes)(in->channels, channel);
    VEC skip = NAME(load)(in->D + channel, lanes);
    VEC *rates = w->rates + b * states, *dstate = w->dstate + b * states, *dA = w->dA + b * states;
    for (int i = length - 1; i >= 0; i--) {
        int64_t t = token + i;
        NAME(prefetch_next_block)(in, grad, t, channel, w);
        VEC x = w->x[i], delta = w->delta[i], dsum = w->dsum[i];
        VEC drive = delta * x, ddrive = {0}, dexponent = {0};
        const REAL *B = in->B + t * states, *C = in->C + t * states;
        VEC *before = w->before + i * states, *after = before + states, *decay = w->decay + i * states;
        VEC *dB = w->dB + i * states, *dC = w->dC + i * states;
#pragma GCC unroll 16
        for (int n = 0; n < states; n++) {
            VEC g = dstate[n] + dsum * C[n];
            dC[n] += dsum * after[n];
            dB[n] += drive * g;
            ddrive += g * B[n];
            g *= decay[n];
            VEC dlog = g * before[n]; /* gradient of delta * A */
            dexponent += dlog * rates[n];
            dA[n] += dlog * delta;
            dstate[n] = g;
        }
        w->dD[b] += dsum * x;
        NAME(store)(grad->dt + t * in->channels + channel, (dexponent * LN2 + ddrive * x) * w->slope[i], lanes);
        NAME(store_io)(grad->x + t * in->channels + channel, dsum * skip + ddrive * delta, lanes);
    }
}

/* Chunk `c` of segment `s`, all blocks of the group. */
INLINE void NAME(scan_backward_chunk)(const NAME(scan) *in, const NAME(scan_gradients) *grad, int64_t s, int64_t c,
                                      int states, NAME(scan_workspace) *w) {
    int64_t start = in->cu_seqlens[s], token = start + c * SCAN_CHUNK;
    int length = (int)MIN(SCAN_CHUNK, in->cu_seqlens[s + 1] - token);
    memset(w->dB, 0, SCAN_CHUNK * states * sizeof(VEC));
    memset(w->dC, 0, SCAN_CHUNK * states * sizeof(VEC));
    for (int b = 0; b < w->blocks; b++) {
        int64_t channel = w->first + b * LANES;
        if (c) memcpy(w->before, NAME(checkpoint)(in, start, c, channel, states), states * sizeof(VEC));
        else NAME(load_states)(w->before, NAME(initial)(in, s), states, in->channels, channel, 1);
        NAME(scan_recompute_block)(in, grad, token, length, channel, states, w->rates + b * states, w);
        NAME(scan_backward_block)(in, grad, token, length, b, states, w);
    }
    for (int i = 0; i < length * states; i++) {
        w->B[token * states + i] = NAME(sum_lanes)(w->dB[i]);
        w->C[token * states + i] = NAME(sum_lanes)(w->dC[i]);
    }
}

/* The state's gradient comes from `final` at the segment's end and goes to `initial`, summed where that is shared; at
   the end of the meta tokens it is that sum. */
INLINE void NAME(scan_backward_segment)(const NAME(scan) *in, const NAME(scan_gradients) *grad, int64_t s, int states,
                                        NAME(scan_workspace) *w) {
    int64_t state = states * in->channels;
    if (s < in->meta) memcpy(w->dstate, w->dinitial, w->blocks * states * sizeof(VEC));
    else
        NAME(load_states)(w->dstate, grad->final ? grad->final + (s - in->meta) * state : NULL, states, in->channels,
                          w->first, w->blocks);
    int64_t chunks = (in->cu_seqlens[s + 1] - in->cu_seqlens[s] + SCAN_CHUNK - 1) / SCAN_CHUNK;
    for (int64_t c = chunks - 1; c >= 0; c--) NAME(scan_backward_chunk)(in, grad, s, c, states, w);
    for (int i = 0; i < w->blocks * states; i++) w->dinitial[i] += w->dstate[i];
    if (grad->initial && in->initial_stride)
        NAME(store_states)(grad->initial + s * state, w->dstate, states, in->channels, w->first, w->blocks);
}

INLINE void NAME(scan_backward_group)(const NAME(scan) *in, const NAME(scan_gradients) *grad, int64_t first, int states,
                                      REAL *B, REAL *C) {
    NAME(scan_workspace) *w = aligned_alloc(VECTOR_BYTES, sizeof *w);
    *w = (NAME(scan_workspace)){.first = first, .blocks = NAME(blocks_in_group)(in->channels, first), .B = B, .C = C};
    int64_t across = w->blocks * states + PADDING, inside = (SCAN_CHUNK + 1) * states + PADDING;
    w->rates = aligned_alloc(VECTOR_BYTES, 4 * (across + inside) * sizeof(VEC));
    w->dstate = w->rates + across;
    w->dA = w->dstate + across;
    w->dinitial = w->dA + across;
    w->before = w->dinitial + across;
    w->decay = w->before + inside;
    w->dB = w->decay + inside;
    w->dC = w->dB + inside;
    memset(w->dA, 0, 2 * across * sizeof(VEC));
    NAME(load_rates)(w->rates, in, states, first, w->blocks);
    for (int64_t s = in->segments - 1; s >= 0; s--) NAME(scan_backward_segment)(in, grad, s, states, w);
    NAME(store_states)(grad->A, w->dA, states, in->channels, first, w->blocks);
    if (grad->initial && !in->initial_stride)
        NAME(store_states)(grad->initial, w->dinitial, states, in->channels, first, w->blocks);
    for (int b = 0; b < w->blocks; b++) {
        int64_t channel = first + b * LANES;
        NAME(store)(grad->D + channel, w->dD[b], NAME(lanes)(in->channels, channel));
    }
    free(w->rates);
    free(w);
}

void NAME(scan_backward)(const NAME(scan) *in, const NAME(scan_gradients) *grad) {
    int64_t group = NAME(group_size)(in->channels), groups = (in->channels + group - 1) / group;
    int64_t size = in->cu_seqlens[in->segments] * in->states;
    REAL *parts = malloc(2 * groups * size * sizeof(REAL)); /* (groups, 2, T, states) */
#pragma omp parallel for num_threads(in->threads) schedule(dynamic)
    for (int64_t g = 0; g < groups; g++) {
        REAL *B = parts + 2 * g * size, *C = B + size;
        if (in->states == 16) NAME(scan_backward_group)(in, grad, g * group, 16, B, C);
        else NAME(scan_backward_group)(in, grad, g * group, (int)in->states, B, C);
    }
    memset(grad->B, 0, size * sizeof(REAL));
    memset(grad->C, 0, size * sizeof(REAL));
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < size; i++) {
            grad->B[i] += parts[2 * g * size + i];
            grad->C[i] += parts[(2 * g + 1) * size + i];
        }
    free(parts);
}

#undef PADDING
