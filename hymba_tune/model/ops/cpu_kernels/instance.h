/* All kernels for one type; leaves no macro behind. */

#include "vector.h"

#include "selective_scan.h"

#include "causal_conv1d.h"

#include "attention_step.h"

#include "attention.h"

#include "state_steps.h"

#include "elementwise.h"

#undef VEC
#undef INTS
#undef LANES
#undef MAX_GROUP
#undef MAX_BLOCKS
#undef MANTISSA_BITS
#undef LOWEST_EXPONENT
#undef ROUNDING_SHIFT
#undef LOG2E
#undef LN2
#undef POLYNOMIAL
#undef SUFFIX
#undef REAL
#undef REAL_IS_DOUBLE
#undef IO
#undef IO_IS_BF16
