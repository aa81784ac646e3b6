// The CUDA operators, as torch.ops.flowrl_cuda: tensors checked and handed to the .cu files as
// pointers. The caller passes its stream and makes the tensors' device the current one: nothing of
// torch's CUDA library is linked, and the library loads without a GPU.

#include <limits>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checked.h"
#include "cuda_operators.h"

namespace flowrl::cuda {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Stream stream_of(int64_t stream) { return reinterpret_cast<Stream>(stream); }

void succeeded(const char* error, const char* operation) {
  STD_TORCH_CHECK(!error, operation, " must be accepted by the GPU, got: ", error,
                  "; use backend='torch' or 'triton' and report this");
}

int to_int(int64_t value, const char* name) {
  STD_TORCH_CHECK(value <= std::numeric_limits<int>::max(), name, " must be below 2^31, got ",
                  value, "; split the call");
  return static_cast<int>(value);
}

// A matrix whose rows are contiguous and, for `alignment` numbers of 16 bytes, aligned.
void* matrix(const Tensor& tensor, ScalarType type, int64_t rows, int64_t columns,
             int64_t alignment, const char* name) {
  void* data = tensor.mutable_data_ptr();
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
                      tensor.scalar_type() == type && (columns <= 1 || tensor.stride(1) == 1),
                  name, " must be (", rows, ", ", columns,
                  ") of the operator's dtype with contiguous rows; call flowrl_kernels' public"
                  " operators");
  STD_TORCH_CHECK(rows == 0 || columns == 0 || (reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                                tensor.stride(0) % alignment == 0),
                  name, " must have rows at multiples of 16 bytes, got a stride of ",
                  tensor.stride(0), " numbers; copy it");
  return data;
}

float* optional_floats(const OptionalTensor& tensor, int64_t elements, const char* name) {
  return tensor ? checked<float>(*tensor, elements, name) : nullptr;
}

int64_t tile_columns(bool e4m3) { return e4m3 ? kTileColumnsE4m3 : kTileColumns; }

}  // namespace

// row_max, sum_exp, target, sum_exp_z (n,) each; tile_max (S, n)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> head_statistics(
    Tensor hidden, Tensor weight, Tensor targets, OptionalTensor out, OptionalTensor hidden_scale,
    OptionalTensor weight_scale, double scale, int64_t vocab_start, int64_t stream_number) {
  const int64_t n = hidden.size(0), D = hidden.size(1), V = weight.size(0);
  const bool e4m3 = hidden.scalar_type() == ScalarType::Float8_e4m3fn;
  const ScalarType type = e4m3 ? ScalarType::Float8_e4m3fn : ScalarType::BFloat16;
  STD_TORCH_CHECK(e4m3 == hidden_scale.has_value() && e4m3 == weight_scale.has_value(),
                  "e4m3 operands must come with both scales, and bfloat16 without; call"
                  " flowrl_kernels' public operators");
  STD_TORCH_CHECK(!(e4m3 && out), "out must be None for e4m3 operands, which have no gradient");
  const int64_t alignment = e4m3 ? 16 : 8;
  HeadForward call{};
  call.hidden = matrix(hidden, type, n, D, alignment, "hidden");
  call.weight = matrix(weight, type, V, D, alignment, "weight");
  STD_TORCH_CHECK(D % alignment == 0, "D must be a multiple of ", alignment, ", got ", D,
                  "; pad hidden and weight with columns of zeros");
  call.hidden_scale = optional_floats(hidden_scale, n, "hidden_scale");
  call.weight_scale = optional_floats(weight_scale, V, "weight_scale");
  call.targets = checked<int64_t>(targets, n, "targets");
  if (out) call.out = matrix(*out, ScalarType::BFloat16, n, V, 8, "out");

  const int64_t width = tile_columns(e4m3), S = (V + width - 1) / width;
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(hidden, shape, ScalarType::Float);
  };
  const Tensor tile_max = floats({S, n}), tile_sum = floats({S, n}), tile_sum_z = floats({S, n});
  const Tensor row_max = floats({n}), sum_exp = floats({n}), sum_exp_z = floats({n});
  Tensor target = floats({n});
  torch::stable::fill_(target, -std::numeric_limits<double>::infinity());
  call.tile_max = checked<float>(tile_max, S * n, "tile_max");
  call.tile_sum = checked<float>(tile_sum, S * n, "tile_sum");
  call.tile_sum_z = checked<float>(tile_sum_z, S * n, "tile_sum_z");
  call.target_logit = checked<float>(target, n, "target");
  call.num_rows = to_int(n, "the number of rows");
  call.num_columns = to_int(V, "the vocabulary");
  call.dim = to_int(D, "D");
  call.hidden_stride = hidden.stride(0);
  call.weight_stride = weight.stride(0);
  call.out_stride = out ? out->stride(0) : 0;
  call.vocab_start = vocab_start;
  call.scale = static_cast<float>(scale);
  const Stream stream = stream_of(stream_number);
  if (n > 0 && V > 0) {
    const auto forward = e4m3 ? head_forward_e4m3 : out ? head_forward_store : head_forward;
    succeeded(forward(call, stream), "the logits product");
  }
  const HeadMerge merge{call.tile_max,
                        call.tile_sum,
                        call.tile_sum_z,
                        checked<float>(row_max, n, "row_max"),
                        checked<float>(sum_exp, n, "sum_exp"),
                        checked<float>(sum_exp_z, n, "sum_exp_z"),
                        call.num_rows,
                        to_int(S, "the number of tiles")};
  if (n > 0) succeeded(head_merge(merge, stream), "the merge of tiles");
  return {row_max, sum_exp, target, sum_exp_z, tile_max};
}

