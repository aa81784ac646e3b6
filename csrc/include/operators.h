// The operators of flowrl_native; their schemas are in register.cpp. Logits and dlogits of n rows
// are (V, stride), stride >= padded_rows(n): a column's rows lie side by side.
#pragma once

#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace flowrl {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor> head_statistics(Tensor logits, Tensor targets,
                                                           int64_t vocab_start, bool entropy,
                                                           int64_t level);

void head_dlogits_(Tensor logits, Tensor targets, int64_t vocab_start, double temperature,
                   Tensor row_max, Tensor log_sum, Tensor dlogprobs, OptionalTensor dlse,
                   OptionalTensor row_entropy, OptionalTensor dentropy, int64_t level);

std::tuple<Tensor, Tensor, Tensor, Tensor> head_forward(Tensor hidden, Tensor weight,
                                                        Tensor targets, int64_t vocab_start,
                                                        double temperature, bool entropy,
                                                        OptionalTensor out, int64_t level);

Tensor head_dhidden(Tensor dlogits, Tensor weight, int64_t rows, int64_t level);

void head_dweight_(Tensor total, Tensor dlogits, Tensor hidden, bool accumulate, int64_t level);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
trajectory_balance(Tensor logprobs, OptionalTensor old_logprobs, Tensor ref_logprobs, Tensor log_z,
                   Tensor rewards, Tensor cu_seqlens, OptionalTensor response_mask, double beta,
                   std::optional<double> log_low, std::optional<double> log_high,
                   bool length_norm, double scale);

}  // namespace flowrl
