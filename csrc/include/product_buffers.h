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

inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t rounded(int64_t size, int64_t step) { return divided(size, step) * step; }

// d(hidden) (rows, dim), a sum over the vocabulary, cut in tasks: a slice of the vocabulary for a
// group of rows. Each slice has its own sum, and their number depends on the vocabulary alone, so
// that results do not depend on the number of threads.
class HiddenSums {
 public:
  struct Task {
    int64_t first, rows;  // of hidden
    int64_t start, stop;  // of the vocabulary
    float* out;           // the slice's sum, from row `first` on
  };

  // Groups are multiples of `step` rows: enough for threads that the slices leave without work, and
  // of few enough rows to stay in the caches.
  HiddenSums(int64_t rows, int64_t dim, int64_t columns, int64_t step, float* total)
      : rows_(rows),
        dim_(dim),
        columns_(columns),
        slices_(std::bit_floor(std::clamp<uint64_t>(columns / 8192, 1, 8))),
        total_(total),
        others_(aligned_buffer<float>((slices_ - 1) * rows * dim)) {
    constexpr int64_t kMost = 384;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = std::max(divided(rows, kMost), divided(threads, slices_));
    group_rows_ = rounded(std::max<int64_t>(divided(rows, wanted), 1), step);
    if (columns == 0) std::fill_n(total, rows * dim, 0.0f);
  }

  int64_t group_rows() const { return group_rows_; }
  int64_t tasks() const { return slices_ * groups(); }

  Task task(int64_t index) const {
    const int64_t slice = index / groups(), first = index % groups() * group_rows_;
    float* sum = slice == 0 ? total_ : &others_[(slice - 1) * rows_ * dim_];
    return {first, std::min(group_rows_, rows_ - first), columns_ * slice / slices_,
            columns_ * (slice + 1) / slices_, sum + first * dim_};
  }

  // total += each of the slices but the first, which is in total already, in order.
  void finish() {
    const int64_t size = rows_ * dim_;
    torch::stable::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t slice = 0; slice + 1 < slices_; ++slice)
        for (int64_t i = begin; i < end; ++i) total_[i] += others_[slice * size + i];
    });
  }

 private:
  int64_t groups() const { return divided(rows_, group_rows_); }

  int64_t rows_, dim_, columns_, slices_, group_rows_;
  float* total_;
  Buffer<float> others_;
};

}  // namespace flowrl
