// The functions of csrc/include/tile_arithmetic.h over whole arrays, on the processor, in the order
// of the CUDA kernels. test_device_arithmetic.py calls them.

#include <barrier>
#include <thread>
#include <vector>

#include "tile_arithmetic.h"

using namespace flowrl;

extern "C" {

// z (columns,) in tiles of `width`: E (columns,) and, per tile, maximum, sum, sum of E (z - max).
// The last tile is filled up with kNoLogit, as on the GPU.
void reduce_row(const float* z, int columns, int width, float* e, Partial* tiles) {
  for (int first = 0; first < columns; first += width) {
    float largest = kNoLogit;
    for (int j = first; j < first + width && j < columns; ++j) largest = fmaxf(largest, z[j]);
    Partial lanes[4];  // of a quad: pairs of columns in turn
    for (auto& lane : lanes) lane = {largest, 0, 0};
    for (int j = first; j < first + width; ++j) {
      const float value = add_logit(j < columns ? z[j] : kNoLogit, lanes[(j - first) / 2 % 4]);
      if (j < columns) e[j] = value;
    }
    tiles[first / width] = {largest,
                            (lanes[0].sum + lanes[1].sum) + (lanes[2].sum + lanes[3].sum),
                            (lanes[0].sum_z + lanes[1].sum_z) + (lanes[2].sum_z + lanes[3].sum_z)};
  }
}

void merge_row(const Partial* tiles, int num_tiles, int lists, Partial* row) {
  *row = {-INFINITY, 0, 0};
  for (int i = 0; i < num_tiles; ++i) row->max = max_or_nan(row->max, tiles[i].max);
  for (int list = 0; list < lists; ++list) {
    Partial sums{row->max, 0, 0};
    for (int i = list; i < num_tiles; i += lists) add_tile(tiles[i], sums);
    row->sum += sums.sum;
    row->sum_z += sums.sum_z;
  }
}

void dlogits_row(const float* e, int columns, int width, const Partial* tiles, float row_max,
                 float log_sum, float factor, float slope, bool entropy, float* dz) {
  for (int j = 0; j < columns; ++j) {
    const auto tile = tile_gradient(tiles[j / width].max, row_max, log_sum, factor, slope);
    dz[j] = entropy ? dlogit<true>(e[j], tile) : dlogit<false>(e[j], tile);
  }
}

float scale_of(float largest) { return e4m3_scale(largest); }

// words (4 lanes, 4 words), exchanged between four threads as a quad exchanges them.
void transpose_words(unsigned* words) {
  std::barrier<> step(4);
  unsigned given[4];
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < 4; ++lane)
    lanes.emplace_back([&, lane] {
      auto& mine = *reinterpret_cast<unsigned (*)[4]>(words + 4 * lane);
      transpose_quad(mine, lane, [&](unsigned word, int mask) {
        given[lane] = word;
        step.arrive_and_wait();
        const unsigned other = given[lane ^ mask];
        step.arrive_and_wait();
        return other;
      });
    });
  for (auto& lane : lanes) lane.join();
}

}
