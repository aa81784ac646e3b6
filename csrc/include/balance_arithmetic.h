// Trajectory balance of one sequence, as the CPU and the CUDA operator both compute it. Sums over
// tokens are double: log w adds up thousands of small differences.
#pragma once

#include <math.h>
#include <stdint.h>

#include "host_device.h"

namespace flowrl {

struct BalanceOptions {
  double beta, scale;
  bool has_old;  // false: on-policy, log w = 0
  bool has_low, has_high;
  double low, high;  // bounds on log w
  bool length_norm;
};

struct BalanceSums {  // over the tokens that count; without initialisers, for shared memory
  int64_t count;
  double current, ref, log_weight;

  FLOWRL_HOST_DEVICE void add(const BalanceSums& other) {
    count += other.count;
    current += other.current;
    ref += other.ref;
    log_weight += other.log_weight;
  }
};

struct BalanceInputs {
  const float* current;    // (T,)
  const float* old;        // (T,) null: on-policy
  const float* ref;        // (T,)
  const float* log_z;      // (N,)
  const float* rewards;    // (N,)
  const int64_t* offsets;  // (N + 1,)
  const bool* mask;        // (T,) null: all tokens count
  BalanceOptions options;

  FLOWRL_HOST_DEVICE bool counts(int64_t token) const { return !mask || mask[token]; }

  // What stands at a token that does not count is not read.
  FLOWRL_HOST_DEVICE void add_token(int64_t token, BalanceSums& sums) const {
    if (!counts(token)) return;
    ++sums.count;
    sums.current += current[token];
    sums.ref += ref[token];
    if (old) sums.log_weight += static_cast<double>(current[token]) - old[token];
  }
};

struct BalanceSequence {
  double residual, weight, mean_current, mean_ref;
  double dlog_z;    // of the loss; per_token is that of each log-prob that counts
  double per_token;
  double term;  // of the loss, before `scale`
};

FLOWRL_HOST_DEVICE BalanceSequence balance_sequence(const BalanceSums& sums, double log_z,
                                                    double reward, const BalanceOptions& options) {
  const double count = sums.count ? static_cast<double>(sums.count) : 1.0;
  const double divisor = options.length_norm ? count : 1.0;
  BalanceSequence s{0, 1, sums.current / count, sums.ref / count, 0, 0, 0};
  if (sums.count == 0) return s;
  s.residual = log_z + sums.current / divisor - options.beta * reward - sums.ref / divisor;
  if (options.has_old) {
    double bounded = sums.log_weight;  // comparisons that keep NaN
    if (options.has_low && bounded < options.low) bounded = options.low;
    if (options.has_high && bounded > options.high) bounded = options.high;
    s.weight = exp(bounded);
  }
  s.dlog_z = 2 * options.scale * s.weight * s.residual;
  s.per_token = s.dlog_z / divisor;
  s.term = s.weight * s.residual * s.residual;
  return s;
}

// Where the results of a batch go.
struct BalanceOutputs {
  float *residual, *log_weight, *weight, *mean_current, *mean_ref, *dlog_z;  // (N,)
  int64_t* num_tokens;                                                       // (N,)
  float* dlogprobs;                                                          // (T,)
  double* terms;                                                             // (N,) scratch

  FLOWRL_HOST_DEVICE void write(int64_t n, const BalanceSums& sums,
                                const BalanceSequence& s) const {
    residual[n] = static_cast<float>(s.residual);
    log_weight[n] = static_cast<float>(sums.log_weight);
    weight[n] = static_cast<float>(s.weight);
    mean_current[n] = static_cast<float>(s.mean_current);
    mean_ref[n] = static_cast<float>(s.mean_ref);
    dlog_z[n] = static_cast<float>(s.dlog_z);
    num_tokens[n] = sums.count;
    terms[n] = s.term;
  }
};

}  // namespace flowrl
