// The CUDA kernels as plain functions of device pointers: what the .cu files offer to
// operators_cuda.cpp, which knows torch. Each returns null, or what went wrong.
//
// Legend: n rows, V columns of this rank that are true vocabulary, D hidden, S tiles of the
// vocabulary, N sequences, T tokens.
#pragma once

#include <stdint.h>

namespace flowrl::cuda {

using Stream = void*;  // a cudaStream_t

// z = scale * hidden @ weight.T, reduced per row and tile of tile_columns columns.
struct HeadForward {
  const void* hidden;         // (n, D) bfloat16 or e4m3
  const void* weight;         // (V, D)
  const float* hidden_scale;  // (n,) e4m3 only
  const float* weight_scale;  // (V,) e4m3 only
  const int64_t* targets;     // (n,)
  void* out;                  // (n, V) bfloat16 E = exp(z - tile's maximum); null: not stored
  float* tile_max;            // (S, n)
  float* tile_sum;            // (S, n) sum exp(z - tile_max)
  float* tile_sum_z;          // (S, n) sum exp(z - tile_max) (z - tile_max)
  float* target_logit;        // (n,) written where this rank has the target
  int num_rows, num_columns, dim;
  int64_t hidden_stride, weight_stride, out_stride;
  int64_t vocab_start;
  float scale;
};

constexpr int kTileColumns = 192;       // of bfloat16 operands
constexpr int kTileColumnsE4m3 = 128;

const char* head_forward(const HeadForward& call, Stream stream);        // linear_logprobs.cu
const char* head_forward_e4m3(const HeadForward& call, Stream stream);   // linear_logprobs.cu
const char* head_forward_store(const HeadForward& call, Stream stream);  // policy_loss.cu

}  // namespace flowrl::cuda
