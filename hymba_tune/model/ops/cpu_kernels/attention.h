/* Segment attention of reference.py, forward, with scores that never leave the first cache.

   Rows are (query, head of its group), Q * G of them a key/value head. TILE rows meet PANEL keys at a time: a product
   of registers. A block of tiles takes a CHUNK of keys and values through the second cache together; what a tile has
   summed so far is scaled down where a chunk brings a higher score. Rows see a prefix, then in the stream the tokens
   from `first_seen` to their own.

   Shapes, row-major: q (Q, heads * G, d) of all tokens or of some, k, v (T, heads, d and dv), prefix_k, prefix_v
   (P, heads, ..), out (Q, heads * G, dv). Packed keys are (heads, panels, d, PANEL), the prefix's panels first; rows of
   sums are as wide as whole vectors. */

#if !IO_IS_BF16 /* whose products a CPU has other units for */

#define TILE 8
#define PANEL (2 * LANES)
#define CHUNK 256
#define TILES_OF_A_BLOCK 8
#define TOGETHER 3 /* vectors of a value */

typedef struct {
    int64_t threads, tokens, queries, prefix, heads, group, size, value_size, segments;
    int64_t window; /* T and more is none */
    double scale; /* of scores, which are exponents of 2 */
    const int64_t *cu_seqlens, *asking; /* (Q,) the tokens that are queries, in order; null where all are */
    const REAL *q, *k, *v, *prefix_k, *prefix_v;
    REAL *out;
} NAME(attention);

typedef struct {
    const NAME(attention) *in;
    int64_t *first_seen; /* (T,) */
    REAL *keys; /* packed */
} NAME(attention_plan);

/* Keys that each row of a tile sees: from[r] .. to[r] - 1. */
typedef struct {
    int64_t from[TILE], to[TILE];
    int64_t first, last, all_from, all_to; /* some row sees first .. last - 1, every row all_from .. all_to - 1 */
} NAME(sight);

typedef struct {
    int64_t row, rows; /* its first row, and how many there are: the others repeat the last */
    NAME(sight) stream;
    REAL peaks[TILE], totals[TILE];
    REAL *q, *sums; /* (d, TILE) scaled, (TILE, vectors of dv) */
} NAME(tile);

INLINE int64_t NAME(panels)(int64_t keys) {
    return (keys + PANEL - 1) / PANEL;
}

INLINE void NAME(pack_panel)(REAL *to, const REAL *keys, int64_t first, int64_t count, int64_t stride, int64_t size) {
    for (int64_t j = 0; j < PANEL; j++)
        for (int64_t i = 0; i < size; i++) to[i * PANEL + j] = first + j < count ? keys[(first + j) * stride + i] : 0;
}

INLINE void NAME(look)(NAME(sight) *sight) {
    sight->first = sight->all_from = sight->from[0];
    sight->last = sight->all_to = sight->to[0];
    for (int r = 1; r < TILE; r++) {
        sight->first = MIN(sight->first, sight->from[r]);
        sight->all_from = MAX(sight->all_from, sight->from[r]);
        sight->last = MAX(sight->last, sight->to[r]);
        sight->all_to = MIN(sight->all_to, sight->to[r]);
    }
}

INLINE void NAME(start_tile)(const NAME(attention_plan) *plan, NAME(tile) *tile, int64_t head, int64_t row) {
    const NAME(attention) *in = plan->in;
    tile->row = row;
    tile->rows = MIN(TILE, in->queries * in->group - row);
    for (int r = 0; r < TILE; r++) {
        int64_t at = row + MIN(r, tile->rows - 1), query = at / in->group;
        int64_t token = in->asking ? in->asking[query] : query;
        const REAL *q = in->q + ((query * in->heads + head) * in->group + at % in->group) * in->size;
        for (int64_t i = 0; i < in->size; i++) tile->q[i * TILE + r] = q[i] * (REAL)in->scale;
        tile->stream.from[r] = plan->first_seen[token];
        tile->stream.to[r] = token + 1;
        tile->peaks[r] = -(REAL)INFINITY;
        tile->totals[r] = 0;
    }
    NAME(look)(&tile->stream);
    memset(tile->sums, 0, TILE * NAME(vectors)(in->value_size) * sizeof(VEC));
}

