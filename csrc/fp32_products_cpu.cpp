// The three products of the output layer for float32 operands, in blocks that stay in the caches.
//
// Each number of a result is summed in the same order for any number of threads, and in a row of
// logits or of d(hidden) for any other rows. Vectors run over the rows of logits and over D: the
// weight and dlogits are read where they are, row by row, for the products that have them on the
// left.

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "head_products.h"
#include "product_buffers.h"

namespace flowrl {
namespace {

constexpr int64_t kDepth = 512;        // of sums between two looks at the result, at most
constexpr int64_t kHiddenDepth = 256;  // of the vocabulary, at a time, in d(hidden)
constexpr int64_t kStripRows = 384;    // of hidden that a tile of the weight meets in a task

// Equal parts, and where part `index` begins.
struct Parts {
  int64_t size, count, most;
  Parts(int64_t size, int64_t limit)
      : size(size), count(std::max<int64_t>(divided(size, limit), 1)), most(divided(size, count)) {}
  int64_t begin(int64_t index) const { return size * index / count; }
};

// Right operands, all panels of a part of the depth after those of the part before.
struct Panels {
  Parts parts;
  int64_t width;  // of all panels
  Buffer<float> numbers;

  Panels(int64_t depth, int64_t columns)
      : parts(depth, kDepth),
        width(rounded(columns, kFp32Columns)),
        numbers(aligned_buffer<float>(depth * width)) {}

  // pack(column, start, depth, to) for each panel and part.
  template <typename Pack>
  void fill(const Pack& pack) const {
    constexpr int64_t kGrain = 32768;  // numbers a thread packs at least
    const int64_t size = std::max<int64_t>(parts.size * kFp32Columns, 1);
    const auto fill = [&](int64_t begin, int64_t end) {
      for (int64_t column = begin * kFp32Columns; column < end * kFp32Columns;
           column += kFp32Columns)
        for (int64_t part = 0; part < parts.count; ++part) {
          const int64_t start = parts.begin(part);
          pack(column, start, parts.begin(part + 1) - start, at(part, column));
        }
    };
    torch::stable::parallel_for(0, width / kFp32Columns, divided(kGrain, size), fill);
  }

  float* at(int64_t part, int64_t column) const {
    const int64_t depth = parts.begin(part + 1) - parts.begin(part);
    return &numbers[parts.begin(part) * width + column * depth];
  }
};

// Rows that are read next, on their way to the caches: part `index` of `count`.
void prefetch_rows(const float* from, int64_t stride, int64_t rows, int64_t depth, int64_t index,
                   int64_t count) {
  for (int64_t row = rows * index / count; row < rows * (index + 1) / count; ++row)
    for (int64_t k = 0; k < depth; k += 16) __builtin_prefetch(from + row * stride + k, 0, 2);
}

// `rows` rows of left (stride apart; `existing` there are), times the panels from `first` on, as
// many columns as the result has.
void multiply_rows(const Fp32Kernels& kernels, const float* left, int64_t stride, int64_t rows,
                   int64_t existing, const Panels& panels, int64_t first, float* tail,
                   Destination to) {
  const Parts& parts = panels.parts;
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t start = parts.begin(part), depth = parts.begin(part + 1) - start;
    const bool last = part + 1 == parts.count;
    const float* next = left + (last ? rows * stride : parts.begin(part + 1));
    const int64_t next_rows = last ? std::clamp<int64_t>(existing - rows, 0, rows) : rows;
    const int64_t whole = rows / kFp32Rows * kFp32Rows, height = rows - whole;
    if (height > 0) {  // the last rows: those past the end are not ours to read
      std::fill_n(tail, kFp32Rows * depth, 0.0f);
      for (int64_t i = 0; i < height; ++i)
        std::copy_n(left + (whole + i) * stride + start, depth, tail + i * depth);
    }
    for (int64_t column = 0; column < to.columns; column += kFp32Columns) {
      prefetch_rows(next, stride, next_rows, depth, column / kFp32Columns,
                    divided(to.columns, kFp32Columns));
      const float* panel = panels.at(part, first + column);
      for (int64_t row = 0; row < rows; row += kFp32Rows) {
        const Destination block{to.out + row * to.stride + column, to.stride,
                                std::min(kFp32Rows, rows - row), to.columns - column, to.scale,
                                to.accumulate || part > 0};
        if (row < whole)
          kernels.block(left + row * stride + start, stride, 1, panel, depth, block);
        else
          kernels.block(tail, depth, 1, panel, depth, block);
      }
    }
  }
}

}  // namespace

