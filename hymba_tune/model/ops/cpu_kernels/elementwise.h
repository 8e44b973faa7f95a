/* Norms, RoPE and SwiGLU of norm.py and modeling.py, forward and backward, each one pass over memory.

   Rows of x, a, b and dy may have gaps between, given as strides in elements; outputs have none. What is computed of
   an element does not depend on the row or the vector that it lies in. */

/* an RMS norm of rows of `size`; or, of two, the mean of both */
typedef struct {
    const IO *x;
    int64_t row;
    const REAL *weight;
    IO *dx;
    REAL *dweight; /* of some rows; or NULL: not wanted */
} NAME(norm);

#define MOST_PARTS 64 /* sums of weights' gradients, each over neighbouring rows */
#define ROWS_OF_A_PART 64 /* at least */
#define FOR_VECTORS(i, size, lanes) \
    for (int64_t i = 0, lanes; lanes = MIN(LANES, (size) - i), i < (size); i += LANES)

INLINE REAL NAME(inverse_rms)(REAL squares, int64_t size, REAL eps) {
    REAL mean = squares / size + eps;
    return 1 / (REAL_IS_DOUBLE ? __builtin_sqrt(mean) : __builtin_sqrtf(mean));
}

/* Sums over a row, in two halves: each addition waits for the one before. */
typedef struct {
    VEC squares[2]; /* of x */
    VEC products[2]; /* of x, dy and the weight */
} NAME(norm_sums);

INLINE void NAME(add_vector)(NAME(norm_sums) *sums, int half, const IO *x, const IO *dy, const REAL *weight,
                             int64_t i, int lanes) {
    VEC value = NAME(load_io)(x + i, lanes);
    sums->squares[half] += value * value;
    if (dy) sums->products[half] += value * NAME(load_io)(dy + i, lanes) * NAME(load)(weight + i, lanes);
}

INLINE NAME(norm_sums) NAME(sum_row)(const IO *x, const IO *dy, const REAL *weight, int64_t size) {
    NAME(norm_sums) sums = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        NAME(add_vector)(&sums, 0, x, dy, weight, i, LANES);
        NAME(add_vector)(&sums, 1, x, dy, weight, i + LANES, LANES);
    }
    for (; i < size; i += LANES) NAME(add_vector)(&sums, 0, x, dy, weight, i, MIN(LANES, size - i));
    sums.squares[0] += sums.squares[1];
    sums.products[0] += sums.products[1];
    return sums;
}

INLINE void NAME(norm_row)(const NAME(norm) *norms, int count, int64_t r, int64_t size, REAL eps, IO *y) {
    REAL scales[2];
    for (int n = 0; n < count; n++) {
        NAME(norm_sums) sums = NAME(sum_row)(norms[n].x + r * norms[n].row, NULL, NULL, size);
        scales[n] = NAME(inverse_rms)(NAME(sum_lanes)(sums.squares[0]), size, eps) / count;
    }
    FOR_VECTORS(i, size, lanes) {
        VEC sum = {0};
        for (int n = 0; n < count; n++)
            sum += NAME(load_io)(norms[n].x + r * norms[n].row + i, lanes) * scales[n] *
                   NAME(load)(norms[n].weight + i, lanes);
        NAME(store_io)(y + r * size + i, sum, lanes);
    }
}

void NAME(norms)(int64_t threads, int64_t rows, int64_t size, double eps, const IO *a, int64_t a_row,
                 const REAL *weight_a, const IO *b, int64_t b_row, const REAL *weight_b, IO *y) {
    NAME(norm) norms[] = {{a, a_row, weight_a}, {b, b_row, weight_b}};
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++)
        if (b) NAME(norm_row)(norms, 2, r, size, eps, y);
        else NAME(norm_row)(norms, 1, r, size, eps, y);
}

/* With n = x * scale and g = dy * weight: dx = scale * (g - n * mean(g * n)), dweight += dy * n. */
INLINE void NAME(norm_row_gradient)(NAME(norm) at, int64_t r, int64_t size, REAL eps, REAL factor, const IO *dy) {
    const IO *x = at.x + r * at.row;
    NAME(norm_sums) sums = NAME(sum_row)(x, dy, at.weight, size);
    REAL scale = NAME(inverse_rms)(NAME(sum_lanes)(sums.squares[0]), size, eps);
    REAL mean = NAME(sum_lanes)(sums.products[0]) * scale / size;
    FOR_VECTORS(i, size, lanes) {
        VEC normed = NAME(load_io)(x + i, lanes) * scale, upstream = NAME(load_io)(dy + i, lanes);
        VEC dx = (upstream * NAME(load)(at.weight + i, lanes) - normed * mean) * (scale * factor);
        NAME(store_io)(at.dx + r * size + i, dx, lanes);
        if (at.dweight)
            NAME(store)(at.dweight + i, NAME(load)(at.dweight + i, lanes) + upstream * normed * factor, lanes);
    }
}

