// The tiles in which Hopper makes logits, and CUTLASS's main loop for them.
#pragma once

#include <cutlass/gemm/collective/collective_builder.hpp>

#include "cuda_operators.h"

namespace flowrl::cuda {

// Two warpgroups take tiles in turn: one multiplies while the other reduces. 192 columns: the
// widest tile whose accumulators leave registers for the reduction; a narrower one asks more of L2.
struct Bfloat16Tiles {
  using Element = cutlass::bfloat16_t;
  using Shape = cute::Shape<cute::_128, cute::Int<kTileColumns>, cute::_64>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
};

// Hopper's e4m3 products keep 14 bits while they accumulate: CUTLASS adds them up in float32 every
// 128 of D, in a second set of accumulators. Both warpgroups share a tile.
struct E4m3Tiles {
  using Element = cutlass::float_e4m3_t;
  using Shape = cute::Shape<cute::_128, cute::Int<kTileColumnsE4m3>, cute::_128>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
};

// Two blocks, one above the other, load their columns of the weight once for both.
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;

template <class Tiles>
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,
    typename Tiles::Element, cutlass::layout::RowMajor, 16 / sizeof(typename Tiles::Element),
    typename Tiles::Element, cutlass::layout::ColumnMajor, 16 / sizeof(typename Tiles::Element),
    float, typename Tiles::Shape, Cluster, cutlass::gemm::collective::StageCountAuto,
    typename Tiles::Schedule>::CollectiveOp;

}  // namespace flowrl::cuda
