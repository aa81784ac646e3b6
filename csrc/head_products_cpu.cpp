// The three products of the output layer, summed in float32: those of bfloat16 operands, and where
// those of float32 operands go (fp32_products_cpu.cpp).
//
// Each runs over the vocabulary in tiles. A tile of the weight is read where it is for the logits,
// if it is as the kernels want it, and packed once for each group of rows of d(hidden). Which sums
// are added to which does not depend on the number of threads.

#include <algorithm>
#include <cstring>

#include <torch/csrc/stable/ops.h>

#include "checked.h"
#include "head_products.h"
#include "operators.h"
#include "product_buffers.h"
#include "product_kernels.h"

namespace flowrl {
namespace {

constexpr int64_t kDepth = 512;  // of the vocabulary, at a time, in d(hidden)

using Packed = Buffer<BFloat16Bits>;

Packed packed_buffer(int64_t rows, int64_t columns) {
  return aligned_buffer<BFloat16Bits>(padded(rows) * padded(columns));
}

// The state of the tile registers while this lives.
class Entered {
 public:
  explicit Entered(const ProductKernels& kernels) : kernels_(kernels) { kernels_.enter(); }
  ~Entered() { kernels_.leave(); }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  const ProductKernels& kernels_;
};

template <typename T>
T* part_of(T* matrix, int64_t row, int64_t stride, int64_t column) {
  return matrix ? matrix + row * stride + column : nullptr;
}

// All results of one left operand of `rows` and the panels of `columns`, both `depth` deep.
void multiply(const ProductKernels& kernels, const BFloat16Bits* left, int64_t rows,
              const BFloat16Bits* panels, int64_t columns, int64_t depth, Destination to) {
  for (int64_t column = 0; column < columns; column += kBlockRows)
    for (int64_t row = 0; row < rows; row += kBlockRows)
      kernels.block(left + row * depth, panels + column * depth, depth,
                    {part_of(to.out, row, to.stride, column), to.stride,
                     std::min(kBlockRows, rows - row), std::min(kBlockRows, columns - column),
                     to.scale, to.accumulate, part_of(to.rounded, row, to.stride, column)});
}

bool is_float32(const Tensor& operand) { return operand.scalar_type() == ScalarType::Float; }

// (rows, depth) as a left operand: as it is, or padded in `to`.
const BFloat16Bits* left_operand(const BFloat16Bits* from, int64_t rows, int64_t depth,
                                 BFloat16Bits* to) {
  if (rows == padded(rows) && depth == padded(depth)) return from;
  std::memset(to, 0, padded(rows) * padded(depth) * sizeof(BFloat16Bits));
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(to + row * padded(depth), from + row * depth, depth * sizeof(BFloat16Bits));
  return to;
}

void bf16_logits(const ProductKernels& kernels, const HeadShape& s, const BFloat16Bits* hidden,
                 const BFloat16Bits* weight, float scale, Columns out, const TileDone& done) {
  const Packed panels = packed_buffer(s.D, s.n);
  kernels.pack_panels_transposed(hidden, s.D, s.n, s.D, panels.get());
  torch::stable::parallel_for(0, tiles_of(s.V), 1, [&](int64_t begin, int64_t end) {
    const Entered entered(kernels);
    const Packed left = packed_buffer(kTileColumns, s.D);
    const Buffer<float> scratch = aligned_buffer<float>(out.z ? 0 : kTileColumns * out.stride);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileColumns, height = std::min(kTileColumns, s.V - first);
      float* z = out.z ? out.z + first * out.stride : scratch.get();
      multiply(kernels, left_operand(weight + first * s.D, height, s.D, left.get()), height,
               panels.get(), s.n, padded(s.D), {z, out.stride, 0, 0, scale, false});
      done(tile, 0, {z, out.stride, height, s.n});
    }
  });
}

void bf16_dhidden(const ProductKernels& kernels, const HeadShape& s, Columns dlogits,
                  const BFloat16Bits* weight, float* total) {
  HiddenSums sums(s.n, s.D, s.V, kBlockRows, total);
  torch::stable::parallel_for(0, sums.tasks(), 1, [&](int64_t begin, int64_t end) {
    const Entered entered(kernels);
    const Packed left = packed_buffer(sums.group_rows(), kDepth);
    const Packed panels = packed_buffer(kDepth, kBlockRows);
    for (int64_t index = begin; index < end; ++index) {
      const auto [first, rows, start, stop, out] = sums.task(index);
      for (int64_t k = start; k < stop; k += kDepth) {
        const int64_t depth = std::min(kDepth, stop - k);
        kernels.pack_left_transposed(dlogits.z + k * dlogits.stride + first, dlogits.stride, depth,
                                     rows, left.get());
        for (int64_t column = 0; column < s.D; column += kBlockRows) {
          const int64_t width = std::min(kBlockRows, s.D - column);
          kernels.pack_panels(weight + k * s.D + column, s.D, depth, width, panels.get());
          multiply(kernels, left.get(), rows, panels.get(), width, padded(depth),
                   {out + column, s.D, 0, 0, 1.0f, k > start});
        }
      }
    }
  });
  sums.finish();
}

void bf16_dweight(const ProductKernels& kernels, const HeadShape& s, Columns dlogits,
                  const BFloat16Bits* hidden, bool accumulate, float* total,
                  BFloat16Bits* rounded) {
  const Packed panels = packed_buffer(s.n, s.D);
  kernels.pack_panels(hidden, s.D, s.n, s.D, panels.get());
  torch::stable::parallel_for(0, tiles_of(s.V), 1, [&](int64_t begin, int64_t end) {
    const Entered entered(kernels);
    const Packed left = packed_buffer(kTileColumns, s.n);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileColumns, height = std::min(kTileColumns, s.V - first);
      kernels.pack_left(dlogits.z + first * dlogits.stride, dlogits.stride, height, s.n,
                        left.get());
      multiply(kernels, left.get(), height, panels.get(), s.D, padded(s.n),
               {part_of(total, first, s.D, 0), s.D, 0, 0, 1.0f, accumulate,
                part_of(rounded, first, s.D, 0)});
    }
  });
}

}  // namespace

