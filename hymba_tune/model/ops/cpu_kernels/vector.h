/* Vectors of LANES numbers of type REAL (float or double), their loads and stores as IO (float, double or bfloat16),
   the transcendental functions of the kernels as polynomials on them, and the softmax that both attentions share.

   Included once for each type by kernels.c, which defines REAL, REAL_IS_DOUBLE, IO, IO_IS_BF16 and NAME(x), a name
   private to the type. Lanes run over channels: a block is LANES neighbouring channels (the last one may be narrower),
   a group a few blocks that one thread takes through all the tokens. */

#define VEC NAME(vec)
#define INTS NAME(ints)
#define LANES ((int)(VECTOR_BYTES / sizeof(REAL)))
#define MAX_GROUP 256 /* channels */
#define MAX_BLOCKS (MAX_GROUP / LANES)

typedef REAL VEC __attribute__((vector_size(VECTOR_BYTES)));

#if REAL_IS_DOUBLE
typedef int64_t INTS __attribute__((vector_size(VECTOR_BYTES)));
#define MANTISSA_BITS 52
#define LOWEST_EXPONENT -1022.0
#define ROUNDING_SHIFT 6755399441055744.0 /* 1.5 * 2^52 */
/* minimax 2^f on [-1/2, 1/2], relative error 3e-18 */
static const REAL NAME(exp2_coefficients)[] = {
    4.43528270695727715e-10, 7.0741056135081428e-9, 1.01781980216719308e-7, 1.32154330896763992e-6,
    1.52527334899885256e-5, 1.54035304625144321e-4, 1.33335581467899217e-3, 9.61812910758833524e-3,
    5.55041086648199216e-2, 0.240226506959101562, 0.69314718055994533, 1.0};
/* minimax 2 atanh(sqrt(u)) / sqrt(u) on [0, 1/9], relative error 3e-20 */
static const REAL NAME(atanh_coefficients)[] = {
    0.165039447425608872, 0.0697083153038150907, 0.109791361486478624, 0.117148994457798902,
    0.133369115076447567, 0.153844450004744254, 0.181818235010293906, 0.222222221172377585,
    0.285714285726487806, 0.399999999999926831, 0.666666666666666838, 2.0};
#else
typedef int32_t INTS __attribute__((vector_size(VECTOR_BYTES)));
#define MANTISSA_BITS 23
#define LOWEST_EXPONENT -126.0f
#define ROUNDING_SHIFT 12582912.0f /* 1.5 * 2^23 */
/* minimax 2^f on [-1/2, 1/2], relative error 2e-9: one degree more than float needs, so that 2^0 is 1 without bias,
   for a decay close to 1 is multiplied thousands of times */
static const REAL NAME(exp2_coefficients)[] = {
    1.53458121613116298e-4f, 1.3399931177239738e-3f, 9.61848895633118162e-3f, 5.5503287771053248e-2f,
    0.240226468906455207f, 0.693147205737195751f, 1.0f};
/* minimax 2 atanh(sqrt(u)) / sqrt(u) on [0, 1/9], relative error 4e-9 */
static const REAL NAME(atanh_coefficients)[] = {
    0.281783350867345448f, 0.279606027471714669f, 0.400249102795381214f, 0.666663146821284749f, 2.0f};
#endif

#define LOG2E ((REAL)1.4426950408889634074)
#define LN2 ((REAL)0.69314718055994530942)
#define POLYNOMIAL(table, z) NAME(polynomial)(table, sizeof(table) / sizeof(REAL), z)

INLINE VEC NAME(splat)(REAL value) {
    return value - (VEC){0};
}

INLINE VEC NAME(select)(INTS where, VEC yes, VEC no) {
    return (VEC)((where & (INTS)yes) | (~where & (INTS)no));
}

INLINE VEC NAME(polynomial)(const REAL *coefficients, int count, VEC z) {
    VEC sum = NAME(splat)(coefficients[0]);
    for (int i = 1; i < count; i++) sum = sum * z + coefficients[i];
    return sum;
}

/* 2^z for z up to the largest exponent; 0 below the smallest normal number and for NaN, which the caller carries on */
INLINE VEC NAME(exp2)(VEC z) {
    VEC shifted = z + ROUNDING_SHIFT; /* its low bits are round(z) */
    VEC fraction = z - (shifted - ROUNDING_SHIFT);
    INTS bits = (INTS)POLYNOMIAL(NAME(exp2_coefficients), fraction) + ((INTS)shifted << MANTISSA_BITS);
    return (VEC)(bits & (INTS)(z > LOWEST_EXPONENT));
}

INLINE VEC NAME(exp_negative_magnitude)(VEC z) {
    return NAME(exp2)(NAME(select)(z > 0, -z, z) * LOG2E);
}

/* sigmoid, given u = exp(-|z|) */
INLINE VEC NAME(sigmoid)(VEC z, VEC u) {
    return NAME(select)(z > 0, NAME(splat)(1), u) / (1 + u);
}

