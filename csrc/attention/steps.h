// Estimates behind QueryPlan::steps and the context kernels' steps (kernels.h). They take all
// sequences for as long as the longest.
#pragma once

#include <algorithm>

#include "common/device.h"
#include "star_attention/attention.h"

namespace star_attention {

// Of the sm_80 tiles: 128 rows, two blocks a multiprocessor, take so much longer than 256 in one.
constexpr double kSmallTileTimeSm80 = 1.2;

// A tile of 256 rows: Q, and two stages of 64 tokens of K and V.
inline bool large_tile_fits_sm80(int head_dim) {
  return (256 + 4 * 64) * 2 * head_dim <= current_device().smem_per_block;
}

inline double num_longest_sequences(const PagedAttentionParams& p) {
  const int longest = std::max(1, p.max_q_len);
  return std::max(1, (p.num_tokens + longest - 1) / longest);
}

// `tiles`: of rows, of one sequence.
inline double context_steps(const PagedAttentionParams& p, int64_t tiles, int blocks_per_sm) {
  const double triangle = p.causal ? std::min(p.max_q_len, p.max_kv_len) / 2. : 0.;
  const auto slots = int64_t{blocks_per_sm} * current_device().num_sms;
  const auto all = static_cast<int64_t>(tiles * num_longest_sequences(p));
  return (all + slots - 1) / slots * (p.max_kv_len - triangle) / 128;
}

inline double query_steps(const PagedAttentionParams& p, int shares) {
  constexpr double kSlower = 1.15;  // than the context kernel, for the same products
  constexpr double kMerge = 6;      // its launch, and partials there and back
  const double line = num_longest_sequences(p) * p.num_kv_heads * p.max_kv_len / 128;
  return kSlower * line / shares + kMerge;
}

}  // namespace star_attention
