// trajectory_balance with every gradient: each sequence is read once, and its gradient written once.

#include <vector>

#include <torch/csrc/stable/ops.h>

#include "balance_arithmetic.h"
#include "checked.h"
#include "operators.h"

namespace flowrl {
namespace {

constexpr int64_t kGrainSequences = 16;

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
trajectory_balance(Tensor logprobs, OptionalTensor old_logprobs, Tensor ref_logprobs, Tensor log_z,
                   Tensor rewards, Tensor cu_seqlens, OptionalTensor response_mask, double beta,
                   std::optional<double> log_low, std::optional<double> log_high,
                   bool length_norm, double scale) {
  const int64_t T = logprobs.numel(), N = log_z.numel();
  const BalanceInputs in = {
      checked<float>(logprobs, T, "logprobs"),
      old_logprobs ? checked<float>(*old_logprobs, T, "old_logprobs") : nullptr,
      checked<float>(ref_logprobs, T, "ref_logprobs"),
      checked<float>(log_z, N, "log_z"),
      checked<float>(rewards, N, "rewards"),
      checked<int64_t>(cu_seqlens, N + 1, "cu_seqlens"),
      response_mask ? checked<bool>(*response_mask, T, "response_mask") : nullptr,
      {beta, scale, old_logprobs.has_value(), log_low.has_value(), log_high.has_value(),
       log_low.value_or(0), log_high.value_or(0), length_norm}};
  STD_TORCH_CHECK(in.offsets[0] == 0 && in.offsets[N] == T, "cu_seqlens must rise from 0 to ", T,
                  ", got ", in.offsets[0], " to ", in.offsets[N], "; pass cumulative lengths");

  const auto per_sequence = [&] { return torch::stable::new_empty(logprobs, {N}); };
  const Tensor loss = torch::stable::new_empty(logprobs, {});
  const Tensor residual = per_sequence(), log_weight = per_sequence(), weight = per_sequence();
  const Tensor mean_current = per_sequence(), mean_ref = per_sequence(), dlog_z = per_sequence();
  const Tensor num_tokens = torch::stable::new_empty(logprobs, {N}, ScalarType::Long);
  const Tensor dlogprobs = torch::stable::new_empty(logprobs, {T});
  std::vector<double> terms(N);
  const BalanceOutputs out = {
      checked<float>(residual, N, "residual"),
      checked<float>(log_weight, N, "log_weight"),
      checked<float>(weight, N, "weight"),
      checked<float>(mean_current, N, "mean_current"),
      checked<float>(mean_ref, N, "mean_ref"),
      checked<float>(dlog_z, N, "dlog_z"),
      checked<int64_t>(num_tokens, N, "num_tokens"),
      checked<float>(dlogprobs, T, "dlogprobs"),
      terms.data()};

  torch::stable::parallel_for(0, N, kGrainSequences, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      BalanceSums sums{};
      for (int64_t t = in.offsets[n]; t < in.offsets[n + 1]; ++t) in.add_token(t, sums);
      const auto s = balance_sequence(sums, in.log_z[n], in.rewards[n], in.options);
      out.write(n, sums, s);
      const float per_token = static_cast<float>(s.per_token);
      for (int64_t t = in.offsets[n]; t < in.offsets[n + 1]; ++t)
        out.dlogprobs[t] = in.counts(t) ? per_token : 0.0f;
    }
  });
  double total = 0;  // in order, whatever the number of threads
  for (const double term : terms) total += term;
  *checked<float>(loss, 1, "loss") = static_cast<float>(scale * total);
  return {loss,         residual, log_weight, weight, mean_current,
          mean_ref, num_tokens, dlogprobs,  dlog_z};
}

}  // namespace flowrl
