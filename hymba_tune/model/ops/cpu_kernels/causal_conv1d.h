/* Causal conv of reference.py (depthwise, with bias and silu), forward and backward, vectorised over channels.

   A segment's history h is its initial state followed by its inputs: h[0 .. K-1] = initial, h[K + i] = x[start + i], so
   that output i reads h[i + 1 .. i + K] and the final state is the last K of h. The last K rows of h (and of its
   gradient) are kept in a ring: row j in slot j % K. Where there are meta tokens, they are segment 0, which starts from
   zeros and leaves its state in `initial`, where every other segment starts.

   Shapes, row-major: x, y (T, channels), initial, final (segments without meta tokens, K, channels), all IO; weight
   (K, channels), bias (channels). In a group, a row is `blocks` vectors, a ring K rows. */

typedef struct {
    int64_t threads, segments, channels, taps, meta; /* meta: 1 if segment 0 is the meta tokens, else 0 */
    const int64_t *cu_seqlens;
    const IO *x;
    int64_t x_stride;
    const REAL *weight, *bias;
    IO *initial; /* or NULL: zeros */
    int64_t initial_stride; /* 0: one state shared by all segments */
} NAME(conv);

typedef struct {
    const IO *y;
    const IO *final; /* or NULL: zeros */
    IO *x;
    REAL *weight, *bias;
    REAL *initial; /* or NULL: not wanted */
} NAME(conv_gradients);

INLINE void NAME(load_rows)(VEC *to, const IO *from, int rows, int blocks, int64_t channels, int64_t first) {
    for (int k = 0; k < rows; k++)
        for (int b = 0; b < blocks; b++) {
            int64_t channel = first + b * LANES;
            to[k * blocks + b] = NAME(load_io)(from + k * channels + channel, NAME(lanes)(channels, channel));
        }
}

INLINE void NAME(load_row)(VEC *to, const REAL *from, int blocks, int64_t channels, int64_t first) {
    for (int b = 0; b < blocks; b++)
        to[b] = NAME(load)(from + first + b * LANES, NAME(lanes)(channels, first + b * LANES));
}

INLINE void NAME(store_row)(REAL *to, const VEC *from, int blocks, int64_t channels, int64_t first) {
    for (int b = 0; b < blocks; b++)
        NAME(store)(to + first + b * LANES, from[b], NAME(lanes)(channels, first + b * LANES));
}

INLINE void NAME(start_ring)(const NAME(conv) *in, int64_t s, int64_t first, int taps, int blocks, VEC *ring) {
    if (!in->initial || s < in->meta) memset(ring, 0, taps * blocks * sizeof(VEC));
    else NAME(load_rows)(ring, in->initial + s * in->initial_stride, taps, blocks, in->channels, first);
}

/* bias + sum_k weight[k] h[i + 1 + k], block b */
INLINE VEC NAME(convolve)(const VEC *weight, const VEC *bias, const VEC *ring, int64_t i, int taps, int blocks, int b) {
    VEC z = bias[b];
#pragma GCC unroll 4
    for (int k = 0; k < taps; k++) z += weight[k * blocks + b] * ring[(i + 1 + k) % taps * blocks + b];
    return z;
}

INLINE void NAME(conv_forward_group)(const NAME(conv) *in, int64_t first, int taps, IO *y, IO *final) {
    int64_t channels = in->channels;
    int blocks = NAME(blocks_in_group)(channels, first);
    VEC *weight = aligned_alloc(VECTOR_BYTES, (2 * taps + 1) * blocks * sizeof(VEC));
    VEC *ring = weight + taps * blocks, *bias = ring + taps * blocks;
    for (int k = 0; k < taps; k++)
        NAME(load_row)(weight + k * blocks, in->weight + k * channels, blocks, channels, first);
    NAME(load_row)(bias, in->bias, blocks, channels, first);
    for (int64_t s = 0; s < in->segments; s++) {
        int64_t start = in->cu_seqlens[s], length = in->cu_seqlens[s + 1] - start;
        NAME(start_ring)(in, s, first, taps, blocks, ring);
        for (int64_t i = 0; i < length; i++) {
            NAME(load_rows)(ring + i % taps * blocks, in->x + (start + i) * in->x_stride, 1, blocks, channels, first);
            for (int b = 0; b < blocks; b++) {
                int64_t channel = first + b * LANES;
                VEC z = NAME(convolve)(weight, bias, ring, i, taps, blocks, b);
                VEC silu = z * NAME(sigmoid)(z, NAME(exp_negative_magnitude)(z));
                NAME(store_io)(y + (start + i) * channels + channel, silu, NAME(lanes)(channels, channel));
            }
        }
        IO *end_state = s < in->meta ? in->initial : final + (s - in->meta) * taps * channels;
        for (int k = 0; k < taps; k++)
            for (int b = 0; b < blocks; b++) {
                int64_t channel = first + b * LANES;
                NAME(store_io)(end_state + k * channels + channel, ring[(length + k) % taps * blocks + b],
                               NAME(lanes)(channels, channel));
            }
    }
    free(weight);
}

void NAME(conv_forward)(const NAME(conv) *in, IO *y, IO *final) {
    int64_t group = NAME(group_size)(in->channels);
#pragma omp parallel for num_threads(in->threads) schedule(dynamic)
    for (int64_t first = 0; first < in->channels; first += group)
        if (in->taps == 4) NAME(conv_forward_group)(in, first, 4, y, final);
        else NAME(conv_forward_group)(in, first, (int)in->taps, y, final);
}

typedef struct {
    int64_t first;
    int blocks;
    VEC *weight, *ring, *dring, *dweight, *dinitial; /* (K, blocks) */
    VEC bias[MAX_BLOCKS], dbias[MAX_BLOCKS];
} NAME(conv_workspace);

