// Products of bfloat16 operands with float32 sums, in blocks of 32 x 32 results. One copy per
// instruction set; free of torch and of the standard library (see softmax_kernels.h).
//
// Operands are padded with zeros to multiples of 32:
//   left   (32 rows, depth) one row after the other: packed, or a matrix that is like that;
//   panel  (depth, 16 columns) as [depth / 2][16][2]: pairs of rows side by side, as the
//          instructions want them. Two panels, one after the other, make the right operand.
#pragma once

#include <stdint.h>

namespace flowrl {

constexpr int64_t kBlockRows = 32;    // and columns
constexpr int64_t kPanelColumns = 16;

using BFloat16Bits = uint16_t;

static inline int64_t padded(int64_t size) {
  return (size + kBlockRows - 1) / kBlockRows * kBlockRows;
}

// Where a block of results goes: its first `rows` x `columns`, times scale, over or onto `out`; those
// of bfloat16 operands over `rounded` instead, where that is given.
struct Destination {
  float* out;
  int64_t stride;
  int64_t rows;
  int64_t columns;
  float scale;
  bool accumulate;
  BFloat16Bits* rounded = nullptr;
};

struct ProductKernels {
  // Around the blocks that one thread computes in a row: the state of the tile registers.
  void (*enter)();
  void (*leave)();
  // left (32, depth) times two panels of `depth` rows, a multiple of 32. All of left is read.
  void (*block)(const BFloat16Bits* left, const BFloat16Bits* panels, int64_t depth,
                Destination to);
  // float32 (rows, columns), rounded to nearest, as a left operand of padded size.
  void (*pack_left)(const float* from, int64_t stride, int64_t rows, int64_t columns,
                    BFloat16Bits* to);
  // The same of the transpose: padded(columns) rows, padded(rows) deep.
  void (*pack_left_transposed)(const float* from, int64_t stride, int64_t rows, int64_t columns,
                               BFloat16Bits* to);
  // bfloat16 (rows, columns) as panels of padded(rows) rows, padded(columns) / 16 of them.
  void (*pack_panels)(const BFloat16Bits* from, int64_t stride, int64_t rows, int64_t columns,
                      BFloat16Bits* to);
  // The same of the transpose: panels of padded(columns) rows, padded(rows) / 16 of them.
  void (*pack_panels_transposed)(const BFloat16Bits* from, int64_t stride, int64_t rows,
                                 int64_t columns, BFloat16Bits* to);
};

// Those of `level` (see levels.h), or of the best level for -1. Throws where the level has none.
const ProductKernels& product_kernels(int64_t level);

}  // namespace flowrl
