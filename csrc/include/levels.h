// Instruction sets, and which one this processor gets.
#pragma once

#include <stdint.h>

namespace flowrl {

// From lowest to highest. kAvx512 adds products of float32 operands (fp32_kernels.h), the last two
// those of bfloat16 (product_kernels.h).
enum Level : int64_t { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx, kNumLevels };

// The highest level of this processor, and the one that is fastest on it.
int64_t highest_level();
int64_t best_level();

// Whether `level` multiplies operands of bfloat16, or else of float32; for -1, whether the best
// level does so faster than torch here.
bool has_products(bool bfloat16, int64_t level);

}  // namespace flowrl