// Logits hidden (n, D) @ weight (V, D).T / temperature, in `out` (V, stride) if it is given, and
// their statistics.
std::tuple<Tensor, Tensor, Tensor, Tensor> head_forward(Tensor hidden, Tensor weight,
                                                        Tensor targets, int64_t vocab_start,
                                                        double temperature, bool entropy,
                                                        OptionalTensor out, int64_t level) {
  const HeadShape s{hidden.size(0), hidden.size(1), weight.size(0)};
  const Columns z =
      out ? checked_columns(*out, s.V, s.n, "out") : Columns{nullptr, padded_rows(s.n) | kRowStep};
  STD_TORCH_CHECK(targets.numel() == s.n, "targets must have one element for each of ", s.n,
                  " rows of hidden, got ", targets.numel());
  ChunkStatistics statistics(softmax_kernels(level), targets, vocab_start, s.V, entropy);
  const auto done = [&](int64_t index, int64_t first_row, Tile tile) {
    statistics.add(index, first_row, tile);
  };
  const float scale = static_cast<float>(1 / temperature);
  if (is_float32(weight))
    fp32_logits(fp32_kernels(level), s, checked<float>(hidden, s.n * s.D, "hidden"),
                checked<float>(weight, s.V * s.D, "weight"), scale, z, done);
  else
    bf16_logits(product_kernels(level), s, checked<BFloat16Bits>(hidden, s.n * s.D, "hidden"),
                checked<BFloat16Bits>(weight, s.V * s.D, "weight"), scale, z, done);
  return statistics.merged(hidden);
}

// dlogits (V, stride) of `rows` rows, weight (V, D) -> (rows, D). The vocabulary is cut in slices
// whose number depends on V alone; each has its own sum, and the sums are added in order.
Tensor head_dhidden(Tensor dlogits, Tensor weight, int64_t rows, int64_t level) {
  const HeadShape s{rows, weight.size(1), weight.size(0)};
  const Columns dz = checked_columns(dlogits, s.V, s.n, "dlogits");
  const Tensor result = torch::stable::new_empty(dlogits, {s.n, s.D});
  float* total = checked<float>(result, s.n * s.D, "result");
  if (is_float32(weight))
    fp32_dhidden(fp32_kernels(level), s, dz, checked<float>(weight, s.V * s.D, "weight"), total);
  else
    bf16_dhidden(product_kernels(level), s, dz,
                 checked<BFloat16Bits>(weight, s.V * s.D, "weight"), total);
  return result;
}

// total (V, D) = [total +] dlogits (V, stride) @ hidden (n, D). A total of bfloat16, as the operands,
// is a sum rounded once, and cannot be added to.
void head_dweight_(Tensor total, Tensor dlogits, Tensor hidden, bool accumulate, int64_t level) {
  const HeadShape s{hidden.size(0), hidden.size(1), total.size(0)};
  const Columns dz = checked_columns(dlogits, s.V, s.n, "dlogits");
  if (is_float32(hidden)) {
    fp32_dweight(fp32_kernels(level), s, dz, checked<float>(hidden, s.n * s.D, "hidden"),
                 accumulate, checked<float>(total, s.V * s.D, "total"));
    return;
  }
  const bool rounded = !accumulate && !is_float32(total);
  bf16_dweight(product_kernels(level), s, dz, checked<BFloat16Bits>(hidden, s.n * s.D, "hidden"),
               accumulate, rounded ? nullptr : checked<float>(total, s.V * s.D, "total"),
               rounded ? checked<BFloat16Bits>(total, s.V * s.D, "total") : nullptr);
}

}  // namespace flowrl
