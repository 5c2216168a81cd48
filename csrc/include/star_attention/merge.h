// The exact softmax over a context from attention over its shards.
#pragma once

#include "star_attention/attention.h"

namespace star_attention {

// lse = log sum_r exp(lse_r), o = sum_r exp(lse_r - lse) o_r. A shard with lse = -inf contributes
// nothing whatever its o holds; a row that is empty in every shard gives o = 0, lse = -inf. NaN in
// any shard's lse gives NaN.
struct MergeLseParams {
  DType dtype;      // of o
  DType out_dtype;  // of out: any
  int num_shards;
  int num_tokens;
  int num_heads;
  int head_dim;  // a multiple of 8

  const void* o;           // [num_shards, num_tokens, num_heads, head_dim]
  int64_t o_shard_stride;  // elements; the last two dimensions are contiguous
  int64_t o_token_stride;
  const float* lse;          // [num_shards, num_tokens, num_heads]
  int64_t lse_shard_stride;  // elements; heads are contiguous
  int64_t lse_token_stride;

  void* out;       // [num_tokens, num_heads, head_dim], contiguous
  float* out_lse;  // [num_tokens, num_heads], contiguous, or null
};

// Throws std::invalid_argument if the call would not be valid; the call itself checks too.
STAR_ATTENTION_EXPORT void check(const MergeLseParams& params);

STAR_ATTENTION_EXPORT void merge_lse(const MergeLseParams& params, cudaStream_t stream);

}  // namespace star_attention
