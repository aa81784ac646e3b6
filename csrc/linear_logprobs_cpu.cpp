// Softmax statistics of a chunk of logits, and the chunk turned in place into d(logits).
// A row belongs to one thread, so that results do not depend on the number of threads.

#include <algorithm>
#include <limits>

#include <torch/csrc/stable/ops.h>

#include "checked.h"
#include "operators.h"
#include "row_kernels.h"

namespace flowrl {
namespace {

// Logits a thread takes at least, 40 us of work: waking another thread for less does not pay.
constexpr int64_t kGrainElements = 131072;

int64_t grain_rows(int64_t columns) {
  return std::max<int64_t>(kGrainElements / std::max<int64_t>(columns, 1), 1);
}

const float* optional_rows(const OptionalTensor& tensor, int64_t rows, const char* name) {
  return tensor ? checked<float>(*tensor, rows, name) : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> head_statistics(Tensor logits, Tensor targets,
                                                           int64_t vocab_start, bool entropy,
                                                           int64_t level) {
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const float* z = checked<float>(logits, rows * columns, "logits");
  const int64_t* target = checked<int64_t>(targets, rows, "targets");
  const auto per_row = [&] { return torch::stable::new_empty(logits, {rows}); };
  const Tensor row_max = per_row(), sum_exp = per_row(), at_target = per_row();
  const Tensor sum_exp_z = per_row();
  float* out_max = checked<float>(row_max, rows, "row_max");
  float* out_sum = checked<float>(sum_exp, rows, "sum_exp");
  float* out_target = checked<float>(at_target, rows, "at_target");
  float* out_sum_z = checked<float>(sum_exp_z, rows, "sum_exp_z");
  const RowKernels& kernels = row_kernels(level);
  torch::stable::parallel_for(0, rows, grain_rows(columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RowSums sums;
      kernels.statistics(z + i * columns, columns, entropy, &sums);
      const int64_t column = target[i] - vocab_start;
      const bool owned = column >= 0 && column < columns;
      out_max[i] = sums.row_max;
      out_sum[i] = sums.sum_exp;
      out_sum_z[i] = sums.sum_exp_z;
      out_target[i] = owned ? z[i * columns + column] : -std::numeric_limits<float>::infinity();
    }
  });
  return {row_max, sum_exp, at_target, sum_exp_z};
}

void head_dlogits_(Tensor logits, Tensor targets, int64_t vocab_start, double temperature,
                   Tensor row_max, Tensor log_sum, Tensor dlogprobs, OptionalTensor dlse,
                   OptionalTensor row_entropy, OptionalTensor dentropy, int64_t level) {
  const int64_t rows = logits.size(0), columns = logits.size(1);
  float* z = checked<float>(logits, rows * columns, "logits");
  const int64_t* target = checked<int64_t>(targets, rows, "targets");
  const float* maxima = checked<float>(row_max, rows, "row_max");
  const float* log_sums = checked<float>(log_sum, rows, "log_sum");
  const float* g_logprob = checked<float>(dlogprobs, rows, "dlogprobs");
  const float* g_lse = optional_rows(dlse, rows, "dlse");
  const float* g_entropy = optional_rows(dentropy, rows, "dentropy");
  const float* entropy = optional_rows(row_entropy, rows, "row_entropy");
  STD_TORCH_CHECK(!g_entropy || entropy, "dentropy needs row_entropy, got none; pass both");
  const RowKernels& kernels = row_kernels(level);
  const float inverse = static_cast<float>(1 / temperature);
  torch::stable::parallel_for(0, rows, grain_rows(columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float scale = -g_logprob[i];
      float slope = 0;
      if (g_lse) scale += g_lse[i];
      if (g_entropy) {
        scale -= g_entropy[i] * entropy[i];
        slope = g_entropy[i] * inverse;
      }
      kernels.dlogits(z + i * columns, columns, {maxima[i], log_sums[i], scale * inverse, slope});
      const int64_t column = target[i] - vocab_start;
      if (column >= 0 && column < columns) z[i * columns + column] += g_logprob[i] * inverse;
    }
  });
}

}  // namespace flowrl
