// The three products for float32 operands; head_products_cpu.cpp calls them for tensors.
#pragma once

#include "fp32_kernels.h"

namespace flowrl {

struct HeadShape {
  int64_t n, D, V;  // rows, width of hidden, columns of logits
};

// out (n, V) = scale * hidden (n, D) @ weight (V, D).T
void fp32_logits(const Fp32Kernels& kernels, const HeadShape& shape, const float* hidden,
                 const float* weight, float scale, float* out);

// total (n, D) = dlogits (n, V) @ weight (V, D)
void fp32_dhidden(const Fp32Kernels& kernels, const HeadShape& shape, const float* dlogits,
                  const float* weight, float* total);

// total (V, D) = [total +] dlogits (n, V).T @ hidden (n, D)
void fp32_dweight(const Fp32Kernels& kernels, const HeadShape& shape, const float* dlogits,
                  const float* hidden, bool accumulate, float* total);

}  // namespace flowrl
