// Rotary embedding of a fused QKV row and the append of its K and V to the paged cache.
#pragma once

#include "star_attention/attention.h"

namespace star_attention {

struct RopeAppendParams {
  DType dtype;  // of qkv, q and kv_pool: kFloat16 or kBFloat16
  int num_q_heads;
  int num_kv_heads;
  int head_dim;          // 64 or 128
  int tokens_per_block;  // tokens a page holds: 64 or 128

  const void* qkv;              // [num_tokens, (num_q_heads + 2 num_kv_heads) * head_dim]
  int64_t qkv_stride;           // elements between rows
  const int32_t* positions;     // [num_tokens], row of `rotary` that each token uses
  const float* rotary;          // [max_position, head_dim]: cosines, then sines; pairs (i, i + D/2)
  const int32_t* slot_mapping;  // [num_tokens]: page * tokens_per_block + offset, -1 = not stored
  int num_tokens;

  void* q;        // [num_tokens, num_q_heads, head_dim], contiguous
  void* kv_pool;  // [num_pages, 2 (K, V), num_kv_heads, tokens_per_block, head_dim]
};

// Throws std::invalid_argument if the call would not be valid; the call itself checks too.
STAR_ATTENTION_EXPORT void check(const RopeAppendParams& params);

STAR_ATTENTION_EXPORT void rope_append(const RopeAppendParams& params, cudaStream_t stream);

}  // namespace star_attention
