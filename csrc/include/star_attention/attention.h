// Attention over a paged KV cache. All pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "star_attention/export.h"

namespace star_attention {

// kFloat8 is e4m3.
enum class DType { kFloat16, kBFloat16, kFloat32, kFloat8, kInt8 };

// One call attends `num_seqs` sequences of query rows to the pages that each sequence lists.
// Row i of a sequence with n rows sees the first `kv_len - (n - 1 - i)` tokens of its page list
// when `causal` (bottom-right aligned), all `kv_len` of them otherwise. A row that sees nothing
// gets o = 0, lse = -inf. A NaN in a live token surfaces: of K in o and lse of the rows that see
// it, of V in o.
//
// The kernels in front on the stream may have written anything that the pointers name, lengths
// included, also those that let this one start early (common/dependent_launch.cuh).
//
// With `starts` row t sees of these tokens only those from starts[t] on, as where a layer has a
// sliding window; a NaN in one before may surface too. Not with `by_head` or `kv_scales`.
//
// With `by_head` each KV head of a sequence has a list of its own, of planes instead of pages: the
// keys of one KV head in one page, plane (page * 2) * num_kv_heads + head; the values are
// num_kv_heads planes behind. Plane -1 - e of `other_pool` is listed as e < 0. Context kernels
// only.
//
// With `kv_scales` pages have 8-bit codes; an element is its code times the scale of its page, K or
// V, and KV head. Query kernels only, whose products are in float16: a q beyond its range surfaces
// as NaN.
struct PagedAttentionParams {
  DType dtype;    // of q, and of kv_pool without kv_scales: kFloat16 or kBFloat16
  DType o_dtype;  // dtype, or kFloat32 for partials that are merged later
  int num_q_heads;
  int num_kv_heads;      // divides num_q_heads
  int head_dim;          // 64 or 128
  int tokens_per_block;  // tokens a page holds: 64 or 128
  bool causal;
  float scale;  // scores are scale * q·k

  const void* q;  // [num_tokens, num_q_heads, head_dim], rows q_stride elements apart
  int64_t q_stride;
  const void* kv_pool;  // [num_pages, 2 (K, V), num_kv_heads, tokens_per_block, head_dim]
  int64_t num_pages;
  const float* kv_scales;     // [num_pages, 2, num_kv_heads]; null: pages are of `dtype`
  DType kv_dtype;             // of their codes: kFloat8 or kInt8
  const int32_t* page_table;  // [num_seqs, page_table_stride]
  int page_table_stride;
  const int32_t* cu_seqlens_q;  // [num_seqs + 1], prefix sums of rows per sequence
  const int32_t* kv_lens;       // [num_seqs]
  const int32_t* starts;        // [num_tokens], ascending within a sequence; null: all 0
  bool by_head;  // page_table [num_seqs, num_kv_heads, stride], kv_lens [num_seqs, num_kv_heads]
  const void* other_pool;  // as kv_pool; may be null if no list has a plane of it
  int64_t num_other_pages;
  int num_seqs;
  int num_tokens;  // rows of q, o and lse
  int max_q_len;   // host-side bounds of the device-side lengths: they size the grid
  int max_kv_len;

  void* o;     // [num_tokens, num_q_heads, head_dim], contiguous
  float* lse;  // [num_tokens, num_q_heads], natural log-sum-exp of the scaled scores
};

}  // namespace star_attention
