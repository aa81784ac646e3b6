// The reduction that takes the place of the store of logits: per row and tile the maximum and the
// sums, the target's logit and, for the gradient, E.
//
// It reads the float32 accumulators where they are: a row of a tile lies in a quad's four lanes.
// tests/kernels/epilogue.cu runs it on the processor, lane by lane.
#pragma once

#include <cuda_bf16.h>

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/dispatch_policy.hpp>

#include "accumulator_rows.h"
#include "cuda_operators.h"
#include "tile_arithmetic.h"

namespace flowrl::cuda {

// How lanes that run on the processor exchange words; set by their test.
inline thread_local unsigned (*exchange_words)(unsigned word, int mask) = nullptr;

// The value of the lane whose number differs by `mask`.
template <class Value>
CUTLASS_HOST_DEVICE Value of_lane(Value value, int mask) {
#if defined(__CUDA_ARCH__)
  return __shfl_xor_sync(~0u, value, mask);
#else
  const unsigned other = exchange_words(reinterpret_cast<const unsigned&>(value), mask);
  return reinterpret_cast<const Value&>(other);
#endif
}

template <bool kStore, bool kScaled>
class HeadEpilogue {
 public:
  // What CUTLASS asks of an epilogue; there is no matrix C, and D is written by hand.
  using EpilogueSchedule = cutlass::gemm::EpilogueDefault;
  using DispatchPolicy = EpilogueSchedule;
  using ElementC = float;
  using ElementD = float;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  using GmemTiledCopyC = void;
  using GmemTiledCopyD = void;
  struct ThreadEpilogueOp {
    using ElementCompute = float;
    using ElementAccumulator = float;
    using ElementOutput = float;
    using ElementScalar = float;
    using ElementC = float;
    using ElementD = float;
    static constexpr int kCount = 1;
  };
  struct SharedStorage {};
  using TensorStorage = SharedStorage;
  using Arguments = HeadForward;
  using Params = HeadForward;

  template <class Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE explicit HeadEpilogue(const Params& params) : params_(params) {}

  CUTLASS_HOST_DEVICE bool is_source_needed() { return false; }

  template <class Shape, class TileShape, class TileCoord, class Engine, class Layout,
            class TiledMma, class Residue>
  CUTLASS_HOST_DEVICE void operator()(Shape shape, TileShape tile_shape, TileCoord tile_coord,
                                 cute::Tensor<Engine, Layout>& accumulators,
                                 TiledMma tiled_mma, Residue, int thread, char*) {
    using namespace cute;
    const int tile_v = get<1>(tile_coord);
    const int first_column = tile_v * size<1>(tile_shape);
    if (first_column >= params_.num_columns) return;  // clusters and swizzles round tiles up
    auto z = by_rows(accumulators);                   // (rows, columns) of this thread
    const auto at = thread_coordinates(tiled_mma, take<0, 2>(shape), take<0, 2>(tile_shape),
                                       make_coord(get<0>(tile_coord), tile_v), thread);
    const bool ragged = first_column + size<1>(tile_shape) > params_.num_columns;
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < size<0>(z); ++r) {
      scale_row(z, at, r, ragged);
      reduce_row(z, at, r, tile_v, first_column, size<1>(tile_shape));
    }
  }

 private:
  const Params& params_;

  template <class Logits, class Coordinates>
  CUTLASS_HOST_DEVICE void scale_row(Logits& z, const Coordinates& at, int r, bool ragged) {
    using namespace cute;
    const int row = get<0>(at(r, 0));
    float scale = params_.scale;
    if constexpr (kScaled) scale *= row < params_.num_rows ? params_.hidden_scale[row] : 0.0f;
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < size<1>(z); ++c) {
      z(r, c) *= scale;
      if constexpr (kScaled) {
        const int column = get<1>(at(r, c));
        if (column < params_.num_columns) z(r, c) *= params_.weight_scale[column];
      }
    }
    if (!ragged) return;
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < size<1>(z); ++c)
      if (get<1>(at(r, c)) >= params_.num_columns) z(r, c) = kNoLogit;
  }

  template <class Logits, class Coordinates>
  CUTLASS_HOST_DEVICE void reduce_row(Logits& z, const Coordinates& at, int r, int tile_v,
                                 int first_column, int tile_columns) {
    using namespace cute;
    const int row = get<0>(at(r, 0));
    const bool in_rows = row < params_.num_rows;
    Partial sums{z(r, 0), 0.0f, 0.0f};
    CUTLASS_PRAGMA_UNROLL
    for (int c = 1; c < size<1>(z); ++c) sums.max = fmaxf(sums.max, z(r, c));
    sums.max = fmaxf(sums.max, of_lane(sums.max, 1));
    sums.max = fmaxf(sums.max, of_lane(sums.max, 2));
    const int64_t target = in_rows ? params_.targets[row] - params_.vocab_start : -1;
    if (target >= first_column && target < first_column + tile_columns &&
        target < params_.num_columns) {  // one tile in 800 has the row's target
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < size<1>(z); ++c)
        if (get<1>(at(r, c)) == target) params_.target_logit[row] = z(r, c);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < size<1>(z); ++c) z(r, c) = add_logit(z(r, c), sums);
    // a + b = b + a: the four lanes have the same sums, bit for bit.
    sums.sum += of_lane(sums.sum, 1);
    sums.sum += of_lane(sums.sum, 2);
    sums.sum_z += of_lane(sums.sum_z, 1);
    sums.sum_z += of_lane(sums.sum_z, 2);
    if (in_rows && get<1>(at(r, 0)) == first_column) {  // one lane of the four
      const int64_t place = static_cast<int64_t>(tile_v) * params_.num_rows + row;
      params_.tile_max[place] = sums.max;
      params_.tile_sum[place] = sums.sum;
      params_.tile_sum_z[place] = sums.sum_z;
    }
    if constexpr (kStore) store_row(z, at, r, first_column, in_rows ? row : -1);
  }

  // A lane holds pairs of columns, a quad eight in a row. Four such blocks at a time are turned, so
  // that each lane writes eight columns, 16 bytes, of one block.
  template <class Logits, class Coordinates>
  CUTLASS_HOST_DEVICE void store_row(const Logits& e, const Coordinates& at, int r,
                                     int first_column, int row) {
    using namespace cute;
    constexpr int kPairs = size<1>(Logits{}) / 2;
    static_assert(kPairs % 4 == 0, "whole groups of four blocks");
    const int lane = (get<1>(at(r, 0)) - first_column) / 2;
    auto* out = static_cast<__nv_bfloat16*>(params_.out) + row * params_.out_stride;
    CUTLASS_PRAGMA_UNROLL
    for (int group = 0; group < kPairs / 4; ++group) {
      unsigned words[4];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int c = 2 * (4 * group + i);
        const __nv_bfloat162 pair = __floats2bfloat162_rn(e(r, c), e(r, c + 1));
        words[i] = reinterpret_cast<const unsigned&>(pair);
      }
      transpose_quad(words, lane, of_lane<unsigned>);
      const int column = first_column + block_column(group, lane);
      const int count = row < 0 ? 0 : params_.num_columns - column;
      if (count >= 8) {
        *reinterpret_cast<uint4*>(out + column) = {words[0], words[1], words[2], words[3]};
      } else {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 8; ++i)
          if (i < count) out[column + i] = __ushort_as_bfloat16(words[i / 2] >> 16 * (i % 2));
      }
    }
  }
};

}  // namespace flowrl::cuda