void head_dlogits_(Tensor out, Tensor tile_max, Tensor row_max, Tensor log_sum, Tensor factor,
                   OptionalTensor slope, Tensor at_target, Tensor column, int64_t stream) {
  const int64_t n = out.size(0), V = out.size(1);
  if (n == 0 || V == 0) return;
  const int64_t S = (V + kTileColumns - 1) / kTileColumns;
  const HeadGradient call{matrix(out, ScalarType::BFloat16, n, V, 8, "out"),
                          checked<float>(tile_max, S * n, "tile_max"),
                          checked<float>(row_max, n, "row_max"),
                          checked<float>(log_sum, n, "log_sum"),
                          checked<float>(factor, n, "factor"),
                          optional_floats(slope, n, "slope"),
                          checked<float>(at_target, n, "at_target"),
                          checked<int64_t>(column, n, "column"),
                          to_int(n, "the number of rows"),
                          to_int(V, "the vocabulary"),
                          out.stride(0)};
  succeeded(head_dlogits(call, stream_of(stream)), "d(logits)");
}

void quantize_rows_(Tensor q, Tensor scale, Tensor x, int64_t stream) {
  const int64_t n = x.size(0), D = x.size(1);
  const QuantizeRows call{matrix(x, ScalarType::BFloat16, n, D, 1, "x"),
                          matrix(q, ScalarType::Float8_e4m3fn, n, D, 1, "q"),
                          checked<float>(scale, n, "scale"),
                          to_int(n, "the number of rows"),
                          to_int(D, "D"),
                          x.stride(0)};
  STD_TORCH_CHECK(q.is_contiguous(), "q must be contiguous; allocate it so");
  if (n > 0) succeeded(quantize_rows(call, stream_of(stream)), "rows to e4m3");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> balance(
    Tensor logprobs, OptionalTensor old_logprobs, Tensor ref_logprobs, Tensor log_z,
    Tensor rewards, Tensor cu_seqlens, OptionalTensor response_mask, double beta,
    std::optional<double> log_low, std::optional<double> log_high, bool length_norm, double scale,
    int64_t stream) {
  const int64_t T = logprobs.numel(), N = log_z.numel();
  const BalanceInputs in = {
      checked<float>(logprobs, T, "logprobs"),
      optional_floats(old_logprobs, T, "old_logprobs"),
      checked<float>(ref_logprobs, T, "ref_logprobs"),
      checked<float>(log_z, N, "log_z"),
      checked<float>(rewards, N, "rewards"),
      checked<int64_t>(cu_seqlens, N + 1, "cu_seqlens"),
      response_mask ? checked<bool>(*response_mask, T, "response_mask") : nullptr,
      {beta, scale, old_logprobs.has_value(), log_low.has_value(), log_high.has_value(),
       log_low.value_or(0), log_high.value_or(0), length_norm}};
  const auto per_sequence = [&](ScalarType type = ScalarType::Float) {
    return torch::stable::new_empty(logprobs, {N}, type);
  };
  const Tensor loss = torch::stable::new_empty(logprobs, {});
  const Tensor residual = per_sequence(), log_weight = per_sequence(), weight = per_sequence();
  const Tensor mean_current = per_sequence(), mean_ref = per_sequence(), dlog_z = per_sequence();
  const Tensor num_tokens = per_sequence(ScalarType::Long);
  const Tensor terms = per_sequence(ScalarType::Double);
  const Tensor dlogprobs = torch::stable::new_empty(logprobs, {T});
  const BalanceOutputs out = {
      checked<float>(residual, N, "residual"),
      checked<float>(log_weight, N, "log_weight"),
      checked<float>(weight, N, "weight"),
      checked<float>(mean_current, N, "mean_current"),
      checked<float>(mean_ref, N, "mean_ref"),
      checked<float>(dlog_z, N, "dlog_z"),
      checked<int64_t>(num_tokens, N, "num_tokens"),
      checked<float>(dlogprobs, T, "dlogprobs"),
      static_cast<double*>(terms.mutable_data_ptr())};
  succeeded(trajectory_balance(in, out, checked<float>(loss, 1, "loss"), to_int(N, "N"),
                               stream_of(stream)),
            "trajectory balance");
  return {loss,     residual,   log_weight, weight, mean_current,
          mean_ref, num_tokens, dlogprobs,  dlog_z};
}

}  // namespace flowrl::cuda

