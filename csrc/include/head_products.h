// What all products share. head_products_cpu.cpp calls those of float32 operands for tensors.
#pragma once

#include <cstdint>
#include <functional>

#include "chunk_statistics.h"
#include "fp32_kernels.h"

namespace flowrl {

struct HeadShape {
  int64_t n, D, V;  // rows, width of hidden, columns of logits
};

// Called once for the rows from first_row on of each tile of kTileColumns logits, from several
// threads.
using TileDone = std::function<void(int64_t index, int64_t first_row, Tile tile)>;

// scale * hidden (n, D) @ weight (V, D).T, to `out`; where that is null, only to `done`.
void fp32_logits(const Fp32Kernels& kernels, const HeadShape& shape, const float* hidden,
                 const float* weight, float scale, Columns out, const TileDone& done);

// total (n, D) = dlogits (n, V) @ weight (V, D)
void fp32_dhidden(const Fp32Kernels& kernels, const HeadShape& shape, Columns dlogits,
                  const float* weight, float* total);

// total (V, D) = [total +] dlogits (n, V).T @ hidden (n, D)
void fp32_dweight(const Fp32Kernels& kernels, const HeadShape& shape, Columns dlogits,
                  const float* hidden, bool accumulate, float* total);

}  // namespace flowrl
