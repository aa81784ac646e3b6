// Which row and column of the product each accumulator of a thread belongs to, from CuTe's own
// partition. tests/kernels/epilogue.cu checks it for every thread on the processor.
#pragma once

#include <cute/tensor.hpp>

namespace flowrl::cuda {

// ((pair, half, block), MMA_M, MMA_N), as wgmma leaves its results, to (rows, columns).
template <class Results>
CUTE_HOST_DEVICE auto by_rows(Results&& results) {
  using namespace cute;
  const auto l = results.layout();
  static_assert(rank(decltype(l){}) == 3 && rank(get<0>(l)) == 3, "wgmma's results");
  const auto rows_columns = make_layout(make_layout(get<0, 1>(l), get<1>(l)),
                                        make_layout(get<0, 0>(l), get<0, 2>(l), get<2>(l)));
  return make_tensor(results.data(), rows_columns);
}

// (row, column) of each of this thread's results, as by_rows orders them.
template <class TiledMma, class Shape, class TileShape, class TileCoord>
CUTE_HOST_DEVICE auto thread_coordinates(const TiledMma& mma, Shape shape, TileShape tile_shape,
                                         TileCoord tile, int thread) {
  using namespace cute;
  const auto of_tile = local_tile(make_identity_tensor(shape), tile_shape, tile);
  return by_rows(mma.get_thread_slice(thread).partition_C(of_tile));
}

// First column, from the tile's, of the block of eight that `lane` of a quad writes: blocks come
// in groups of four.
CUTE_HOST_DEVICE constexpr int block_column(int group, int lane) { return 8 * (4 * group + lane); }

}  // namespace flowrl::cuda
