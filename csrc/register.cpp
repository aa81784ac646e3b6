// Schemas and implementations of the operators of flowrl_native, on torch's stable ABI.

#include <torch/csrc/stable/library.h>

#include "levels.h"
#include "operators.h"

STABLE_TORCH_LIBRARY(flowrl_native, m) {
  m.def("highest_level() -> int");
  m.def("best_level() -> int");
  m.def("has_products(bool bfloat16, int level) -> bool");
  m.def(
      "head_statistics(Tensor logits, Tensor targets, int vocab_start, bool entropy, int level)"
      " -> (Tensor row_max, Tensor sum_exp, Tensor target, Tensor sum_exp_z)");
  m.def(
      "head_dlogits_(Tensor(a!) logits, Tensor targets, int vocab_start, float temperature,"
      " Tensor row_max, Tensor log_sum, Tensor dlogprobs, Tensor? dlse, Tensor? row_entropy,"
      " Tensor? dentropy, int level) -> ()");
  m.def(
      "head_forward(Tensor hidden, Tensor weight, Tensor targets, int vocab_start,"
      " float temperature, bool entropy, Tensor(a!)? out, int level)"
      " -> (Tensor row_max, Tensor sum_exp, Tensor target, Tensor sum_exp_z)");
  m.def("head_dhidden(Tensor dlogits, Tensor weight, int rows, int level) -> Tensor");
  m.def(
      "head_dweight_(Tensor(a!) total, Tensor dlogits, Tensor hidden, bool accumulate, int level)"
      " -> ()");
  m.def(
      "trajectory_balance(Tensor logprobs, Tensor? old_logprobs, Tensor ref_logprobs, Tensor log_z,"
      " Tensor rewards, Tensor cu_seqlens, Tensor? response_mask, float beta, float? log_low,"
      " float? log_high, bool length_norm, float scale) -> (Tensor loss, Tensor residual,"
      " Tensor log_weight, Tensor weight, Tensor mean_logprob, Tensor mean_ref_logprob,"
      " Tensor num_tokens, Tensor dlogprobs, Tensor dlog_z)");
}

STABLE_TORCH_LIBRARY_IMPL(flowrl_native, CompositeExplicitAutograd, m) {
  m.impl("highest_level", TORCH_BOX(&flowrl::highest_level));
  m.impl("best_level", TORCH_BOX(&flowrl::best_level));
  m.impl("has_products", TORCH_BOX(&flowrl::has_products));
}

STABLE_TORCH_LIBRARY_IMPL(flowrl_native, CPU, m) {
  m.impl("head_statistics", TORCH_BOX(&flowrl::head_statistics));
  m.impl("head_dlogits_", TORCH_BOX(&flowrl::head_dlogits_));
  m.impl("head_forward", TORCH_BOX(&flowrl::head_forward));
  m.impl("head_dhidden", TORCH_BOX(&flowrl::head_dhidden));
  m.impl("head_dweight_", TORCH_BOX(&flowrl::head_dweight_));
  m.impl("trajectory_balance", TORCH_BOX(&flowrl::trajectory_balance));
}