/* Row j of the history's gradient is complete but for the final state's part: adds that and writes the row out. */
INLINE void NAME(conv_flush)(const NAME(conv) *in, const NAME(conv_gradients) *grad, int64_t s, int64_t j, int taps,
                             NAME(conv_workspace) *w) {
    int64_t start = in->cu_seqlens[s], length = in->cu_seqlens[s + 1] - start;
    for (int b = 0; b < w->blocks; b++) {
        int64_t channel = w->first + b * LANES;
        int lanes = NAME(lanes)(in->channels, channel);
        VEC row = w->dring[j % taps * w->blocks + b];
        if (s < in->meta && j >= length) row += w->dinitial[(j - length) * w->blocks + b];
        else if (grad->final && j >= length)
            row += NAME(load_io)(grad->final + ((s - in->meta) * taps + j - length) * in->channels + channel, lanes);
        if (j >= taps) NAME(store_io)(grad->x + (start + j - taps) * in->channels + channel, row, lanes);
        else if (s >= in->meta) w->dinitial[j * w->blocks + b] += row;
    }
}

INLINE void NAME(conv_backward_token)(const NAME(conv) *in, const NAME(conv_gradients) *grad, int64_t t, int64_t i,
                                      int taps, NAME(conv_workspace) *w) {
    int blocks = w->blocks;
    NAME(load_rows)(w->ring + i % taps * blocks, in->x + t * in->x_stride, 1, blocks, in->channels, w->first);
    for (int b = 0; b < blocks; b++) {
        int64_t channel = w->first + b * LANES;
        VEC dy = NAME(load_io)(grad->y + t * in->channels + channel, NAME(lanes)(in->channels, channel));
        VEC z = NAME(convolve)(w->weight, w->bias, w->ring, i, taps, blocks, b);
        VEC sigmoid = NAME(sigmoid)(z, NAME(exp_negative_magnitude)(z));
        VEC dz = dy * sigmoid * (1 + z * (1 - sigmoid));
        w->dbias[b] += dz;
        w->dring[i % taps * blocks + b] = (VEC){0};
#pragma GCC unroll 4
        for (int k = 0; k < taps; k++) {
            int64_t row = (i + 1 + k) % taps * blocks + b;
            w->dweight[k * blocks + b] += dz * w->ring[row];
            w->dring[row] += dz * w->weight[k * blocks + b];
        }
    }
}

/* Segments that share the initial state add to `dinitial`, which is written after the first of them, the last to come
   here, or read by the meta tokens. */
INLINE void NAME(conv_backward_segment)(const NAME(conv) *in, const NAME(conv_gradients) *grad, int64_t s, int taps,
                                        NAME(conv_workspace) *w) {
    int64_t start = in->cu_seqlens[s], length = in->cu_seqlens[s + 1] - start;
    if (in->initial_stride) memset(w->dinitial, 0, taps * w->blocks * sizeof(VEC));
    memset(w->dring, 0, taps * w->blocks * sizeof(VEC));
    NAME(start_ring)(in, s, w->first, taps, w->blocks, w->ring);
    NAME(conv_flush)(in, grad, s, 0, taps, w);
    for (int64_t i = 0; i < length; i++) {
        NAME(conv_backward_token)(in, grad, start + i, i, taps, w);
        NAME(conv_flush)(in, grad, s, i + 1, taps, w);
    }
    for (int64_t j = length + 1; j < length + taps; j++) NAME(conv_flush)(in, grad, s, j, taps, w);
    if (!grad->initial || !(in->initial_stride || s == 0)) return;
    for (int k = 0; k < taps; k++)
        NAME(store_row)(grad->initial + s * in->initial_stride + k * in->channels, w->dinitial + k * w->blocks,
                        w->blocks, in->channels, w->first);
}

INLINE void NAME(conv_backward_group)(const NAME(conv) *in, const NAME(conv_gradients) *grad, int64_t first, int taps) {
    int64_t channels = in->channels;
    int blocks = NAME(blocks_in_group)(channels, first), rows = taps * blocks;
    NAME(conv_workspace) *w = aligned_alloc(VECTOR_BYTES, sizeof *w);
    *w = (NAME(conv_workspace)){.first = first, .blocks = blocks};
    w->weight = aligned_alloc(VECTOR_BYTES, 5 * rows * sizeof(VEC));
    w->ring = w->weight + rows;
    w->dring = w->ring + rows;
    w->dweight = w->dring + rows;
    w->dinitial = w->dweight + rows;
    memset(w->dweight, 0, 2 * rows * sizeof(VEC));
    for (int k = 0; k < taps; k++)
        NAME(load_row)(w->weight + k * blocks, in->weight + k * channels, blocks, channels, first);
    NAME(load_row)(w->bias, in->bias, blocks, channels, first);
    for (int64_t s = in->segments - 1; s >= 0; s--) NAME(conv_backward_segment)(in, grad, s, taps, w);
    for (int k = 0; k < taps; k++)
        NAME(store_row)(grad->weight + k * channels, w->dweight + k * blocks, blocks, channels, first);
    NAME(store_row)(grad->bias, w->dbias, blocks, channels, first);
    free(w->weight);
    free(w);
}

void NAME(conv_backward)(const NAME(conv) *in, const NAME(conv_gradients) *grad) {
    int64_t group = NAME(group_size)(in->channels);
#pragma omp parallel for num_threads(in->threads) schedule(dynamic)
    for (int64_t first = 0; first < in->channels; first += group)
        if (in->taps == 4) NAME(conv_backward_group)(in, grad, first, 4);
        else NAME(conv_backward_group)(in, grad, first, (int)in->taps);
}
