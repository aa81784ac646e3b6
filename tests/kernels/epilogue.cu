// The epilogue on the processor. For every thread that multiplies a tile: do by_rows and
// thread_coordinates name each result once, where HeadEpilogue takes it to be? And what does
// HeadEpilogue make of known logits, quad by quad, its lanes in threads? Prints what is wrong.

#include <barrier>
#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

#include "head_epilogue.cuh"
#include "head_tiles.h"

using namespace cute;
using namespace flowrl::cuda;

template <class Tiles>
int check(const char* name) {
  using Tile = typename Tiles::Shape;
  const typename Mainloop<Tiles>::TiledMma mma;
  const int tile_rows = size<0>(Tile{}), tile_columns = size<1>(Tile{});
  const int tile_t = 3, tile_v = 5, threads = size(mma);
  std::vector<int> seen(tile_rows * tile_columns);
  int faults = 0;
  const auto fault = [&](const char* what, int thread) {
    if (++faults <= 5) std::printf("%s: %s at thread %d\n", name, what, thread);
  };
  const auto coordinates = [&](int thread) {
    return thread_coordinates(mma, make_shape(100000, 100000), take<0, 2>(Tile{}),
                              make_coord(tile_t, tile_v), thread);
  };
  for (int thread = 0; thread < threads; ++thread) {
    const auto at = coordinates(thread);
    const auto first_of_quad = coordinates(thread / 4 * 4);
    const int lane = (get<1>(at(0, 0)) - tile_v * tile_columns) / 2;
    if (lane != thread % 4) fault("the lane in its quad", thread);
    for (int r = 0; r < size<0>(at); ++r) {
      if (get<0>(at(r, 0)) != get<0>(first_of_quad(r, 0))) fault("a quad's row", thread);
      for (int c = 0; c < size<1>(at); ++c) {
        const int row = get<0>(at(r, c)) - tile_t * tile_rows;
        const int column = get<1>(at(r, c)) - tile_v * tile_columns;
        if (row < 0 || row >= tile_rows || column < 0 || column >= tile_columns) {
          fault("a coordinate outside the tile", thread);
          continue;
        }
        ++seen[row * tile_columns + column];
        if (get<0>(at(r, c)) != get<0>(at(r, 0))) fault("a row of several rows", thread);
        // What store_row turns: words of pairs, four blocks of eight columns a group.
        if (column != block_column(c / 8, c / 2 % 4) + 2 * lane + c % 2)
          fault("a column of a block", thread);
      }
    }
  }
  for (const int times : seen)
    if (times != 1) fault("a result that is not there once", -1);
  std::printf("%s: %d threads, %d x %d, %d faults\n", name, threads, tile_rows, tile_columns,
              faults);
  return faults;
}

std::barrier<> quad_step(4);
unsigned quad_words[4];
thread_local int quad_lane;

unsigned exchange(unsigned word, int mask) {
  quad_words[quad_lane] = word;
  quad_step.arrive_and_wait();
  const unsigned other = quad_words[quad_lane ^ mask];
  quad_step.arrive_and_wait();
  return other;
}

float logit(int row, int column) { return 6 * std::sin(1.0f + row * 37 + column * 11.3f); }