/* Scores (TILE, CHUNK) of the keys first .. of some panels; -inf where a row does not see one. */
INLINE void NAME(score_tile)(const NAME(tile) *tile, const NAME(sight) *sight, const REAL *keys, int64_t size,
                             int64_t first, int64_t panels, REAL *scores) {
    INTS numbers = {0};
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    for (int64_t p = 0; p < panels; p++, keys += size * PANEL, first += PANEL, scores += PANEL) {
        VEC sums[TILE][2] = {0};
        for (int64_t i = 0; i < size; i++) {
            VEC left = NAME(load)(keys + i * PANEL, LANES), right = NAME(load)(keys + i * PANEL + LANES, LANES);
#pragma GCC unroll 8
            for (int r = 0; r < TILE; r++) {
                sums[r][0] += tile->q[i * TILE + r] * left;
                sums[r][1] += tile->q[i * TILE + r] * right;
            }
        }
        int masked = first < sight->all_from || first + PANEL > sight->all_to;
#pragma GCC unroll 8
        for (int r = 0; r < TILE; r++)
            for (int half = 0; half < 2; half++) {
                VEC z = sums[r][half];
                if (masked) {
                    INTS key = numbers + (int)(first + half * LANES - sight->from[r]);
                    INTS seen = (key >= 0) & (key < (int)(sight->to[r] - sight->from[r]));
                    z = NAME(select)(seen, z, NAME(splat)(-(REAL)INFINITY));
                }
                NAME(store)(scores + r * CHUNK + half * LANES, z, LANES);
            }
    }
}

/* Scores -> weights under the highest score so far; what was summed before goes under it too. */
INLINE void NAME(soften_tile)(NAME(tile) *tile, int64_t keys, int64_t vectors, REAL *scores) {
    for (int r = 0; r < TILE; r++, scores += CHUNK) {
        REAL before = tile->peaks[r], peak = MAX(before, NAME(highest)(scores, keys));
        REAL shift = peak > -(REAL)INFINITY ? peak : 0; /* nothing is seen yet */
        tile->peaks[r] = peak;
        REAL scale = NAME(exp2)(NAME(splat)(before - shift))[0], total = NAME(weights)(scores, keys, shift);
        tile->totals[r] = tile->totals[r] * scale + total;
        if (before == peak) continue;
        VEC *sums = (VEC *)tile->sums + r * vectors;
        for (int64_t i = 0; i < vectors; i++) sums[i] *= scale;
    }
}

