/* Attention of reference_steps.py: one token a row over what the row has cached, vectorised over a head's features;
   and the cache's new slots.

   A row's key/value head is one task: its G query heads share every key and value that is read. What the token sees
   lies in up to four spans: the meta tokens, one or two of the slots (a ring may wrap) and the token itself. All scores
   come first, then their softmax, then the values; a slot outside of the spans is never read. A core fetches faster
   from several places at a time: of a long span, each block takes a few keys from each of STREAMS parts.

   Shapes, row-major, IO: q (R, heads * G, d), k, v (R, heads, d and dv), meta_k, meta_v (M, heads, ..), cached_k,
   cached_v (R, heads, slots, ..), out (R, heads * G, dv). */

#define MAX_HEADS 5      /* query heads whose sums are held in registers */
#define STREAMS 4        /* places of a span that are read at a time */
#define EACH MAX(1, LANES / STREAMS) /* keys of a block from each of them */
#define AHEAD 16         /* keys between the one that is read and the one that is fetched */
#define LITTLE (1 << 16) /* features to read that are no work for a second thread */

typedef struct {
    int64_t threads, rows, heads, group, meta, slots, size, value_size, window;
    double scale; /* of scores, which are exponents of 2 */
    const int64_t *lengths; /* (R,) tokens that each row has cached */
    const IO *q, *k, *v, *meta_k, *meta_v, *cached_k, *cached_v;
    IO *out;
} NAME(step);

typedef struct {
    const IO *k, *v;
    int64_t k_stride, v_stride, count;
} NAME(span);

typedef struct {
    NAME(span) spans[4];
    int64_t keys, padded; /* of all spans, and up to whole vectors */
    REAL *scores;         /* (G, padded), later the weights */
    VEC *q;               /* (G, vectors of d), scaled; 0 in what overlaps */
    VEC *sums;            /* (G, vectors of dv) of weighted values */
    REAL *totals;         /* (G,) of weights */
} NAME(step_workspace);

/* Where a row's vector i begins: the last one ends with the row and overlaps the one before. */
INLINE int64_t NAME(begin)(int64_t size, int64_t i) {
    return MAX(0, MIN(i * LANES, size - LANES));
}

INLINE NAME(span) NAME(cached_span)(const NAME(step) *in, int64_t task, int64_t slot, int64_t count) {
    int64_t row = task * in->slots + slot;
    return (NAME(span)){in->cached_k + row * in->size, in->cached_v + row * in->value_size, in->size, in->value_size,
                        count};
}

/* The newest tokens that the window and the slots hold lie behind each other, modulo the slots. */
INLINE void NAME(find_spans)(const NAME(step) *in, int64_t task, NAME(step_workspace) *w) {
    int64_t h = task % in->heads, length = in->lengths[task / in->heads];
    int64_t seen = MAX(0, MIN(MIN(length, in->slots), in->window));
    int64_t first = seen ? (length - seen) % in->slots : 0, before_end = MIN(seen, in->slots - first);
    w->spans[0] = (NAME(span)){in->meta_k + h * in->size, in->meta_v + h * in->value_size, in->heads * in->size,
                               in->heads * in->value_size, in->meta};
    w->spans[1] = NAME(cached_span)(in, task, first, before_end);
    w->spans[2] = NAME(cached_span)(in, task, 0, seen - before_end);
    w->spans[3] = (NAME(span)){in->k + task * in->size, in->v + task * in->value_size, 0, 0, 1};
    w->keys = in->meta + seen + 1;
    w->padded = NAME(vectors)(w->keys) * LANES;
}

INLINE void NAME(load_queries)(const NAME(step) *in, int64_t task, NAME(step_workspace) *w) {
    int64_t vectors = NAME(vectors)(in->size);
    for (int64_t g = 0; g < in->group; g++) {
        const IO *q = in->q + (task * in->group + g) * in->size;
        for (int64_t i = 0; i < vectors; i++) {
            VEC v = NAME(load_io)(q + NAME(begin)(in->size, i), NAME(lanes)(in->size, 0)) * (REAL)in->scale;
            for (int64_t n = 0; n < i * LANES - NAME(begin)(in->size, i); n++) v[n] = 0;
            w->q[g * vectors + i] = v;
        }
    }
}

