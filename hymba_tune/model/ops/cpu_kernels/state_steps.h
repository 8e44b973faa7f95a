/* Conv and scan of reference_steps.py: one token a row, the states changed in place, vectorised over channels.

   Shapes, row-major: x, gate, y (R, channels) IO, dt (R, channels), B, C (R, states), D, bias (channels), A_log
   (channels, states), weight (channels, K); a scan's state (R, states, channels), a conv's (R, K, channels) IO. */

#define LITTLE (1 << 14) /* numbers of a state that are no work for a second thread */

typedef struct {
    int64_t threads, rows, channels, states, x_stride, gate_stride, dt_stride;
    const IO *x, *gate;
    const REAL *dt, *A_log, *B, *C, *D;
    REAL *state;
    IO *y;
} NAME(scan_step_inputs);

typedef struct {
    int64_t threads, rows, channels, taps, x_stride;
    const IO *x;
    const REAL *weight, *bias;
    IO *state, *y;
} NAME(conv_step_inputs);

/* A group's rows of a matrix (channels, width), transposed block by block: (blocks, width). */
INLINE void NAME(load_columns)(VEC *to, const REAL *matrix, int64_t width, int64_t channels, int64_t first) {
    for (int b = 0; b < NAME(blocks_in_group)(channels, first); b++) {
        int64_t channel = first + b * LANES;
        int lanes = NAME(lanes)(channels, channel);
        for (int64_t n = 0; n < width; n++) {
            VEC v = {0};
            for (int i = 0; i < lanes; i++) v[i] = matrix[(channel + i) * width + n];
            *to++ = v;
        }
    }
}

INLINE void NAME(scan_step_block)(const NAME(scan_step_inputs) *in, const VEC *rates, int64_t channel, int64_t row) {
    int lanes = NAME(lanes)(in->channels, channel);
    VEC x = NAME(load_io)(in->x + row * in->x_stride + channel, lanes);
    VEC dt = NAME(load)(in->dt + row * in->dt_stride + channel, lanes);
    VEC gate = NAME(load_io)(in->gate + row * in->gate_stride + channel, lanes);
    VEC delta = NAME(softplus)(dt, NAME(exp_negative_magnitude)(dt)), drive = delta * x;
    VEC sum = NAME(load)(in->D + channel, lanes) * x;
    for (int64_t n = 0; n < in->states; n++) {
        REAL *state = in->state + (row * in->states + n) * in->channels + channel;
        VEC h = NAME(exp2)(delta * rates[n]) * NAME(load)(state, lanes) + drive * in->B[row * in->states + n];
        sum += h * in->C[row * in->states + n];
        NAME(store)(state, h, lanes);
    }
    VEC silu = gate * NAME(sigmoid)(gate, NAME(exp_negative_magnitude)(gate));
    NAME(store_io)(in->y + row * in->channels + channel, sum * silu, lanes);
}

INLINE void NAME(scan_step_group)(const NAME(scan_step_inputs) *in, int64_t first, VEC *rates) {
    int blocks = NAME(blocks_in_group)(in->channels, first);
    NAME(load_columns)(rates, in->A_log, in->states, in->channels, first);
    for (int64_t i = 0; i < blocks * in->states; i++) rates[i] = NAME(exp2)(rates[i] * LOG2E) * -LOG2E;
    for (int64_t row = 0; row < in->rows; row++)
        for (int b = 0; b < blocks; b++) NAME(scan_step_block)(in, rates + b * in->states, first + b * LANES, row);
}

void NAME(scan_step)(const NAME(scan_step_inputs) *in) {
    int64_t group = NAME(group_size)(in->channels);
#pragma omp parallel for num_threads(in->threads) if (in->rows * in->channels * in->states > LITTLE)
    for (int64_t first = 0; first < in->channels; first += group) {
        VEC *rates = aligned_alloc(VECTOR_BYTES, MAX_BLOCKS * in->states * sizeof(VEC));
        NAME(scan_step_group)(in, first, rates);
        free(rates);
    }
}

/* Each tap moves one place on, x into the last. */
INLINE void NAME(conv_step_block)(const NAME(conv_step_inputs) *in, const VEC *weight, int64_t channel, int64_t row) {
    int lanes = NAME(lanes)(in->channels, channel);
    VEC z = NAME(load)(in->bias + channel, lanes);
    for (int64_t k = 0; k < in->taps; k++) {
        IO *state = in->state + (row * in->taps + k) * in->channels + channel;
        const IO *next = k < in->taps - 1 ? state + in->channels : in->x + row * in->x_stride + channel;
        VEC h = NAME(load_io)(next, lanes);
        NAME(store_io)(state, h, lanes);
        z += weight[k] * h;
    }
    VEC silu = z * NAME(sigmoid)(z, NAME(exp_negative_magnitude)(z));
    NAME(store_io)(in->y + row * in->channels + channel, silu, lanes);
}

INLINE void NAME(conv_step_group)(const NAME(conv_step_inputs) *in, int64_t first, VEC *weight) {
    int blocks = NAME(blocks_in_group)(in->channels, first);
    NAME(load_columns)(weight, in->weight, in->taps, in->channels, first);
    for (int64_t row = 0; row < in->rows; row++)
        for (int b = 0; b < blocks; b++) NAME(conv_step_block)(in, weight + b * in->taps, first + b * LANES, row);
}

void NAME(conv_step)(const NAME(conv_step_inputs) *in) {
    int64_t group = NAME(group_size)(in->channels);
#pragma omp parallel for num_threads(in->threads) if (in->rows * in->channels * in->taps > LITTLE)
    for (int64_t first = 0; first < in->channels; first += group) {
        VEC *weight = aligned_alloc(VECTOR_BYTES, MAX_BLOCKS * in->taps * sizeof(VEC));
        NAME(conv_step_group)(in, first, weight);
        free(weight);
    }
}

#undef LITTLE
