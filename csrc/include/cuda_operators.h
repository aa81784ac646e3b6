// The CUDA kernels as plain functions of device pointers: what the .cu files offer to
// operators_cuda.cpp, which knows torch. Each returns null, or what went wrong.
//
// Legend: n rows, V columns of this rank that are true vocabulary, D hidden, S tiles of the
// vocabulary, N sequences, T tokens.
#pragma once

#include <stdint.h>

#include "balance_arithmetic.h"

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

// Tiles of each row into one, in the order of the tiles.
struct HeadMerge {
  const float* tile_max;    // (S, n)
  const float* tile_sum;    // (S, n)
  const float* tile_sum_z;  // (S, n)
  float* row_max;           // (n,)
  float* sum_exp;           // (n,)
  float* sum_exp_z;         // (n,)
  int num_rows, num_tiles;
};

// out (n, V): E of the forward pass becomes d(logits).
struct HeadGradient {
  void* out;              // (n, V) bfloat16
  const float* tile_max;  // (S, n)
  const float* row_max;   // (n,)
  const float* log_sum;   // (n,)
  const float* factor;    // (n,) dlogits = p * factor - p log p * slope, but at the target
  const float* slope;     // (n,) null: 0
  const float* at_target;  // (n,)
  const int64_t* column;  // (n,) of the target; negative where another rank has it
  int num_rows, num_columns;
  int64_t out_stride;
};

// Rows of bfloat16 to e4m3 with their own scales: x = q * scale.
struct QuantizeRows {
  const void* x;  // (n, D) bfloat16
  void* q;        // (n, D) e4m3
  float* scale;   // (n,)
  int num_rows, dim;
  int64_t x_stride;
};

// linear_logprobs.cu
const char* head_forward(const HeadForward& call, Stream stream);
const char* head_forward_e4m3(const HeadForward& call, Stream stream);
const char* head_merge(const HeadMerge& call, Stream stream);
const char* quantize_rows(const QuantizeRows& call, Stream stream);

// policy_loss.cu
const char* head_forward_store(const HeadForward& call, Stream stream);
const char* head_dlogits(const HeadGradient& call, Stream stream);

// trajectory_balance.cu
const char* trajectory_balance(const BalanceInputs& in, const BalanceOutputs& out, float* loss,
                               int64_t num_sequences, Stream stream);

}  // namespace flowrl::cuda