/* Adds values, weighted, to `together` vectors of the sums. */
INLINE void NAME(weigh_vectors)(REAL *to, int64_t to_stride, const REAL *values, int64_t stride, int64_t count,
                                int lanes, int64_t step, int together, const REAL *weights) {
    VEC sums[TILE][TOGETHER];
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 3
        for (int i = 0; i < together; i++) sums[r][i] = NAME(load)(to + r * to_stride + i * LANES, LANES);
    for (int64_t j = 0; j < count; j++) {
        VEC value[TOGETHER];
#pragma GCC unroll 3
        for (int i = 0; i < together; i++) value[i] = NAME(load)(values + j * stride + i * step, lanes);
#pragma GCC unroll 8
        for (int r = 0; r < TILE; r++)
#pragma GCC unroll 3
            for (int i = 0; i < together; i++) sums[r][i] += weights[r * CHUNK + j] * value[i];
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 3
        for (int i = 0; i < together; i++) NAME(store)(to + r * to_stride + i * LANES, sums[r][i], LANES);
}

INLINE void NAME(weigh_tile)(NAME(tile) *tile, const REAL *values, int64_t stride, int64_t count, int64_t size,
                             const REAL *weights) {
    int64_t whole = size / LANES, row = NAME(vectors)(size) * LANES;
    for (int64_t i = 0; i < whole; i += TOGETHER) {
        REAL *to = tile->sums + i * LANES;
        const REAL *from = values + i * LANES;
        switch (MIN(TOGETHER, whole - i)) {
            case 1: NAME(weigh_vectors)(to, row, from, stride, count, LANES, LANES, 1, weights); break;
            case 2: NAME(weigh_vectors)(to, row, from, stride, count, LANES, LANES, 2, weights); break;
            default: NAME(weigh_vectors)(to, row, from, stride, count, LANES, LANES, 3, weights);
        }
    }
    if (size % LANES) /* the rest of a value */
        NAME(weigh_vectors)(tile->sums + whole * LANES, row, values + whole * LANES, stride, count, size % LANES, 0, 1,
                            weights);
}

/* A chunk of keys from number `first` on, of `count`, for one tile. */
INLINE void NAME(attend_chunk)(const NAME(attention) *in, NAME(tile) *tile, const NAME(sight) *sight, const REAL *keys,
                               const REAL *values, int64_t first, int64_t count, REAL *scores) {
    int64_t from = MAX(first, sight->first / PANEL * PANEL), to = MIN(first + count, sight->last);
    if (from >= to) return;
    int64_t panels = NAME(panels)(to - from), stride = in->heads * in->value_size;
    int64_t seen = MAX(from, sight->first);
    NAME(score_tile)(tile, sight, keys + from / PANEL * in->size * PANEL, in->size, from, panels, scores);
    NAME(soften_tile)(tile, panels * PANEL, NAME(vectors)(in->value_size), scores);
    NAME(weigh_tile)(tile, values + seen * stride, stride, to - seen, in->value_size, scores + seen - from);
}

INLINE void NAME(finish_tile)(const NAME(attention) *in, const NAME(tile) *tile, int64_t head) {
    int64_t width = NAME(vectors)(in->value_size) * LANES;
    for (int r = 0; r < tile->rows; r++) {
        int64_t query = (tile->row + r) / in->group, inside = (tile->row + r) % in->group;
        REAL *out = in->out + ((query * in->heads + head) * in->group + inside) * in->value_size;
        for (int64_t i = 0; i < in->value_size; i++) out[i] = tile->sums[r * width + i] / tile->totals[r];
    }
}

INLINE void NAME(attend_block)(const NAME(attention_plan) *plan, int64_t head, int64_t row, NAME(tile) *tiles,
                               REAL *scores) {
    const NAME(attention) *in = plan->in;
    int64_t rows = in->queries * in->group, count = 0, last = 0, first = in->tokens;
    for (; count < TILES_OF_A_BLOCK && row + count * TILE < rows; count++) {
        NAME(start_tile)(plan, tiles + count, head, row + count * TILE);
        first = MIN(first, tiles[count].stream.first);
        last = MAX(last, tiles[count].stream.last);
    }
    NAME(sight) all = {.last = in->prefix, .all_to = in->prefix};
    for (int r = 0; r < TILE; r++) all.to[r] = in->prefix;
    int64_t of_prefix = NAME(panels)(in->prefix), panels = of_prefix + NAME(panels)(in->tokens);
    const REAL *prefix_keys = plan->keys + head * panels * in->size * PANEL;
    const REAL *keys = prefix_keys + of_prefix * in->size * PANEL;
    for (int64_t at = 0; at < in->prefix; at += CHUNK)
        for (int64_t t = 0; t < count; t++)
            NAME(attend_chunk)(in, tiles + t, &all, prefix_keys, in->prefix_v + head * in->value_size, at,
                               MIN(CHUNK, in->prefix - at), scores);
    for (int64_t at = first / PANEL * PANEL; at < last; at += CHUNK)
        for (int64_t t = 0; t < count; t++)
            NAME(attend_chunk)(in, tiles + t, &tiles[t].stream, keys, in->v + head * in->value_size, at,
                               MIN(CHUNK, last - at), scores);
    for (int64_t t = 0; t < count; t++) NAME(finish_tile)(in, tiles + t, head);
}

INLINE void NAME(find_first_seen)(const NAME(attention) *in, int64_t *first_seen) {
    for (int64_t s = 0; s < in->segments; s++)
        for (int64_t t = in->cu_seqlens[s]; t < in->cu_seqlens[s + 1]; t++)
            first_seen[t] = MAX(in->cu_seqlens[s], t - in->window);
}

INLINE void NAME(pack_keys)(const NAME(attention) *in, REAL *packed) {
    int64_t of_prefix = NAME(panels)(in->prefix), panels = of_prefix + NAME(panels)(in->tokens);
    int64_t stride = in->heads * in->size;
#pragma omp for
    for (int64_t i = 0; i < in->heads * panels; i++) {
        int64_t head = i / panels, p = i % panels;
        REAL *to = packed + i * in->size * PANEL;
        if (p < of_prefix)
            NAME(pack_panel)(to, in->prefix_k + head * in->size, p * PANEL, in->prefix, stride, in->size);
        else
            NAME(pack_panel)(to, in->k + head * in->size, (p - of_prefix) * PANEL, in->tokens, stride, in->size);
    }
}

void NAME(attention_forward)(const NAME(attention) *in) {
    int64_t rows = TILE * TILES_OF_A_BLOCK, blocks = (in->queries * in->group + rows - 1) / rows;
    int64_t panels = NAME(panels)(in->prefix) + NAME(panels)(in->tokens);
    int64_t width = in->size + NAME(vectors)(in->value_size) * LANES; /* of a row's query and sums */
    NAME(attention_plan) plan = {in, malloc(MAX(1, in->tokens) * sizeof(int64_t)),
                                 aligned_alloc(VECTOR_BYTES, in->heads * panels * in->size * PANEL * sizeof(REAL))};
    NAME(find_first_seen)(in, plan.first_seen);
#pragma omp parallel num_threads(in->threads)
    {
        NAME(pack_keys)(in, plan.keys);
        NAME(tile) tiles[TILES_OF_A_BLOCK];
        REAL *scores = aligned_alloc(VECTOR_BYTES, (TILE * CHUNK + rows * (width + LANES)) * sizeof(REAL));
        for (int t = 0; t < TILES_OF_A_BLOCK; t++) {
            tiles[t].sums = scores + TILE * CHUNK + t * TILE * NAME(vectors)(in->value_size) * LANES;
            tiles[t].q = scores + TILE * CHUNK + rows * NAME(vectors)(in->value_size) * LANES + t * TILE * in->size;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < in->heads * blocks; i++)
            NAME(attend_block)(&plan, i % in->heads, i / in->heads * rows, tiles, scores);
        free(scores);
    }
    free(plan.first_seen);
    free(plan.keys);
}

#undef TILE
#undef PANEL
#undef CHUNK
#undef TILES_OF_A_BLOCK
#undef TOGETHER

#endif