/* Key j of a block whose streams lie `apart` keys from each other. */
INLINE int64_t NAME(key_number)(int64_t apart, int j) {
    return j / EACH * apart + j % EACH;
}

/* Scores of `heads` query heads from number g on, against a block of keys that lie `stride` apart. */
INLINE void NAME(score)(const NAME(step_workspace) *w, const IO *keys, int64_t stride, int64_t apart, int count,
                        int64_t size, int64_t g, int heads, REAL *scores) {
    int64_t vectors = NAME(vectors)(size);
    int lanes = NAME(lanes)(size, 0);
    const VEC *q = w->q + g * vectors;
    VEC products[MAX_HEADS][LANES];
    for (int j = 0; j < count; j++) {
        const IO *key = keys + NAME(key_number)(apart, j) * stride;
        VEC sums[MAX_HEADS] = {0};
        for (int64_t i = 0; i < vectors; i++) {
            VEC k = NAME(load_io)(key + NAME(begin)(size, i), lanes);
            __builtin_prefetch(key + AHEAD * stride + i * LANES);
#pragma GCC unroll 5
            for (int n = 0; n < heads; n++) sums[n] += q[n * vectors + i] * k;
        }
#pragma GCC unroll 5
        for (int n = 0; n < heads; n++) products[n][j] = sums[n];
    }
    for (int n = 0; n < heads; n++)
        NAME(store)(scores + (g + n) * w->padded, NAME(sum_each)(products[n]), count);
}

/* Adds a block of values, weighted, to the sums of `heads` query heads from number g on. */
INLINE void NAME(weigh)(NAME(step_workspace) *w, const IO *values, int64_t stride, int64_t apart, int count,
                        int64_t size, int64_t g, int heads, const REAL *weights) {
    int64_t vectors = NAME(vectors)(size);
    int lanes = NAME(lanes)(size, 0);
    VEC *to = w->sums + g * vectors;
    for (int64_t i = 0; i < vectors; i++) {
        VEC sums[MAX_HEADS];
#pragma GCC unroll 5
        for (int n = 0; n < heads; n++) sums[n] = to[n * vectors + i];
        for (int j = 0; j < count; j++) {
            const IO *value = values + NAME(key_number)(apart, j) * stride + NAME(begin)(size, i);
            VEC v = NAME(load_io)(value, lanes);
            __builtin_prefetch(value + AHEAD * stride);
#pragma GCC unroll 5
            for (int n = 0; n < heads; n++) sums[n] += weights[(g + n) * w->padded + j] * v;
        }
#pragma GCC unroll 5
        for (int n = 0; n < heads; n++) to[n * vectors + i] = sums[n];
    }
}

/* What is done, with a number of query heads that the compiler knows. */
#define FOR_ALL_HEADS(done, ...)                                                        \
    for (int64_t g = 0; g < in->group; g += MAX_HEADS)                                  \
        switch (MIN(MAX_HEADS, in->group - g)) {                                        \
            case 1: NAME(done)(w, __VA_ARGS__, g, 1, w->scores + at); break;            \
            case 2: NAME(done)(w, __VA_ARGS__, g, 2, w->scores + at); break;            \
            case 3: NAME(done)(w, __VA_ARGS__, g, 3, w->scores + at); break;            \
            case 4: NAME(done)(w, __VA_ARGS__, g, 4, w->scores + at); break;            \
            default: NAME(done)(w, __VA_ARGS__, g, 5, w->scores + at);                  \
        }

/* What is done, block by block, to the keys or values (`what`) of all spans; `at` of them come before a block. Each
   part of a span gives EACH of them to a whole block; what no whole block takes comes last, in a row. */
