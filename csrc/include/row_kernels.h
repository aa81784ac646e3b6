// Kernels over one row of logits, one copy per instruction set. Free of torch and of the standard
// library: an inline function of theirs, compiled for AVX-512, could be the copy that the linker
// keeps for everybody.
#pragma once

#include <stdint.h>

namespace flowrl {

// Sums over the columns of a row, relative to row_max = max_j z_j.
struct RowSums {
  float row_max;
  float sum_exp;    // sum_j exp(z_j - row_max)
  float sum_exp_z;  // sum_j exp(z_j - row_max) (z_j - row_max); 0 unless asked for
};

// dz_j = p_j (scale - slope log p_j), p_j = exp(z_j - row_max - log_sum). The target is the
// caller's.
struct RowGradient {
  float row_max;
  float log_sum;
  float scale;
  float slope;
};

struct RowKernels {
  void (*statistics)(const float* z, int64_t columns, bool entropy, RowSums* result);
  void (*dlogits)(float* z, int64_t columns, RowGradient row);
};

// Instruction sets from lowest to highest. kAvx512 adds products of float32 operands
// (fp32_kernels.h), the last two those of bfloat16 (product_kernels.h).
enum Level : int64_t { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx, kNumLevels };

// The kernels of `level`, or of the best level of this processor for -1. Throws for a level that
// this processor does not have.
const RowKernels& row_kernels(int64_t level);

// The highest level of this processor, and the one that is fastest on it.
int64_t highest_level();
int64_t best_level();

// Whether `level` multiplies operands of bfloat16, or else of float32; for -1, whether the best
// level does so faster than torch here.
bool has_products(bool bfloat16, int64_t level);

}  // namespace flowrl