void fp32_logits(const Fp32Kernels& kernels, const HeadShape& s, const float* hidden,
                 const float* weight, float scale, Columns out, const TileDone& done) {
  const Panels panels(s.D, s.n);
  panels.fill([&](int64_t row, int64_t start, int64_t depth, float* to) {
    kernels.pack_panel_transposed(hidden + row * s.D + start, s.D, s.n - row, depth, to);
  });
  const Parts strips(divided(s.n, kFp32Columns), kStripRows / kFp32Columns);
  const auto multiply = [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch =
        aligned_buffer<float>(out.z ? 0 : kTileColumns * out.stride);
    const Buffer<float> last = aligned_buffer<float>(kFp32Rows * panels.parts.most);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task / strips.count, strip = task % strips.count;
      const int64_t first = tile * kTileColumns, height = std::min(kTileColumns, s.V - first);
      const int64_t row = strips.begin(strip) * kFp32Columns;
      const int64_t rows = std::min(strips.begin(strip + 1) * kFp32Columns, s.n) - row;
      float* z = (out.z ? out.z + first * out.stride : scratch.get()) + row;
      multiply_rows(kernels, weight + first * s.D, s.D, height, s.V - first, panels, row,
                    last.get(), {z, out.stride, 0, rows, scale, false});
      done(tile, row, {z, out.stride, height, rows});
    }
  };
  torch::stable::parallel_for(0, tiles_of(s.V) * strips.count, 1, multiply);
}

void fp32_dweight(const Fp32Kernels& kernels, const HeadShape& s, Columns dlogits,
                  const float* hidden, bool accumulate, float* total) {
  const Panels panels(s.n, s.D);
  panels.fill([&](int64_t column, int64_t start, int64_t depth, float* to) {
    kernels.pack_panel(hidden + start * s.D + column, s.D, s.D - column, depth, to);
  });
  torch::stable::parallel_for(0, tiles_of(s.V), 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> last = aligned_buffer<float>(kFp32Rows * panels.parts.most);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileColumns, height = std::min(kTileColumns, s.V - first);
      multiply_rows(kernels, dlogits.z + first * dlogits.stride, dlogits.stride, height,
                    s.V - first, panels, 0, last.get(),
                    {total + first * s.D, s.D, 0, s.D, 1.0f, accumulate});
    }
  });
}

void fp32_dhidden(const Fp32Kernels& kernels, const HeadShape& s, Columns dlogits,
                  const float* weight, float* total) {
  HiddenSums sums(s.n, s.D, s.V, kFp32Rows, total);
  torch::stable::parallel_for(0, sums.tasks(), 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> left =
        aligned_buffer<float>(sums.group_rows() / kFp32Rows * left_stride(kHiddenDepth));
    const Buffer<float> panel = aligned_buffer<float>(kHiddenDepth * kFp32Columns);
    for (int64_t index = begin; index < end; ++index) {
      const auto [first, rows, start, stop, out] = sums.task(index);
      for (int64_t k = start; k < stop; k += kHiddenDepth) {
        const int64_t depth = std::min(kHiddenDepth, stop - k);
        kernels.pack_left(dlogits.z + k * dlogits.stride + first, dlogits.stride, rows, depth,
                          left.get());
        for (int64_t column = 0; column < s.D; column += kFp32Columns) {
          kernels.pack_panel(weight + k * s.D + column, s.D, s.D - column, depth, panel.get());
          for (int64_t row = 0; row < rows; row += kFp32Rows)
            kernels.block(&left[row / kFp32Rows * left_stride(depth)], 1, kFp32Rows, panel.get(),
                          depth,
                          {out + row * s.D + column, s.D, std::min(kFp32Rows, rows - row),
                           s.D - column, 1.0f, k > start});
        }
      }
    }
  });
  sums.finish();
}

}  // namespace flowrl