#define FOR_ALL_BLOCKS(done, what, size)                                                 \
    int64_t at = 0;                                                                      \
    for (const NAME(span) *span = w->spans; span < w->spans + 4; span++)                 \
        for (int64_t j = 0; j < span->count; j += LANES) {                               \
            int count = NAME(lanes)(span->count, j), whole = count == LANES;             \
            int64_t first = whole ? j / LANES * EACH : j, stride = span->what##_stride;  \
            int64_t apart = whole ? span->count / LANES * EACH : EACH;                   \
            FOR_ALL_HEADS(done, span->what + first * stride, stride, apart, count, size) \
            at += count;                                                                 \
        }

INLINE void NAME(score_all)(const NAME(step) *in, NAME(step_workspace) *w) {
    FOR_ALL_BLOCKS(score, k, in->size)
}

INLINE void NAME(weigh_all)(const NAME(step) *in, NAME(step_workspace) *w) {
    memset(w->sums, 0, in->group * NAME(vectors)(in->value_size) * sizeof(VEC));
    FOR_ALL_BLOCKS(weigh, v, in->value_size)
}

/* Scores -> weights, not yet divided by their total. */
INLINE void NAME(soften)(const NAME(step) *in, NAME(step_workspace) *w) {
    for (int64_t g = 0; g < in->group; g++) {
        REAL *scores = w->scores + g * w->padded;
        for (int64_t j = w->keys; j < w->padded; j++) scores[j] = -(REAL)INFINITY;
        w->totals[g] = NAME(weights)(scores, w->padded, NAME(highest)(scores, w->padded));
    }
}

INLINE void NAME(write_sums)(const NAME(step) *in, int64_t task, const NAME(step_workspace) *w) {
    int64_t vectors = NAME(vectors)(in->value_size);
    for (int64_t g = 0; g < in->group; g++) {
        IO *out = in->out + (task * in->group + g) * in->value_size;
        for (int64_t i = 0; i < vectors; i++)
            NAME(store_io)(out + NAME(begin)(in->value_size, i), w->sums[g * vectors + i] / w->totals[g],
                           NAME(lanes)(in->value_size, 0));
    }
}

INLINE void NAME(attend_task)(const NAME(step) *in, int64_t task, NAME(step_workspace) *w) {
    NAME(find_spans)(in, task, w);
    NAME(load_queries)(in, task, w);
    NAME(score_all)(in, w);
    NAME(soften)(in, w);
    NAME(weigh_all)(in, w);
    NAME(write_sums)(in, task, w);
}

void NAME(attention_step)(const NAME(step) *in) {
    int64_t tasks = in->rows * in->heads, keys = in->meta + MIN(in->slots, in->window) + 1;
    int64_t vectors = NAME(vectors)(keys) + NAME(vectors)(in->size) + NAME(vectors)(in->value_size) + 1;
#pragma omp parallel num_threads(in->threads) if (tasks * keys * (in->size + in->value_size) > LITTLE)
    {
        NAME(step_workspace) w;
        w.q = aligned_alloc(VECTOR_BYTES, in->group * vectors * sizeof(VEC));
        w.sums = w.q + in->group * NAME(vectors)(in->size);
        w.scores = (REAL *)(w.sums + in->group * NAME(vectors)(in->value_size));
        w.totals = w.scores + in->group * NAME(vectors)(keys) * LANES;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) /* head by head: what all rows share stays in a cache */
            NAME(attend_task)(in, i % in->rows * in->heads + i / in->rows, &w);
        free(w.q);
    }
}

/* k and v into the slot of their position. */
void NAME(append_step)(const NAME(step) *in) {
    for (int64_t task = 0; task < in->rows * in->heads; task++) {
        int64_t slot = in->lengths[task / in->heads] % in->slots;
        NAME(span) to = NAME(cached_span)(in, task, slot, 1);
        memcpy((IO *)to.k, in->k + task * in->size, in->size * sizeof(IO));
        memcpy((IO *)to.v, in->v + task * in->value_size, in->value_size * sizeof(IO));
    }
}

#undef MAX_HEADS
#undef STREAMS
#undef EACH
#undef AHEAD
#undef LITTLE
#undef FOR_ALL_HEADS
#undef FOR_ALL_BLOCKS
