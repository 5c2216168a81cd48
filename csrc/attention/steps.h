// Estimates behind QueryPlan::steps and the context kernels' steps (kernels.h). They take every
// sequence's cache for as long as the longest.
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

// `tile_rows`: of a block, which takes `token_rows` rows a token of one of `heads`.
inline double context_steps(const PagedAttentionParams& p, int tile_rows, int token_rows, int heads,
                            int blocks_per_sm) {
  const int64_t longest = int64_t{p.max_q_len} * token_rows;
  const int64_t others = std::max<int64_t>(0, p.num_tokens - p.max_q_len) * token_rows;
  const int64_t row_tiles =
      (longest + tile_rows - 1) / tile_rows + others / tile_rows + p.num_seqs - 1;
  const int64_t slots = int64_t{blocks_per_sm} * current_device().num_sms;
  const int64_t rounds = (row_tiles * heads + slots - 1) / slots;
  const double triangle = p.causal ? std::min(p.max_q_len, p.max_kv_len) / 2. : 0.;
  return rounds * (p.max_kv_len - triangle) / 128;
}

inline double query_steps(const PagedAttentionParams& p, int shares) {
  constexpr double kSlower = 1.15;  // than the context kernel, for the same products
  constexpr double kMerge = 6;      // its launch, and partials there and back
  const double line = double(p.num_seqs) * p.num_kv_heads * p.max_kv_len / 128;
  return kSlower * line / shares + kMerge;
}

}  // namespace star_attention