// Rows and columns beyond the matrix are in the tiles; the last tile of both is looked at.
template <class Tiles, bool kStore, bool kScaled>
int check_epilogue(const char* name, int num_columns, int vocab_start) {
  using Tile = typename Tiles::Shape;
  const typename Mainloop<Tiles>::TiledMma mma;
  constexpr int kRows = size<0>(Tile{}), kColumns = size<1>(Tile{});
  const int n = kRows + 70, S = (num_columns + kColumns - 1) / kColumns, stride = S * kColumns;
  std::vector<float> max(S * n, -7), sum(S * n, -7), sum_z(S * n, -7), target_logit(n, -7);
  std::vector<float> of_row(n), of_column(num_columns);
  std::vector<int64_t> targets(n);
  std::vector<__nv_bfloat16> out(n * stride, __float2bfloat16_rn(7));
  for (int i = 0; i < n; ++i) of_row[i] = kScaled ? 0.5f + i % 3 : 1, targets[i] = 1000 + i * 5;
  for (int j = 0; j < num_columns; ++j) of_column[j] = kScaled ? 0.25f + j % 5 : 1;
  HeadForward call{};
  call.hidden_scale = of_row.data(), call.weight_scale = of_column.data();
  call.targets = targets.data(), call.out = out.data(), call.target_logit = target_logit.data();
  call.tile_max = max.data(), call.tile_sum = sum.data(), call.tile_sum_z = sum_z.data();
  call.num_rows = n, call.num_columns = num_columns, call.out_stride = stride;
  call.vocab_start = vocab_start, call.scale = 0.7f;
  const auto shape = make_shape(n, num_columns, 64, 1);

  for (int tile_t = 0; tile_t < 3; ++tile_t)  // the third, and the last column, are past the end
    for (int tile_v = 0; tile_v <= S; ++tile_v)
      for (int quad = 0; quad < size(mma) / 4; ++quad) {
        std::vector<std::thread> lanes;
        for (int lane = 0; lane < 4; ++lane)
          lanes.emplace_back([&, lane] {
            quad_lane = lane, flowrl::cuda::exchange_words = exchange;
            const int thread = 4 * quad + lane;
            const auto tile = make_coord(tile_t, tile_v, 0, 0);
            auto results = partition_fragment_C(mma, take<0, 2>(Tile{}));
            auto z = by_rows(results);
            const auto at = thread_coordinates(mma, take<0, 2>(shape), take<0, 2>(Tile{}),
                                               make_coord(tile_t, tile_v), thread);
            for (int r = 0; r < size<0>(z); ++r)
              for (int c = 0; c < size<1>(z); ++c)
                z(r, c) = logit(get<0>(at(r, c)), get<1>(at(r, c)));
            HeadEpilogue<kStore, kScaled> epilogue(call);
            epilogue(shape, Tile{}, tile, results, mma, 0, thread, nullptr);
          });
        for (auto& lane : lanes) lane.join();
      }

  int faults = 0;
  const auto expect = [&](double found, double right, double tolerance, const char* what, int row) {
    if (!(std::abs(found - right) <= tolerance) && ++faults <= 8)
      std::printf("%s: %s of row %d is %g, not %g\n", name, what, row, found, right);
  };
  for (int row = 0; row < n; ++row) {
    const auto z = [&](int j) { return double(logit(row, j)) * 0.7f * of_row[row] * of_column[j]; };
    const int64_t target = targets[row] - 1000;
    expect(target_logit[row], target < num_columns ? z(target) : -7, 1e-5, "the target", row);
    for (int tile = 0; tile < S; ++tile) {
      const int first = tile * kColumns, last = std::min(first + kColumns, num_columns);
      double m = -1e30, s = 0, s_z = 0;
      for (int j = first; j < last; ++j) m = std::max(m, z(j));
      for (int j = first; j < last; ++j) {
        s += std::exp(z(j) - m);
        s_z += std::exp(z(j) - m) * (z(j) - m);
      }
      expect(max[tile * n + row], m, 1e-5, "the maximum", row);
      expect(sum[tile * n + row], s, 1e-5 * s, "the sum", row);
      expect(sum_z[tile * n + row], s_z, 1e-4, "the entropy's sum", row);
      for (int j = first; j < first + kColumns; ++j) {
        const double e = kStore && j < last ? std::exp(z(j) - m) : 7;
        expect(__bfloat162float(out[row * stride + j]), e, e / 250, "E", row);
      }
    }
  }
  std::printf("%s: %d faults\n", name, faults);
  return faults;
}

// With an argument, a vocabulary that starts one column too late: the check has to see it.
int main(int argc, char**) {
  const int start = argc > 1 ? 1001 : 1000;
  int faults = check<Bfloat16Tiles>("bfloat16") + check<E4m3Tiles>("e4m3");
  for (const int columns : {1, 187, 192, 197, 390})
    faults += check_epilogue<Bfloat16Tiles, true, false>("store", columns, start);
  faults += check_epilogue<E4m3Tiles, false, true>("scaled", 300, start);
  return faults != 0;
}
