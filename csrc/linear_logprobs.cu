// linear_logprobs on Hopper: logits reduced where they are made, in bfloat16 and in e4m3; the merge
// of tiles; rows to e4m3.

#include <cuda_fp8.h>

#include <algorithm>

#include "head_gemm.cuh"
#include "launch.cuh"

namespace flowrl::cuda {
namespace {

constexpr int kMergeRows = 32;   // of a block, one a lane
constexpr int kMergeLists = 16;  // strided lists of tiles, one a warp
constexpr int kQuantizeThreads = 256;

// A row's tiles s, s + kMergeLists, ... are one warp's; the lists are added in order. Which sums
// are added to which depends on the number of tiles alone.
__global__ void __launch_bounds__(kMergeRows * kMergeLists) merge_kernel(HeadMerge call) {
  __shared__ Partial lists[kMergeLists][kMergeRows];
  const int row = blockIdx.x * kMergeRows + threadIdx.x;
  const bool in_rows = row < call.num_rows;
  const auto place = [&](int tile) { return static_cast<int64_t>(tile) * call.num_rows + row; };
  float largest = -INFINITY;
  for (int tile = threadIdx.y; in_rows && tile < call.num_tiles; tile += kMergeLists)
    largest = max_or_nan(largest, call.tile_max[place(tile)]);
  lists[threadIdx.y][threadIdx.x].max = largest;
  __syncthreads();
  Partial sums{-INFINITY, 0.0f, 0.0f};
  for (int list = 0; list < kMergeLists; ++list)
    sums.max = max_or_nan(sums.max, lists[list][threadIdx.x].max);
  for (int tile = threadIdx.y; in_rows && tile < call.num_tiles; tile += kMergeLists) {
    const int64_t at = place(tile);
    add_tile({call.tile_max[at], call.tile_sum[at], call.tile_sum_z[at]}, sums);
  }
  __syncthreads();
  lists[threadIdx.y][threadIdx.x] = sums;
  __syncthreads();
  if (threadIdx.y != 0 || !in_rows) return;
  for (int list = 1; list < kMergeLists; ++list) {
    sums.sum += lists[list][threadIdx.x].sum;
    sums.sum_z += lists[list][threadIdx.x].sum_z;
  }
  call.row_max[row] = sums.max;
  call.sum_exp[row] = sums.sum;
  call.sum_exp_z[row] = sums.sum_z;
}

__global__ void __launch_bounds__(kQuantizeThreads) quantize_kernel(QuantizeRows call) {
  __shared__ float of_warp[kQuantizeThreads / 32];
  const auto* x = static_cast<const __nv_bfloat16*>(call.x) + blockIdx.x * call.x_stride;
  auto* q = static_cast<__nv_fp8_e4m3*>(call.q) + static_cast<int64_t>(blockIdx.x) * call.dim;
  float largest = 0.0f;
  for (int i = threadIdx.x; i < call.dim; i += kQuantizeThreads)
    largest = max_or_nan(largest, fabsf(__bfloat162float(x[i])));
  for (int mask = 16; mask > 0; mask /= 2)
    largest = max_or_nan(largest, __shfl_xor_sync(~0u, largest, mask));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  for (const float other : of_warp) largest = max_or_nan(largest, other);
  const float scale = e4m3_scale(largest);
  if (threadIdx.x == 0) call.scale[blockIdx.x] = scale;
  for (int i = threadIdx.x; i < call.dim; i += kQuantizeThreads)
    q[i] = __nv_fp8_e4m3(__bfloat162float(x[i]) / scale);  // saturates at 448
}

}  // namespace

const char* head_forward(const HeadForward& call, Stream stream) {
  return HeadGemm<Bfloat16Tiles, false, false>::run(call, stream);
}

const char* head_forward_e4m3(const HeadForward& call, Stream stream) {
  return HeadGemm<E4m3Tiles, false, true>::run(call, stream);
}

const char* head_merge(const HeadMerge& call, Stream stream) {
  const dim3 block(kMergeRows, kMergeLists);
  return launch(merge_kernel, (call.num_rows + kMergeRows - 1) / kMergeRows, block, stream, call);
}

const char* quantize_rows(const QuantizeRows& call, Stream stream) {
  return launch(quantize_kernel, call.num_rows, kQuantizeThreads, stream, call);
}

}  // namespace flowrl::cuda
