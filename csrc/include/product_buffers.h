// What both kinds of products share: aligned memory, and how d(hidden) is cut.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

namespace flowrl {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], FreeMemory>;

// Not initialised, aligned to 64 bytes.
template <typename T>
Buffer<T> aligned_buffer(int64_t numbers) {
  const size_t bytes = (std::max<int64_t>(numbers, 1) * sizeof(T) + 63) / 64 * 64;
  auto* memory = static_cast<T*>(std::aligned_alloc(64, bytes));
  STD_TORCH_CHECK(memory, "the native operators need ", bytes, " bytes, got none; free memory");
  return Buffer<T>(memory);
}

// d(hidden) is a sum over the vocabulary, in slices that run side by side. Their number depends on
// the vocabulary alone, so that results do not depend on the number of threads.
inline int64_t slices_of(int64_t columns) {
  return std::bit_floor(std::clamp<uint64_t>(columns / 8192, 1, 8));
}

inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t rounded(int64_t size, int64_t step) { return divided(size, step) * step; }

// d(hidden)'s rows in equal groups, multiples of `step`: enough for threads that its slices leave
// without work, and of few enough rows to stay in the caches.
inline int64_t group_rows_of(int64_t rows, int64_t slices, int64_t step) {
  constexpr int64_t kMost = 384;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t groups = std::max(divided(rows, kMost), divided(threads, slices));
  return rounded(std::max<int64_t>(divided(rows, groups), 1), step);
}

// total += each of the slices but the first, which is in total already, in order.
inline void add_slices(float* total, const float* others, int64_t slices, int64_t size) {
  torch::stable::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t slice = 0; slice + 1 < slices; ++slice)
      for (int64_t i = begin; i < end; ++i) total[i] += others[slice * size + i];
  });
}

}  // namespace flowrl
