// The three products of the output layer for float32 operands, in blocks that stay in the caches.
//
// Each number of a result is summed in the same order for any number of threads, and in a row of
// logits or of d(hidden) for any other rows.

#include <algorithm>

#include "fp32_products.h"
#include "product_buffers.h"

namespace flowrl {
namespace {

constexpr int64_t kDepth = 512;          // of sums between two looks at the result, at most
constexpr int64_t kLogitColumns = 128;   // a tile of the weight: 256 KB
constexpr int64_t kHiddenDepth = 256;    // of the vocabulary, at a time, in d(hidden)
constexpr int64_t kRowGroup = 384;       // rows of d(hidden) that share a packed panel
constexpr int64_t kWeightRows = 120;     // of d(weight) at a time: eight cache lines of dlogits

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t rounded(int64_t size, int64_t step) { return divided(size, step) * step; }

// Equal parts, and where part `index` begins.
struct Parts {
  int64_t size, count, most;
  Parts(int64_t size, int64_t limit)
      : size(size), count(std::max<int64_t>(divided(size, limit), 1)), most(divided(size, count)) {}
  int64_t begin(int64_t index) const { return size * index / count; }
};

// `rows` packed rows are as many left operands as this, each left_stride(depth) after the other.
int64_t left_numbers(int64_t rows, int64_t depth) {
  return divided(rows, kFp32Rows) * left_stride(depth);
}

// All results of `rows` packed rows, a block after the other, and one panel.
void multiply(const Fp32Kernels& kernels, const float* left, int64_t rows, const float* panel,
              int64_t depth, Destination to) {
  for (int64_t row = 0; row < rows; row += kFp32Rows)
    kernels.block(left + left_numbers(row, depth), panel, depth,
                  {to.out + row * to.stride, to.stride, std::min(kFp32Rows, rows - row),
                   to.columns, to.scale, to.accumulate});
}

void pack_rows(const Fp32Kernels& kernels, const float* from, int64_t stride, int64_t rows,
               int64_t depth, float* to) {
  for (int64_t row = 0; row < rows; row += kFp32Rows)
    kernels.pack_left(from + row * stride, stride, std::min(kFp32Rows, rows - row), depth,
                      to + left_numbers(row, depth));
}

}  // namespace

void fp32_logits(const Fp32Kernels& kernels, const HeadShape& s, const float* hidden,
                 const float* weight, float scale, float* out) {
  const Parts slabs(s.D, kDepth);
  const int64_t slab_numbers = left_numbers(s.n, slabs.most);
  const Buffer<float> left = aligned_buffer<float>(slabs.count * slab_numbers);
  for (int64_t slab = 0; slab < slabs.count; ++slab) {
    const int64_t start = slabs.begin(slab);
    pack_rows(kernels, hidden + start, s.D, s.n, slabs.begin(slab + 1) - start,
              &left[slab * slab_numbers]);
  }
  torch::stable::parallel_for(0, divided(s.V, kLogitColumns), 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> panels = aligned_buffer<float>(kLogitColumns * slabs.most);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kLogitColumns, width = std::min(kLogitColumns, s.V - first);
      for (int64_t slab = 0; slab < slabs.count; ++slab) {
        const int64_t start = slabs.begin(slab), depth = slabs.begin(slab + 1) - start;
        for (int64_t column = 0; column < width; column += kFp32Columns)
          kernels.pack_panel_transposed(weight + (first + column) * s.D + start, s.D,
                                        width - column, depth, &panels[column * depth]);
        for (int64_t row = 0; row < s.n; row += kFp32Rows)
          for (int64_t column = 0; column < width; column += kFp32Columns)
            kernels.block(&left[slab * slab_numbers + left_numbers(row, depth)],
                          &panels[column * depth], depth,
                          {out + row * s.V + first + column, s.V, std::min(kFp32Rows, s.n - row),
                           width - column, scale, slab > 0});
      }
    }
  });
}

void fp32_dhidden(const Fp32Kernels& kernels, const HeadShape& s, const float* dlogits,
                  const float* weight, float* total) {
  if (s.V == 0) std::fill_n(total, s.n * s.D, 0.0f);
  const int64_t slices = slices_of(s.V);
  const Buffer<float> others = aligned_buffer<float>((slices - 1) * s.n * s.D);
  // Enough groups of rows for every thread to have one.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = std::max(divided(s.n, kRowGroup), divided(threads, slices));
  const int64_t group_rows = rounded(std::max<int64_t>(divided(s.n, wanted), 1), kFp32Rows);
  const int64_t groups = divided(s.n, group_rows);

  torch::stable::parallel_for(0, slices * groups, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> left = aligned_buffer<float>(left_numbers(group_rows, kHiddenDepth));
    const Buffer<float> panel = aligned_buffer<float>(kHiddenDepth * kFp32Columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / groups, row = task % groups * group_rows;
      const int64_t start = s.V * slice / slices, stop = s.V * (slice + 1) / slices;
      const int64_t rows = std::min(group_rows, s.n - row);
      float* out = (slice == 0 ? total : &others[(slice - 1) * s.n * s.D]) + row * s.D;
      for (int64_t k = start; k < stop; k += kHiddenDepth) {
        const int64_t depth = std::min(kHiddenDepth, stop - k);
        pack_rows(kernels, dlogits + row * s.V + k, s.V, rows, depth, left.get());
        for (int64_t column = 0; column < s.D; column += kFp32Columns) {
          kernels.pack_panel(weight + k * s.D + column, s.D, s.D - column, depth, panel.get());
          multiply(kernels, left.get(), rows, panel.get(), depth,
                   {out + column, s.D, 0, s.D - column, 1.0f, k > start});
        }
      }
    }
  });
  add_slices(total, others.get(), slices, s.n * s.D);
}

void fp32_dweight(const Fp32Kernels& kernels, const HeadShape& s, const float* dlogits,
                  const float* hidden, bool accumulate, float* total) {
  if (s.n == 0 && !accumulate) std::fill_n(total, s.V * s.D, 0.0f);
  const Parts slabs(s.n, kDepth);
  const int64_t padded_columns = rounded(s.D, kFp32Columns);
  const Buffer<float> panels = aligned_buffer<float>(s.n * padded_columns);
  for (int64_t slab = 0; slab < slabs.count; ++slab) {
    const int64_t start = slabs.begin(slab), depth = slabs.begin(slab + 1) - start;
    for (int64_t column = 0; column < s.D; column += kFp32Columns)
      kernels.pack_panel(hidden + start * s.D + column, s.D, s.D - column, depth,
                         &panels[start * padded_columns + column * depth]);
  }
  torch::stable::parallel_for(0, divided(s.V, kWeightRows), 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> left = aligned_buffer<float>(left_numbers(kWeightRows, slabs.most));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kWeightRows, rows = std::min(kWeightRows, s.V - first);
      for (int64_t slab = 0; slab < slabs.count; ++slab) {
        const int64_t start = slabs.begin(slab), depth = slabs.begin(slab + 1) - start;
        if (depth == 0) continue;
        kernels.pack_left_transposed(dlogits + start * s.V + first, s.V, rows, depth, left.get());
        for (int64_t column = 0; column < s.D; column += kFp32Columns)
          multiply(kernels, left.get(), rows, &panels[start * padded_columns + column * depth],
                   depth,
                   {total + first * s.D + column, s.D, 0, s.D - column, 1.0f,
                    accumulate || slab > 0});
      }
    }
  });
}

}  // namespace flowrl
