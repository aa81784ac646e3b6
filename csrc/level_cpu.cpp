// Which instruction set the row kernels use: the best that this processor has.

#include <array>

#include <torch/headeronly/util/Exception.h>

#include "row_kernels.h"

namespace flowrl {

extern const RowKernels row_kernels_portable;
#if defined(__x86_64__)
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;
#endif

namespace {

// Whether the processor and the operating system have what CMakeLists.txt compiles each level for.
std::array<const RowKernels*, kNumLevels> levels_here() {
  std::array<const RowKernels*, kNumLevels> levels = {&row_kernels_portable, nullptr, nullptr};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    levels[kAvx2] = &row_kernels_avx2;
  if (levels[kAvx2] && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    levels[kAvx512] = &row_kernels_avx512;
#endif
  return levels;
}

const std::array<const RowKernels*, kNumLevels>& levels() {
  static const auto found = levels_here();
  return found;
}

}  // namespace

int64_t best_level() {
  int64_t level = kNumLevels - 1;
  while (!levels()[level]) --level;
  return level;
}

const RowKernels& row_kernels(int64_t level) {
  if (level == -1) level = best_level();
  STD_TORCH_CHECK(level >= 0 && level < kNumLevels && levels()[level],
                  "level must be -1 or one that this processor has (0 to ", best_level(),
                  "), got ", level, "; use -1 for the best");
  return *levels()[level];
}

}  // namespace flowrl
