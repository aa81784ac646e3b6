// linear_policy_loss on Hopper: the product that keeps E = exp(z - its tile's maximum), and E
// turned in place into d(logits).

#include <algorithm>

#include "head_gemm.cuh"
#include "launch.cuh"

namespace flowrl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // columns of a thread: 16 bytes, all of one tile
static_assert(kTileColumns % kVector == 0, "a thread's columns lie in one tile");

template <bool kEntropy>
__global__ void __launch_bounds__(kThreads) dlogits_kernel(HeadGradient call) {
  const int column = (blockIdx.x * kThreads + threadIdx.x) * kVector;
  if (column >= call.num_columns) return;
  const int64_t tile_v = column / kTileColumns;
  const int count = min(kVector, call.num_columns - column);
  for (int row = blockIdx.y; row < call.num_rows; row += gridDim.y) {
    const TileGradient tile = tile_gradient(
        call.tile_max[tile_v * call.num_rows + row], call.row_max[row], call.log_sum[row],
        call.factor[row], kEntropy ? call.slope[row] : 0.0f);
    const int64_t target = call.column[row] - column;  // negative where another rank has it
    auto* place = static_cast<__nv_bfloat16*>(call.out) + row * call.out_stride + column;
    alignas(16) __nv_bfloat16 values[kVector];
    if (count == kVector)
      *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(place);
    else
      for (int i = 0; i < kVector; ++i) values[i] = i < count ? place[i] : __nv_bfloat16();
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float dz = dlogit<kEntropy>(__bfloat162float(values[i]), tile);
      if (target == i) dz = call.at_target[row];  // (p - 1) was made in float32
      values[i] = __float2bfloat16_rn(dz);
    }
    if (count == kVector)
      *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(values);
    else
      for (int i = 0; i < kVector; ++i)
        if (i < count) place[i] = values[i];
  }
}

}  // namespace

const char* head_forward_store(const HeadForward& call, Stream stream) {
  return HeadGemm<Bfloat16Tiles, true, false>::run(call, stream);
}

const char* head_dlogits(const HeadGradient& call, Stream stream) {
  constexpr int kColumns = kThreads * kVector;
  const dim3 grid((call.num_columns + kColumns - 1) / kColumns, std::min(call.num_rows, 65535));
  const auto kernel = call.slope ? dlogits_kernel<true> : dlogits_kernel<false>;
  return launch(kernel, grid, kThreads, stream, call);
}

}  // namespace flowrl::cuda