/* dweight = the sum of its parts, in order */
INLINE void NAME(add_parts)(REAL *dweight, const REAL *parts, int64_t count, int64_t size, int64_t stride) {
    if (!dweight) return;
    memset(dweight, 0, size * sizeof(REAL));
    for (int64_t p = 0; p < count; p++)
        for (int64_t i = 0; i < size; i++) dweight[i] += parts[p * stride + i];
}

void NAME(norms_gradient)(int64_t threads, int64_t rows, int64_t size, double eps, const IO *a, int64_t a_row,
                          const REAL *weight_a, const IO *b, int64_t b_row, const REAL *weight_b, const IO *dy,
                          int64_t dy_row, IO *da, IO *db, REAL *dweight_a, REAL *dweight_b) {
    int64_t length = MAX(ROWS_OF_A_PART, (rows + MOST_PARTS - 1) / MOST_PARTS), count = (rows + length - 1) / length;
    REAL *parts = calloc(2 * MAX(count, 1) * size, sizeof(REAL));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < count; p++) {
        REAL *part = parts + 2 * p * size;
        NAME(norm) of_a = {a, a_row, weight_a, da, dweight_a ? part : NULL};
        NAME(norm) of_b = {b, b_row, weight_b, db, dweight_b ? part + size : NULL};
        for (int64_t r = p * length; r < MIN(rows, (p + 1) * length); r++) {
            NAME(norm_row_gradient)(of_a, r, size, eps, b ? 0.5 : 1, dy + r * dy_row);
            if (b) NAME(norm_row_gradient)(of_b, r, size, eps, 0.5, dy + r * dy_row);
        }
    }
    NAME(add_parts)(dweight_a, parts, count, size, 2 * size);
    NAME(add_parts)(dweight_b, parts + size, count, size, 2 * size);
    free(parts);
}

#undef MOST_PARTS
#undef ROWS_OF_A_PART

/* x (T, heads, 2 half) turned by the angles of cos and sin (T, 2 half), each there twice; by -1 times them: backward */
void NAME(rotate)(int64_t threads, int64_t tokens, int64_t heads, int64_t half, const IO *x, int64_t x_token,
                  int64_t x_head, const REAL *cos, const REAL *sin, int64_t sign, IO *y) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const IO *from = x + t * x_token + h * x_head;
            IO *to = y + (t * heads + h) * 2 * half;
            FOR_VECTORS(i, half, lanes) {
                VEC first = NAME(load_io)(from + i, lanes), second = NAME(load_io)(from + half + i, lanes);
                VEC c = NAME(load)(cos + t * 2 * half + i, lanes);
                VEC s = NAME(load)(sin + t * 2 * half + i, lanes) * (REAL)sign;
                NAME(store_io)(to + i, first * c - second * s, lanes);
                NAME(store_io)(to + half + i, second * c + first * s, lanes);
            }
        }
}

#define BLOCK 4096 /* elements that a thread takes at a time */

/* y = silu(gate) * up */
void NAME(swiglu)(int64_t threads, int64_t size, const IO *gate, const IO *up, IO *y) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < size; first += BLOCK)
        FOR_VECTORS(j, MIN(BLOCK, size - first), lanes) {
            int64_t i = first + j;
            VEC z = NAME(load_io)(gate + i, lanes);
            VEC silu = z * NAME(sigmoid)(z, NAME(exp_negative_magnitude)(z));
            NAME(store_io)(y + i, silu * NAME(load_io)(up + i, lanes), lanes);
        }
}

void NAME(swiglu_gradient)(int64_t threads, int64_t size, const IO *gate, const IO *up, const IO *dy, IO *dgate,
                           IO *dup) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < size; first += BLOCK)
        FOR_VECTORS(j, MIN(BLOCK, size - first), lanes) {
            int64_t i = first + j;
            VEC z = NAME(load_io)(gate + i, lanes), upstream = NAME(load_io)(dy + i, lanes);
            VEC sigmoid = NAME(sigmoid)(z, NAME(exp_negative_magnitude)(z));
            VEC dz = upstream * NAME(load_io)(up + i, lanes) * sigmoid * (1 + z * (1 - sigmoid));
            NAME(store_io)(dgate + i, dz, lanes);
            NAME(store_io)(dup + i, upstream * z * sigmoid, lanes);
        }
}

#undef BLOCK
#undef FOR_VECTORS
