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

// How tiles are taken, so that the weight passes by once for as many rows as L2 holds.
//
// Rows that all stay in L2: a column of tiles after the other. More of them: groups of
// max_swizzle_size clusters of row blocks, each along the vocabulary. CUTLASS rounds row blocks up
// to whole groups, columns of tiles too, and multiplies what is beyond the last row for nothing:
// the largest group that costs no more than a sixteenth.
constexpr int64_t kRowBytesInL2 = int64_t{32} << 20;

constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

constexpr int swizzle(int64_t row_blocks, int64_t column_blocks) {
  const int64_t cluster = cute::size<0>(Cluster{});
  const int64_t least = round_up(row_blocks, cluster) * column_blocks;
  for (int size = 8; size > 1; size /= 2) {
    const int64_t blocks = round_up(row_blocks, size * cluster) * round_up(column_blocks, size);
    if (blocks - least <= least / 16) return size;
  }
  return 1;
}

static_assert(swizzle(64, 792) == 8, "T 8192");
static_assert(swizzle(65, 792) == 2, "T 8200: 68 instead of 66 blocks of rows, with 8 it were 80");
static_assert(swizzle(17, 792) == 1, "T 2100: with 8 it were 32 instead of 18");
static_assert(swizzle(128, 99) == 8, "a shard of the vocabulary");

template <class Tiles>
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,
    typename Tiles::Element, cutlass::layout::RowMajor, 16 / sizeof(typename Tiles::Element),
    typename Tiles::Element, cutlass::layout::ColumnMajor, 16 / sizeof(typename Tiles::Element),
    float, typename Tiles::Shape, Cluster, cutlass::gemm::collective::StageCountAuto,
    typename Tiles::Schedule>::CollectiveOp;

}  // namespace flowrl::cuda
