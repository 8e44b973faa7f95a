/* CPU kernels of hymba_tune.model.ops.cpu, instantiated for float, bfloat16 in and out of float, and double.

   Everything is a plain C function on raw pointers: no torch header, so that it compiles in seconds. Every sum
   over channels or tokens is taken in an order that depends on the shapes only, never on the number of threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

/* tokens between the states that the forward scan keeps for the backward */
#define SCAN_CHUNK 16
const int64_t scan_chunk = SCAN_CHUNK;

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(x) PASTE(x, SUFFIX)

#define SUFFIX float32
#define REAL float
#define REAL_IS_DOUBLE 0
#define IO float
#define IO_IS_BF16 0
#include "instance.h"

#define SUFFIX bfloat16
#define REAL float
#define REAL_IS_DOUBLE 0
#define IO uint16_t
#define IO_IS_BF16 1
#include "instance.h"

#define SUFFIX float64
#define REAL double
#define REAL_IS_DOUBLE 1
#define IO double
#define IO_IS_BF16 0
#include "instance.h"
