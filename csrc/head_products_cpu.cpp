// The three products of the output layer, summed in float32: those of bfloat16 operands, and where
// those of float32 operands go (fp32_products_cpu.cpp).
//
// Each runs over the vocabulary in tiles that are packed once, used for all rows, and forgotten.
// Which sums are added to which does not depend on the number of threads.

#include <algorithm>
#include <cstring>

#include <torch/csrc/stable/ops.h>

#include "checked.h"
#include "fp32_products.h"
#include "operators.h"
#include "product_buffers.h"
#include "product_kernels.h"

namespace flowrl {
namespace {

constexpr int64_t kLogitColumns = 128;   // a tile of the weight: 230 KB at D = 896
// Rows of d(weight) at a time: eight cache lines of a row of dlogits, whose rows are far apart.
constexpr int64_t kWeightRows = 128;
constexpr int64_t kDepth = 256;          // of the vocabulary, at a time, in d(hidden)
constexpr int64_t kRowGroup = 256;       // rows of d(hidden) that share a packed tile

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

// All results of one packed left operand of `rows` and the panels of `columns`, both `depth` deep.
void multiply(const ProductKernels& kernels, const BFloat16Bits* left, int64_t rows,
              const BFloat16Bits* panels, int64_t columns, int64_t depth, Destination to) {
  for (int64_t row = 0; row < rows; row += kBlockRows)
    for (int64_t column = 0; column < columns; column += kBlockRows)
      kernels.block(left + row * depth, depth, panels + column * depth, depth,
                    {to.out + row * to.stride + column, to.stride, std::min(kBlockRows, rows - row),
                     std::min(kBlockRows, columns - column), to.scale, to.accumulate});
}

bool is_float32(const Tensor& operand) { return operand.scalar_type() == ScalarType::Float; }

Packed left_copy(const BFloat16Bits* from, int64_t rows, int64_t columns) {
  Packed to = packed_buffer(rows, columns);
  const int64_t depth = padded(columns);
  std::memset(to.get(), 0, padded(rows) * depth * sizeof(BFloat16Bits));
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(&to[row * depth], from + row * columns, columns * sizeof(BFloat16Bits));
  return to;
}

}  // namespace

// out (n, V) = scale * hidden (n, D) @ weight (V, D).T
void head_logits_(Tensor out, Tensor hidden, Tensor weight, double scale, int64_t level) {
  const int64_t n = hidden.size(0), D = hidden.size(1), V = weight.size(0);
  float* z = checked<float>(out, n * V, "out");
  if (is_float32(weight)) {
    fp32_logits(fp32_kernels(level), {n, D, V}, checked<float>(hidden, n * D, "hidden"),
                checked<float>(weight, V * D, "weight"), static_cast<float>(scale), z);
    return;
  }
  const ProductKernels& kernels = product_kernels(level);
  const BFloat16Bits* w = checked<BFloat16Bits>(weight, V * D, "weight");
  const Packed left = left_copy(checked<BFloat16Bits>(hidden, n * D, "hidden"), n, D);
  const int64_t tiles = (V + kLogitColumns - 1) / kLogitColumns;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const Entered entered(kernels);
    const Packed panels = packed_buffer(kLogitColumns, D);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kLogitColumns, width = std::min(kLogitColumns, V - first);
      kernels.pack_panels_transposed(w + first * D, D, width, D, panels.get());
      multiply(kernels, left.get(), n, panels.get(), width, padded(D),
               {z + first, V, 0, 0, static_cast<float>(scale), false});
    }
  });
}

// dlogits (n, V) @ weight (V, D) -> (n, D). The vocabulary is cut in slices whose number depends on
// V alone; each has its own sum, and the sums are added in order.
Tensor head_dhidden(Tensor dlogits, Tensor weight, int64_t level) {
  const int64_t n = dlogits.size(0), V = dlogits.size(1), D = weight.size(1);
  const float* dz = checked<float>(dlogits, n * V, "dlogits");
  const Tensor result = torch::stable::new_empty(dlogits, {n, D});
  float* total = checked<float>(result, n * D, "result");
  if (is_float32(weight)) {
    fp32_dhidden(fp32_kernels(level), {n, D, V}, dz, checked<float>(weight, V * D, "weight"),
                 total);
    return result;
  }
  const ProductKernels& kernels = product_kernels(level);
  const BFloat16Bits* w = checked<BFloat16Bits>(weight, V * D, "weight");
  if (V == 0) std::fill_n(total, n * D, 0.0f);
  const int64_t slices = slices_of(V);
  const Tensor others = torch::stable::new_empty(dlogits, {slices - 1, n, D});
  float* other = checked<float>(others, (slices - 1) * n * D, "others");
  const int64_t groups = (n + kRowGroup - 1) / kRowGroup;

  torch::stable::parallel_for(0, slices * groups, 1, [&](int64_t begin, int64_t end) {
    const Entered entered(kernels);
    const Packed left = packed_buffer(kRowGroup, kDepth), panels = packed_buffer(kDepth, D);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / groups, row = task % groups * kRowGroup;
      const int64_t start = V * slice / slices, stop = V * (slice + 1) / slices;
      const int64_t rows = std::min(kRowGroup, n - row);
      float* out = (slice == 0 ? total : other + (slice - 1) * n * D) + row * D;
      for (int64_t k = start; k < stop; k += kDepth) {
        const int64_t depth = std::min(kDepth, stop - k);
        kernels.pack_left(dz + row * V + k, V, rows, depth, left.get());
        kernels.pack_panels(w + k * D, D, depth, D, panels.get());
        multiply(kernels, left.get(), rows, panels.get(), D, padded(depth),
                 {out, D, 0, 0, 1.0f, k > start});
      }
    }
  });
  add_slices(total, other, slices, n * D);
  return result;
}

// total (V, D) = [total +] dlogits (n, V).T @ hidden (n, D)
void head_dweight_(Tensor total, Tensor dlogits, Tensor hidden, bool accumulate, int64_t level) {
  const int64_t n = dlogits.size(0), V = dlogits.size(1), D = hidden.size(1);
  float* sums = checked<float>(total, V * D, "total");
  const float* dz = checked<float>(dlogits, n * V, "dlogits");
  if (is_float32(hidden)) {
    fp32_dweight(fp32_kernels(level), {n, D, V}, dz, checked<float>(hidden, n * D, "hidden"),
                 accumulate, sums);
    return;
  }
  const ProductKernels& kernels = product_kernels(level);
  const BFloat16Bits* x = checked<BFloat16Bits>(hidden, n * D, "hidden");
  const Packed panels = packed_buffer(n, D);
  kernels.pack_panels(x, D, n, D, panels.get());
  const int64_t tiles = (V + kWeightRows - 1) / kWeightRows;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const Entered entered(kernels);
    const Packed left = packed_buffer(kWeightRows, n);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kWeightRows, rows = std::min(kWeightRows, V - first);
      kernels.pack_left_transposed(dz + first, V, n, rows, left.get());
      multiply(kernels, left.get(), rows, panels.get(), D, padded(n),
               {sums + first * D, D, 0, 0, 1.0f, accumulate});
    }
  });
}

}  // namespace flowrl
