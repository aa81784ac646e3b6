// What the CUDA kernels of the output layer compute per logit, per row of a tile and per row.
// tests/kernels/test_device_arithmetic.py runs these functions on the processor.
#pragma once

#include <math.h>

#include "host_device.h"

namespace flowrl {

constexpr float kLog2E = 1.4426950408889634f;
// The logit of a column past the last: exp gives 0, and 0 * (kNoLogit - m) too.
constexpr float kNoLogit = -1e38f;

// 2^x, to 2 ulp; 0 from -126 down on the GPU.
FLOWRL_HOST_DEVICE float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// A row of a tile, or of several: its maximum m, sum exp(z - m), sum exp(z - m) (z - m).
struct Partial {
  float max;
  float sum;
  float sum_z;
};

// Adds one logit to the sums of a row whose maximum is known. Returns E = exp(z - max), which is
// exactly 1 at the maximum: sums are >= 1 and no log-prob is positive.
FLOWRL_HOST_DEVICE float add_logit(float z, Partial& row) {
  const float below = z - row.max;
  const float e = exp2_fast(below * kLog2E);
  row.sum += e;
  row.sum_z += e * below;
  return e;
}

// Adds a tile's sums to those of a row whose maximum over all tiles is known.
FLOWRL_HOST_DEVICE void add_tile(const Partial& tile, Partial& row) {
  const float shift = tile.max - row.max;
  const float factor = exp2_fast(shift * kLog2E);
  row.sum += factor * tile.sum;
  if (factor > 0) row.sum_z += factor * (tile.sum_z + tile.sum * shift);
}

// Where a NaN is among a and b, it is the result: a maximum that loses none.
FLOWRL_HOST_DEVICE float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

// What turns the E of one row of a tile into d(logits).
struct TileGradient {
  float log_p_of_max;  // log p of the tile's largest logit: tile max - row max - log sum
  float p_of_max;      // its exponential: p = E * p_of_max
  float factor;        // dlogits = p * factor - p log p * slope
  float slope;
};

FLOWRL_HOST_DEVICE TileGradient tile_gradient(float tile_max, float row_max, float log_sum,
                                              float factor, float slope) {
  const float log_p_of_max = (tile_max - row_max) - log_sum;
  return {log_p_of_max, exp2_fast(log_p_of_max * kLog2E), factor, slope};
}

// d(logit) of a column that is not the target; kEntropy: slope counts.
template <bool kEntropy>
FLOWRL_HOST_DEVICE float dlogit(float e, const TileGradient& tile) {
  const float p = e * tile.p_of_max;
  float factor = tile.factor;
  if (kEntropy && p > 0) factor -= (logf(e) + tile.log_p_of_max) * tile.slope;
  return p * factor;
}

// The scale of a row of e4m3 (x = q * scale) with the given largest |x|; zeros stay zeros.
constexpr float kLargestE4m3 = 448.0f;
FLOWRL_HOST_DEVICE float e4m3_scale(float largest) {
  return (largest > 1e-30f ? largest : 1e-30f) / kLargestE4m3;
}

// Each of the four lanes of a quad holds a word of blocks 0..3; afterwards lane q holds the words
// of block q, in the order of the lanes. exchange(word, mask) gives the word of lane ^ mask.
template <class Exchange>
FLOWRL_HOST_DEVICE void transpose_quad(unsigned (&word)[4], int lane, Exchange exchange) {
  const auto swap = [&](unsigned& low, unsigned& high, int mask) {
    const bool upper = lane & mask;  // keeps high, and gives low away
    const unsigned other = exchange(upper ? low : high, mask);
    low = upper ? other : low;
    high = upper ? high : other;
  };
  swap(word[0], word[1], 1);
  swap(word[2], word[3], 1);
  swap(word[0], word[2], 2);
  swap(word[1], word[3], 2);
}

}  // namespace flowrl
