// Shared by the product kernels of AVX-512. Each instruction set that includes it has its own copy.
#pragma once

#include <immintrin.h>

#include "product_kernels.h"

namespace flowrl {
namespace {

inline __mmask16 mask_of(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

inline void emit_row(const Destination& to, int64_t row, __m512 low, __m512 high) {
  const __m512 scale = _mm512_set1_ps(to.scale);
  const __mmask16 first = mask_of(to.columns), second = mask_of(to.columns - 16);
  float* out = to.out ? to.out + row * to.stride : nullptr;
  if (to.accumulate) {
    low = _mm512_fmadd_ps(low, scale, _mm512_maskz_loadu_ps(first, out));
    high = _mm512_fmadd_ps(high, scale, _mm512_maskz_loadu_ps(second, out + 16));
  } else {
    low = _mm512_mul_ps(low, scale);
    high = _mm512_mul_ps(high, scale);
  }
#ifdef __AVX512BF16__
  if (to.rounded) {
    BFloat16Bits* rounded = to.rounded + row * to.stride;
    _mm256_mask_storeu_epi16(rounded, first, (__m256i)_mm512_cvtneps_pbh(low));
    _mm256_mask_storeu_epi16(rounded + 16, second, (__m256i)_mm512_cvtneps_pbh(high));
    return;
  }
#endif
  _mm512_mask_storeu_ps(out, first, low);
  _mm512_mask_storeu_ps(out + 16, second, high);
}

// 16 x 16 words of 32 bits, in place: words[i] lane j <-> words[j] lane i.
inline void transpose(__m512i words[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(words[2 * i], words[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(words[2 * i], words[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  // b[4 g + r] holds, for rows 4 g to 4 g + 3, columns r, 4 + r, 8 + r, 12 + r in its quarters.
  for (int r = 0; r < 4; ++r) {
    const __m512i p = _mm512_shuffle_i32x4(b[r], b[4 + r], 0x88);
    const __m512i q = _mm512_shuffle_i32x4(b[8 + r], b[12 + r], 0x88);
    const __m512i s = _mm512_shuffle_i32x4(b[r], b[4 + r], 0xdd);
    const __m512i t = _mm512_shuffle_i32x4(b[8 + r], b[12 + r], 0xdd);
    words[r] = _mm512_shuffle_i32x4(p, q, 0x88);
    words[8 + r] = _mm512_shuffle_i32x4(p, q, 0xdd);
    words[4 + r] = _mm512_shuffle_i32x4(s, t, 0x88);
    words[12 + r] = _mm512_shuffle_i32x4(s, t, 0xdd);
  }
}

}  // namespace
}  // namespace flowrl