/* log(1 + exp(z)), given u = exp(-|z|): max(z, 0) + log1p(u), and log1p(u) = 2 atanh(u / (2 + u)) */
INLINE VEC NAME(softplus)(VEC z, VEC u) {
    VEC s = u / (2 + u);
    return NAME(select)(z < 0, NAME(splat)(0), z) + s * POLYNOMIAL(NAME(atanh_coefficients), s * s);
}

INLINE REAL NAME(sum_lanes)(VEC v) {
    REAL parts[LANES];
    memcpy(parts, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) parts[i] += parts[i + width];
    return parts[0];
}

/* Lane i of the result is lane i ^ distance of v. */
INLINE VEC NAME(swap_lanes)(VEC v, INTS numbers, int distance) {
#if defined(__clang__)
    VEC swapped = v;
    for (int i = 0; i < LANES; i++) swapped[i] = v[i ^ distance];
    return swapped;
#else
    return __builtin_shuffle(v, numbers ^ distance);
#endif
}

/* Lane i of the result is the sum over the lanes of parts[i], of which there are LANES; they are overwritten. */
INLINE VEC NAME(sum_each)(VEC *parts) {
    INTS numbers = {0};
    for (int i = 0; i < LANES; i++) numbers[i] = i;
#pragma GCC unroll 4
    for (int width = LANES / 2; width; width /= 2) {
        INTS upper = (numbers & width) != 0;
#pragma GCC unroll 8
        for (int i = 0; i < width; i++) {
            VEC kept = NAME(select)(upper, parts[i + width], parts[i]);
            VEC moved = NAME(select)(upper, parts[i], parts[i + width]);
            parts[i] = kept + NAME(swap_lanes)(moved, numbers, width);
        }
    }
    return parts[0];
}

INLINE VEC NAME(load)(const REAL *from, int lanes) {
    VEC v = {0};
    if (lanes == LANES) memcpy(&v, from, sizeof v);
    else memcpy(&v, from, lanes * sizeof(REAL));
    return v;
}

INLINE void NAME(store)(REAL *to, VEC v, int lanes) {
    if (lanes == LANES) memcpy(to, &v, sizeof v);
    else memcpy(to, &v, lanes * sizeof(REAL));
}

#if IO_IS_BF16
typedef uint16_t NAME(halves) __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t NAME(words) __attribute__((vector_size(VECTOR_BYTES)));

INLINE VEC NAME(load_io)(const IO *from, int lanes) {
    NAME(halves) v = {0};
    if (lanes == LANES) memcpy(&v, from, sizeof v);
    else memcpy(&v, from, lanes * sizeof(IO));
    return (VEC)(__builtin_convertvector(v, NAME(words)) << 16);
}

/* rounds to nearest, ties to even; a NaN stays one */
INLINE void NAME(store_io)(IO *to, VEC value, int lanes) {
    NAME(words) bits = (NAME(words))value;
    NAME(words) rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    NAME(words) is_nan = (NAME(words))(value != value);
    NAME(halves) v = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), NAME(halves));
    if (lanes == LANES) memcpy(to, &v, sizeof v);
    else memcpy(to, &v, lanes * sizeof(IO));
}
#else
INLINE VEC NAME(load_io)(const IO *from, int lanes) {
    return NAME(load)(from, lanes);
}

INLINE void NAME(store_io)(IO *to, VEC value, int lanes) {
    NAME(store)(to, value, lanes);
}
#endif

/* Channels a group: wide for long rows of memory, but at least four groups for the threads where channels are few. */
INLINE int64_t NAME(group_size)(int64_t channels) {
    int64_t quarter = (channels / 4 + LANES - 1) / LANES * LANES;
    return MAX(LANES, MIN(MAX_GROUP, quarter));
}

INLINE int NAME(blocks_in_group)(int64_t channels, int64_t first) {
    return (int)((MIN(NAME(group_size)(channels), channels - first) + LANES - 1) / LANES);
}

INLINE int NAME(lanes)(int64_t channels, int64_t channel) {
    return (int)MIN(LANES, channels - channel);
}

/* Vectors that hold so many numbers. */
INLINE int64_t NAME(vectors)(int64_t size) {
    return (size + LANES - 1) / LANES;
}

/* The highest of whole vectors of scores; a NaN is passed over. */
INLINE REAL NAME(highest)(const REAL *scores, int64_t count) {
    VEC peaks = NAME(load)(scores, LANES);
    for (int64_t j = LANES; j < count; j += LANES) {
        VEC z = NAME(load)(scores + j, LANES);
        peaks = NAME(select)(z > peaks, z, peaks);
    }
    REAL peak = peaks[0];
    for (int i = 1; i < LANES; i++) peak = MAX(peak, peaks[i]);
    return peak;
}

/* Scores -> 2^(score - peak), and the sum of these. A NaN stays one. */
INLINE REAL NAME(weights)(REAL *scores, int64_t count, REAL peak) {
    VEC total = {0};
    for (int64_t j = 0; j < count; j += LANES) {
        VEC z = NAME(load)(scores + j, LANES) - peak;
        VEC weight = NAME(select)(z == z, NAME(exp2)(z), z);
        total += weight;
        NAME(store)(scores + j, weight, LANES);
    }
    return NAME(sum_lanes)(total);
}
