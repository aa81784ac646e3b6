// Which instruction set the kernels use: the best that this processor has.

#include <array>

#if FLOWRL_BF16_PRODUCTS
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <torch/headeronly/util/Exception.h>

#include "fp32_kernels.h"
#include "levels.h"
#include "product_kernels.h"
#include "softmax_kernels.h"

namespace flowrl {

extern const SoftmaxKernels softmax_kernels_portable;
#if defined(__x86_64__)
extern const SoftmaxKernels softmax_kernels_avx2;
extern const SoftmaxKernels softmax_kernels_avx512;
extern const Fp32Kernels fp32_kernels_avx512;
#endif
#if FLOWRL_BF16_PRODUCTS
extern const ProductKernels product_kernels_avx512_bf16;
extern const ProductKernels product_kernels_amx;
#endif

namespace {

struct LevelKernels {
  const SoftmaxKernels* softmax = nullptr;  // null: this processor does not have the level
  const ProductKernels* products = nullptr;
  const Fp32Kernels* fp32 = nullptr;
};

#if FLOWRL_BF16_PRODUCTS
// Linux grants the tile registers to a process that asks.
bool amx_granted() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool has_tiles = d >> 24 & 1, has_bf16 = d >> 22 & 1;
  return has_tiles && has_bf16 &&
         syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}
#endif

// Whether the processor and the operating system have what CMakeLists.txt compiles each level for.
std::array<LevelKernels, kNumLevels> levels_here() {
  std::array<LevelKernels, kNumLevels> found;
  found[kPortable].softmax = &softmax_kernels_portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return found;
  found[kAvx2].softmax = &softmax_kernels_avx2;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq"))
    return found;
  found[kAvx512] = {&softmax_kernels_avx512, nullptr, &fp32_kernels_avx512};
#endif
#if FLOWRL_BF16_PRODUCTS
  if (!__builtin_cpu_supports("avx512bf16")) return found;
  found[kAvx512Bf16] = {&softmax_kernels_avx512, &product_kernels_avx512_bf16,
                        &fp32_kernels_avx512};
  if (amx_granted())
    found[kAmx] = {&softmax_kernels_avx512, &product_kernels_amx, &fp32_kernels_avx512};
#endif
  return found;
}

const std::array<LevelKernels, kNumLevels>& levels() {
  static const auto found = levels_here();
  return found;
}

const LevelKernels& kernels_of(int64_t level) {
  if (level == -1) level = best_level();
  STD_TORCH_CHECK(level >= 0 && level < kNumLevels && levels()[level].softmax,
                  "level must be -1 or one that this processor has (0 to ", highest_level(),
                  "), got ", level, "; use -1 for the best");
  return levels()[level];
}

}  // namespace

int64_t highest_level() {
  int64_t level = kNumLevels - 1;
  while (!levels()[level].softmax) --level;
  return level;
}

// On Intel's processors a vector of bfloat16 pairs is issued every other cycle: 70 GFLOP/s a core
// here, of a Xeon with AMX, where torch's float32 product reaches 125. There it is AMX or float32.
int64_t best_level() {
  static const int64_t best = [] {
    const int64_t level = highest_level();
#if defined(__x86_64__)
    if (level == kAvx512Bf16 && __builtin_cpu_is("intel")) return static_cast<int64_t>(kAvx512);
#endif
    return level;
  }();
  return best;
}

// torch multiplies float32 with MKL, which uses half the registers' width on AMD's processors: 77
// GFLOP/s a core of a Zen 4 here. On Intel's it is as fast as the processor.
bool has_products(bool bfloat16, int64_t level) {
  const LevelKernels& kernels = kernels_of(level);
  if (bfloat16) return kernels.products;
#if defined(__x86_64__)
  if (level == -1 && !__builtin_cpu_is("amd")) return false;
#endif
  return kernels.fp32;
}

const SoftmaxKernels& softmax_kernels(int64_t level) { return *kernels_of(level).softmax; }

const ProductKernels& product_kernels(int64_t level) {
  const ProductKernels* products = kernels_of(level).products;
  STD_TORCH_CHECK(products, "products of bfloat16 need level ", static_cast<int64_t>(kAvx512Bf16),
                  " or ", static_cast<int64_t>(kAmx), ", got ", level,
                  "; multiply in float32 with torch");
  return *products;
}

const Fp32Kernels& fp32_kernels(int64_t level) {
  const Fp32Kernels* products = kernels_of(level).fp32;
  STD_TORCH_CHECK(products, "products of float32 need level ", static_cast<int64_t>(kAvx512),
                  " or higher, got ", level, "; multiply with torch");
  return *products;
}

}  // namespace flowrl
