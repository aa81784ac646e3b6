// Products of float32 operands in blocks of 12 x 32 results. Free of torch and of the standard
// library (see softmax_kernels.h).
//
// The right operand is packed, and padded with zeros:
//   panel  (depth, 32), aligned to 64 bytes.
// The left one is read where it is, or packed where its rows lie side by side, for few long
// pieces of it are read faster than many short ones:
//   left   (depth, 12): the numbers of a step side by side.
#pragma once

#include <stdint.h>

#include "product_kernels.h"

namespace flowrl {

constexpr int64_t kFp32Rows = 12;
constexpr int64_t kFp32Columns = 32;

// From one packed left operand to the next of several. The 16 more keep operands apart in the
// first-level cache: at a depth of 256 they would share a few of its lines.
static inline int64_t left_stride(int64_t depth) { return depth * kFp32Rows + 16; }

struct Fp32Kernels {
  // The block's results, as many of its rows and columns as `to` has. Number k of row i of the left
  // operand is left[i * row + k * step]; rows are read up to the next multiple of four.
  void (*block)(const float* left, int64_t row, int64_t step, const float* panel, int64_t depth,
                Destination to);
  // (depth, rows) as a left operand for every 12 rows, left_stride after the other.
  void (*pack_left)(const float* from, int64_t stride, int64_t rows, int64_t depth, float* to);
  // (depth, columns) and (rows, depth) as a panel: the first 32 of the columns, of the rows.
  void (*pack_panel)(const float* from, int64_t stride, int64_t columns, int64_t depth, float* to);
  void (*pack_panel_transposed)(const float* from, int64_t stride, int64_t rows, int64_t depth,
                                float* to);
};

// Those of `level` (see levels.h), or of the best level for -1. Throws where the level has none.
const Fp32Kernels& fp32_kernels(int64_t level);

}  // namespace flowrl