STABLE_TORCH_LIBRARY(flowrl_cuda, m) {
  m.def("tile_columns(bool e4m3) -> int");
  m.def(
      "head_statistics(Tensor hidden, Tensor weight, Tensor targets, Tensor(a!)? out,"
      " Tensor? hidden_scale, Tensor? weight_scale, float scale, int vocab_start, int stream)"
      " -> (Tensor row_max, Tensor sum_exp, Tensor target, Tensor sum_exp_z, Tensor tile_max)");
  m.def(
      "head_dlogits_(Tensor(a!) out, Tensor tile_max, Tensor row_max, Tensor log_sum,"
      " Tensor factor, Tensor? slope, Tensor at_target, Tensor column, int stream) -> ()");
  m.def("quantize_rows_(Tensor(a!) q, Tensor(b!) scale, Tensor x, int stream) -> ()");
  m.def(
      "trajectory_balance(Tensor logprobs, Tensor? old_logprobs, Tensor ref_logprobs, Tensor log_z,"
      " Tensor rewards, Tensor cu_seqlens, Tensor? response_mask, float beta, float? log_low,"
      " float? log_high, bool length_norm, float scale, int stream) -> (Tensor loss,"
      " Tensor residual, Tensor log_weight, Tensor weight, Tensor mean_logprob,"
      " Tensor mean_ref_logprob, Tensor num_tokens, Tensor dlogprobs, Tensor dlog_z)");
}

STABLE_TORCH_LIBRARY_IMPL(flowrl_cuda, CompositeExplicitAutograd, m) {
  m.impl("tile_columns", TORCH_BOX(&flowrl::cuda::tile_columns));
}

STABLE_TORCH_LIBRARY_IMPL(flowrl_cuda, CUDA, m) {
  m.impl("head_statistics", TORCH_BOX(&flowrl::cuda::head_statistics));
  m.impl("head_dlogits_", TORCH_BOX(&flowrl::cuda::head_dlogits_));
  m.impl("quantize_rows_", TORCH_BOX(&flowrl::cuda::quantize_rows_));
  m.impl("trajectory_balance", TORCH_BOX(&flowrl::cuda::balance));
}
