// trajectory_balance with every gradient: each sequence is read once, and its gradient written once.
// Sums over tokens run in double: log w adds up thousands of small differences.

#include <cmath>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "checked.h"
#include "operators.h"

namespace flowrl {
namespace {

constexpr int64_t kGrainSequences = 16;

struct Inputs {
  const float* current;
  const float* old;  // null: on-policy
  const float* ref;
  const float* log_z;
  const float* rewards;
  const int64_t* offsets;
  const bool* mask;  // null: all tokens count
  double beta, scale;
  std::optional<double> low, high;  // bounds on log w
  bool length_norm;
};

struct Sequence {
  int64_t count = 0;
  double current = 0, ref = 0, log_weight = 0;  // sums over counted tokens
  double weight = 1, residual = 0;

  Sequence(const Inputs& in, int64_t n) {
    for (int64_t t = in.offsets[n]; t < in.offsets[n + 1]; ++t) {
      if (in.mask && !in.mask[t]) continue;
      ++count;
      current += in.current[t];
      ref += in.ref[t];
      if (in.old) log_weight += static_cast<double>(in.current[t]) - in.old[t];
    }
    if (count == 0) return;
    const double divisor = in.length_norm ? static_cast<double>(count) : 1.0;
    residual = in.log_z[n] + current / divisor - in.beta * in.rewards[n] - ref / divisor;
    if (!in.old) return;
    double bounded = log_weight;  // comparisons that keep NaN
    if (in.low && bounded < *in.low) bounded = *in.low;
    if (in.high && bounded > *in.high) bounded = *in.high;
    weight = std::exp(bounded);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
trajectory_balance(Tensor logprobs, OptionalTensor old_logprobs, Tensor ref_logprobs, Tensor log_z,
                   Tensor rewards, Tensor cu_seqlens, OptionalTensor response_mask, double beta,
                   std::optional<double> log_low, std::optional<double> log_high,
                   bool length_norm, double scale) {
  const int64_t T = logprobs.numel(), N = log_z.numel();
  const Inputs in = {
      checked<float>(logprobs, T, "logprobs"),
      old_logprobs ? checked<float>(*old_logprobs, T, "old_logprobs") : nullptr,
      checked<float>(ref_logprobs, T, "ref_logprobs"),
      checked<float>(log_z, N, "log_z"),
      checked<float>(rewards, N, "rewards"),
      checked<int64_t>(cu_seqlens, N + 1, "cu_seqlens"),
      response_mask ? checked<bool>(*response_mask, T, "response_mask") : nullptr,
      beta, scale, log_low, log_high, length_norm};
  STD_TORCH_CHECK(in.offsets[0] == 0 && in.offsets[N] == T, "cu_seqlens must rise from 0 to ", T,
                  ", got ", in.offsets[0], " to ", in.offsets[N], "; pass cumulative lengths");

  const auto per_sequence = [&] { return torch::stable::new_empty(logprobs, {N}); };
  const Tensor loss = torch::stable::new_empty(logprobs, {});
  const Tensor residual = per_sequence(), log_weight = per_sequence(), weight = per_sequence();
  const Tensor mean_current = per_sequence(), mean_ref = per_sequence(), dlog_z = per_sequence();
  const Tensor num_tokens = torch::stable::new_empty(logprobs, {N}, ScalarType::Long);
  const Tensor dlogprobs = torch::stable::new_empty(logprobs, {T});
  float* out_residual = checked<float>(residual, N, "residual");
  float* out_log_weight = checked<float>(log_weight, N, "log_weight");
  float* out_weight = checked<float>(weight, N, "weight");
  float* out_current = checked<float>(mean_current, N, "mean_current");
  float* out_ref = checked<float>(mean_ref, N, "mean_ref");
  float* out_dlog_z = checked<float>(dlog_z, N, "dlog_z");
  int64_t* out_tokens = checked<int64_t>(num_tokens, N, "num_tokens");
  float* out_dlogprobs = checked<float>(dlogprobs, T, "dlogprobs");
  std::vector<double> losses(N);

  torch::stable::parallel_for(0, N, kGrainSequences, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Sequence s(in, n);
      const double divisor = s.count ? static_cast<double>(s.count) : 1.0;
      const double slope = 2 * scale * s.weight * s.residual;
      losses[n] = s.weight * s.residual * s.residual;
      out_residual[n] = static_cast<float>(s.residual);
      out_log_weight[n] = static_cast<float>(s.log_weight);
      out_weight[n] = static_cast<float>(s.weight);
      out_current[n] = static_cast<float>(s.current / divisor);
      out_ref[n] = static_cast<float>(s.ref / divisor);
      out_dlog_z[n] = static_cast<float>(slope);
      out_tokens[n] = s.count;
      const float per_token = static_cast<float>(length_norm ? slope / divisor : slope);
      for (int64_t t = in.offsets[n]; t < in.offsets[n + 1]; ++t)
        out_dlogprobs[t] = !in.mask || in.mask[t] ? per_token : 0.0f;
    }
  });
  double total = 0;  // in order, whatever the number of threads
  for (const double part : losses) total += part;
  *checked<float>(loss, 1, "loss") = static_cast<float>(scale * total);
  return {loss,         residual, log_weight, weight, mean_current,
          mean_ref, num_tokens, dlogprobs,  dlog_z};
}

}  // namespace flowrl
