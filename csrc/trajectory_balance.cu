// trajectory_balance on a GPU: a block a sequence, then one block that adds up the loss. Every sum
// has its order from the lengths alone.

#include "balance_arithmetic.h"
#include "cuda_operators.h"
#include "launch.cuh"

namespace flowrl::cuda {
namespace {

constexpr int kThreads = 128;

// A tree over the block; thread 0 has the sum. Sum: add(const Sum&).
template <class Sum>
__device__ void reduce(Sum (&of_thread)[kThreads]) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) of_thread[threadIdx.x].add(of_thread[threadIdx.x + half]);
  }
}

__global__ void __launch_bounds__(kThreads)
    balance_kernel(BalanceInputs in, BalanceOutputs out) {
  __shared__ BalanceSums sums[kThreads];
  __shared__ float per_token;
  const int64_t n = blockIdx.x, start = in.offsets[n], stop = in.offsets[n + 1];
  BalanceSums mine{};
  for (int64_t t = start + threadIdx.x; t < stop; t += kThreads) in.add_token(t, mine);
  sums[threadIdx.x] = mine;
  reduce(sums);
  if (threadIdx.x == 0) {
    const auto s = balance_sequence(sums[0], in.log_z[n], in.rewards[n], in.options);
    out.write(n, sums[0], s);
    per_token = static_cast<float>(s.per_token);
  }
  __syncthreads();
  for (int64_t t = start + threadIdx.x; t < stop; t += kThreads)
    out.dlogprobs[t] = in.counts(t) ? per_token : 0.0f;
}

struct Loss {
  double value;
  __device__ void add(const Loss& other) { value += other.value; }
};

__global__ void __launch_bounds__(kThreads)
    loss_kernel(const double* terms, int64_t num_sequences, double scale, float* loss) {
  __shared__ Loss sums[kThreads];
  double mine = 0;
  for (int64_t n = threadIdx.x; n < num_sequences; n += kThreads) mine += terms[n];
  sums[threadIdx.x].value = mine;
  reduce(sums);
  if (threadIdx.x == 0) *loss = static_cast<float>(scale * sums[0].value);
}

}  // namespace

const char* trajectory_balance(const BalanceInputs& in, const BalanceOutputs& out, float* loss,
                               int64_t num_sequences, Stream stream) {
  const char* error = nullptr;
  if (num_sequences > 0) error = launch(balance_kernel, num_sequences, kThreads, stream, in, out);
  if (error) return error;
  const double scale = in.options.scale;
  return launch(loss_kernel, 1, kThreads, stream, out.terms, num_sequences, scale, loss);
}

}  // namespace flowrl::cuda
