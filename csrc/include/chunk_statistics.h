// Softmax statistics of a chunk of logits whose tiles come one by one, from several threads.
#pragma once

#include <tuple>
#include <vector>

#include "checked.h"
#include "operators.h"
#include "product_buffers.h"
#include "softmax_kernels.h"

namespace flowrl {

// Columns of a tile: whole blocks of 12 and of 32, the heights of the products' results.
constexpr int64_t kTileColumns = 96;

inline int64_t tiles_of(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }

// Logits or dlogits of a chunk, column by column.
struct Columns {
  float* z;
  int64_t stride;  // from a column to the next; >= padded_rows(rows)
};

inline Columns checked_columns(const Tensor& logits, int64_t columns, int64_t rows,
                               const char* name) {
  const int64_t stride = logits.size(1);
  STD_TORCH_CHECK(stride >= padded_rows(rows), name, " must be (columns, at least ",
                  padded_rows(rows), " rows), got ", stride,
                  " rows; call flowrl_kernels' public operators");
  return {checked<float>(logits, columns * stride, name), stride};
}

class ChunkStatistics {
 public:
  // targets (n,): columns of the whole vocabulary, of which `columns` from vocab_start on are here.
  ChunkStatistics(const SoftmaxKernels& kernels, Tensor targets, int64_t vocab_start,
                  int64_t columns, bool entropy);

  // logits.z is the number of row first_row, a multiple of kRowStep.
  void add(int64_t tile, int64_t first_row, Tile logits);

  // row_max, sum_exp, logit of the target (-inf where it is not here), sum_exp_z: (n,) each.
  std::tuple<Tensor, Tensor, Tensor, Tensor> merged(const Tensor& like);

 private:
  RowSums sums_of(int64_t tile, int64_t first_row);

  const SoftmaxKernels& kernels_;
  int64_t rows_, stride_, tiles_;
  bool entropy_;
  std::vector<int64_t> column_;  // of the target, from this rank's first column on
  std::vector<float> at_target_;
  Buffer<float> row_max_;  // [tiles][stride]
  Buffer<double> sum_exp_, sum_exp_z_;  // the same; sum_exp_z_ is empty without entropy
};

}  // namespace flowrl
