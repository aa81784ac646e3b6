// For every thread that multiplies a tile: do by_rows and thread_coordinates name each result once,
// and is it where HeadEpilogue takes it to be? Runs on the processor. Prints what is wrong.

#include <cstdio>
#include <vector>

#include "accumulator_rows.h"
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

int main() { return check<Bfloat16Tiles>("bfloat16") + check<E4m3Tiles>("e4m3") != 0; }
