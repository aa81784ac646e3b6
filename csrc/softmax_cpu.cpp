// Softmax statistics of a chunk of logits, and the chunk turned in place into d(logits).
// Which numbers of a row are added to which does not depend on the number of threads, nor on the
// other rows.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "checked.h"
#include "chunk_statistics.h"

namespace flowrl {
namespace {

// Logits a thread takes at least, 40 us of work: waking another thread for less does not pay.
constexpr int64_t kGrainElements = 131072;
constexpr int64_t kStripRows = 1024;  // of a tile at a time: 384 KB

// The chunk in parts of one tile of columns and one strip of rows, several at a time:
// part(tile, first row, logits).
template <typename Part>
void for_each_part(float* z, int64_t stride, int64_t columns, int64_t rows, const Part& part) {
  const int64_t tiles = tiles_of(columns), strips = (rows + kStripRows - 1) / kStripRows;
  const int64_t size = std::min(columns, kTileColumns) * std::min(rows, kStripRows);
  const int64_t grain = std::max<int64_t>(kGrainElements / std::max<int64_t>(size, 1), 1);
  torch::stable::parallel_for(0, tiles * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / strips, first = tile * kTileColumns, row = i % strips * kStripRows;
      part(tile, row, {z + first * stride + row, stride, std::min(kTileColumns, columns - first),
                       std::min(kStripRows, rows - row)});
    }
  });
}

const float* optional_rows(const OptionalTensor& tensor, int64_t rows, const char* name) {
  return tensor ? checked<float>(*tensor, rows, name) : nullptr;
}

}  // namespace

ChunkStatistics::ChunkStatistics(const SoftmaxKernels& kernels, Tensor targets, int64_t vocab_start,
                                 int64_t columns, bool entropy)
    : kernels_(kernels),
      rows_(targets.numel()),
      stride_(padded_rows(rows_)),
      tiles_(tiles_of(columns)),
      entropy_(entropy),
      column_(rows_),
      at_target_(rows_, -std::numeric_limits<float>::infinity()),
      row_max_(aligned_buffer<float>(stride_ * tiles_)),
      sum_exp_(aligned_buffer<double>(stride_ * tiles_)),
      sum_exp_z_(aligned_buffer<double>(entropy ? stride_ * tiles_ : 0)) {
  const int64_t* target = checked<int64_t>(targets, rows_, "targets");
  for (int64_t row = 0; row < rows_; ++row) column_[row] = target[row] - vocab_start;
}

RowSums ChunkStatistics::sums_of(int64_t tile, int64_t first_row) {
  const int64_t first = stride_ * tile + first_row;
  return {row_max_.get() + first, sum_exp_.get() + first,
          entropy_ ? sum_exp_z_.get() + first : nullptr};
}

void ChunkStatistics::add(int64_t tile, int64_t first_row, Tile logits) {
  kernels_.statistics(logits, sums_of(tile, first_row));
  for (int64_t row = 0; row < logits.rows; ++row) {
    const int64_t column = column_[first_row + row] - tile * kTileColumns;
    if (column >= 0 && column < logits.columns)
      at_target_[first_row + row] = logits.z[column * logits.stride + row];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ChunkStatistics::merged(const Tensor& like) {
  std::vector<float> row_max(stride_);
  std::vector<double> sum_exp(stride_), sum_exp_z(stride_);
  torch::stable::parallel_for(0, stride_ / kRowStep, 4, [&](int64_t begin, int64_t end) {
    const int64_t row = begin * kRowStep;
    kernels_.merge(sums_of(0, row), tiles_, stride_, (end - begin) * kRowStep,
                   {&row_max[row], &sum_exp[row], entropy_ ? &sum_exp_z[row] : nullptr});
  });
  const auto tensor_of = [&](const auto& numbers) {
    const Tensor tensor = torch::stable::new_empty(like, {rows_}, ScalarType::Float);
    std::copy_n(numbers.begin(), rows_, checked<float>(tensor, rows_, "statistics"));
    return tensor;
  };
  return {tensor_of(row_max), tensor_of(sum_exp), tensor_of(at_target_), tensor_of(sum_exp_z)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> head_statistics(Tensor logits, Tensor targets,
                                                           int64_t vocab_start, bool entropy,
                                                           int64_t level) {
  const int64_t columns = logits.size(0), rows = targets.numel();
  const auto [z, stride] = checked_columns(logits, columns, rows, "logits");
  ChunkStatistics statistics(softmax_kernels(level), targets, vocab_start, columns, entropy);
  for_each_part(z, stride, columns, rows, [&](int64_t tile, int64_t row, Tile part) {
    statistics.add(tile, row, part);
  });
  return statistics.merged(logits);
}

void head_dlogits_(Tensor logits, Tensor targets, int64_t vocab_start, double temperature,
                   Tensor row_max, Tensor log_sum, Tensor dlogprobs, OptionalTensor dlse,
                   OptionalTensor row_entropy, OptionalTensor dentropy, int64_t level) {
  const int64_t columns = logits.size(0), rows = targets.numel();
  const auto [z, stride] = checked_columns(logits, columns, rows, "logits");
  const int64_t* target = checked<int64_t>(targets, rows, "targets");
  const float* maxima = checked<float>(row_max, rows, "row_max");
  const float* log_sums = checked<float>(log_sum, rows, "log_sum");
  const float* g_logprob = checked<float>(dlogprobs, rows, "dlogprobs");
  const float* g_lse = optional_rows(dlse, rows, "dlse");
  const float* g_entropy = optional_rows(dentropy, rows, "dentropy");
  const float* entropy = optional_rows(row_entropy, rows, "row_entropy");
  STD_TORCH_CHECK(!g_entropy || entropy, "dentropy needs row_entropy, got none; pass both");
  const SoftmaxKernels& kernels = softmax_kernels(level);
  const float inverse = static_cast<float>(1 / temperature);

  const int64_t padded = padded_rows(rows);
  std::vector<float> numbers(4 * padded);  // row_max, gain, slope, log_sum
  float *of_max = numbers.data(), *gain = of_max + padded, *slope = gain + padded;
  float* of_log_sum = slope + padded;
  for (int64_t i = 0; i < rows; ++i) {
    const double probability = std::exp(-static_cast<double>(log_sums[i]));  // of z = row_max
    float scale = -g_logprob[i];
    if (g_lse) scale += g_lse[i];
    if (g_entropy) {
      scale -= g_entropy[i] * entropy[i];
      slope[i] = static_cast<float>(probability * g_entropy[i] * inverse);
    }
    gain[i] = static_cast<float>(probability * scale * inverse);
    of_max[i] = maxima[i];
    of_log_sum[i] = log_sums[i];
  }

  for_each_part(z, stride, columns, rows, [&](int64_t tile, int64_t row, Tile part) {
    kernels.dlogits(part, {of_max + row, gain + row, g_entropy ? slope + row : nullptr,
                           of_log_sum + row});
    for (int64_t i = 0; i < part.rows; ++i) {
      const int64_t column = target[row + i] - vocab_start - tile * kTileColumns;
      if (column >= 0 && column < part.columns)
        part.z[column * stride + i] += g_logprob[row + i] * inverse;
    }
  });
}

}  // namespace flowrl
