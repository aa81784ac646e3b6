// The logits product on the processor, tile by tile with the arithmetic of the kernel. Takes the
// place of csrc/head_gemm.cuh, and of CUTLASS (test_emulated_kernels.py).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <vector>

#include "cuda_operators.h"
#include "tile_arithmetic.h"

namespace flowrl::cuda {

struct Bfloat16Tiles {
  using Element = __nv_bfloat16;
  static constexpr int kColumns = kTileColumns;
};

struct E4m3Tiles {
  using Element = __nv_fp8_e4m3;
  static constexpr int kColumns = kTileColumnsE4m3;
};

template <class Tiles, bool kStore, bool kScaled>
struct HeadGemm {
  using Element = typename Tiles::Element;

  static const char* run(const HeadForward& call, Stream) {
    for (int row = 0; row < call.num_rows; ++row)
      for (int first = 0; first < call.num_columns; first += Tiles::kColumns)
        reduce(call, row, first);
    return nullptr;
  }

  static void reduce(const HeadForward& call, int row, int first) {
    const auto* x = static_cast<const Element*>(call.hidden) + row * call.hidden_stride;
    const auto* w = static_cast<const Element*>(call.weight);
    const float scale = call.scale * (kScaled ? call.hidden_scale[row] : 1.0f);
    std::vector<float> z(Tiles::kColumns, kNoLogit);
    for (int i = 0; i < Tiles::kColumns && first + i < call.num_columns; ++i) {
      double sum = 0;
      for (int k = 0; k < call.dim; ++k)
        sum += static_cast<double>(static_cast<float>(x[k])) *
               static_cast<float>(w[(first + i) * call.weight_stride + k]);
      z[i] = static_cast<float>(sum) * scale * (kScaled ? call.weight_scale[first + i] : 1.0f);
    }
    const int64_t target = call.targets[row] - call.vocab_start - first;
    if (target >= 0 && target < Tiles::kColumns && first + target < call.num_columns)
      call.target_logit[row] = z[target];
    Partial sums{*std::max_element(z.begin(), z.end()), 0, 0};
    for (int i = 0; i < Tiles::kColumns; ++i) {
      const float e = add_logit(z[i], sums);
      if (kStore && first + i < call.num_columns)
        static_cast<__nv_bfloat16*>(call.out)[row * call.out_stride + first + i] =
            __float2bfloat16_rn(e);
    }
    const int64_t place = static_cast<int64_t>(first / Tiles::kColumns) * call.num_rows + row;
    call.tile_max[place] = sums.max;
    call.tile_sum[place] = sums.sum;
    call.tile_sum_z[place] = sums.sum_z;
  }
};

}  // namespace flowrl::cuda
