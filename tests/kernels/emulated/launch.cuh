// Kernels on the processor: a block's threads are threads, blocks run one after the other. In the
// place of csrc/launch.cuh (test_emulated_kernels.py).
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include <vector_types.h>

#include "cuda_operators.h"

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

namespace flowrl::cuda {

using std::min;

inline thread_local uint3 threadIdx, blockIdx;
inline dim3 gridDim;
inline thread_local int linear_thread;

struct Warp {
  std::barrier<> step{32};
  unsigned words[32];
};
inline std::unique_ptr<std::barrier<>> of_block;
inline std::vector<std::unique_ptr<Warp>> warps;

inline void __syncthreads() { of_block->arrive_and_wait(); }

template <class Word>
Word __shfl_xor_sync(unsigned, Word word, int mask) {
  static_assert(sizeof(Word) == 4);
  Warp& warp = *warps[linear_thread / 32];
  const int lane = linear_thread % 32;
  warp.words[lane] = __builtin_bit_cast(unsigned, word);
  warp.step.arrive_and_wait();
  const Word other = __builtin_bit_cast(Word, warp.words[lane ^ mask]);
  warp.step.arrive_and_wait();
  return other;
}

template <class Kernel, class... Arguments>
const char* launch(Kernel kernel, dim3 grid, dim3 block, Stream, Arguments... arguments) {
  const int size = block.x * block.y;
  gridDim = grid;
  of_block = std::make_unique<std::barrier<>>(size);
  warps.clear();
  for (int i = 0; i < size; i += 32) warps.push_back(std::make_unique<Warp>());
  std::barrier<> all(size);
  std::vector<std::thread> threads;
  for (int i = 0; i < size; ++i)
    threads.emplace_back([&, i] {
      linear_thread = i;
      threadIdx = {i % block.x, i / block.x, 0};
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, 0};
          kernel(arguments...);
          all.arrive_and_wait();
        }
    });
  for (auto& thread : threads) thread.join();
  return nullptr;
}

}  // namespace flowrl::cuda
