// Kernels over a tile of logits, one copy per instruction set. Free of torch and of the standard
// library: an inline function of theirs, compiled for AVX-512, could be the copy that the linker
// keeps for everybody.
//
// Logits lie column by column, so that the rows of a column fill the lanes of a vector: each lane
// is a row of its own, whose numbers do not depend on the others.
#pragma once

#include <stdint.h>

namespace flowrl {

constexpr int64_t kRowStep = 16;  // rows of a column are padded to a multiple of it

static inline int64_t padded_rows(int64_t rows) {
  return (rows + kRowStep - 1) / kRowStep * kRowStep;
}

// The padding of rows is read and written, and its numbers mean nothing.
struct Tile {
  float* z;
  int64_t stride;  // from a column to the next
  int64_t columns;
  int64_t rows;
};

// Sums over columns, relative to row_max = max_j z_j. For each row, padded. In double: beside a
// column that has nearly all of the probability, the others would be rounded away one by one.
struct RowSums {
  float* row_max;
  double* sum_exp;    // sum_j exp(z_j - row_max)
  double* sum_exp_z;  // sum_j exp(z_j - row_max) (z_j - row_max); null: not wanted
};

// dz_j = e_j (gain - slope (x_j - log_sum)), x_j = z_j - row_max and e_j = exp(x_j), for each row,
// padded. The target is the caller's.
struct RowGradient {
  const float* row_max;
  const float* gain;
  const float* slope;    // null: 0
  const float* log_sum;  // with slope
};

struct SoftmaxKernels {
  void (*statistics)(Tile tile, RowSums to);
  // The sums of `tiles` in one; a tile's numbers follow those of the one before by `stride`.
  void (*merge)(RowSums tiles, int64_t num_tiles, int64_t stride, int64_t rows, RowSums to);
  // In place.
  void (*dlogits)(Tile tile, RowGradient rows);
};

// The kernels of `level`, or of the best level of this processor for -1. Throws for a level that
// this processor does not have.
const SoftmaxKernels& softmax_kernels(int64_t level);

}  // namespace flowrl
