// Pages of a finished context in 8 bits. All pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "star_attention/attention.h"
#include "star_attention/export.h"

namespace star_attention {

// In the memory of a 16-bit page are two 8-bit ones: those of page p are 2p and 2p + 1 of
// [num_layers, 2 * num_pages, 2, num_kv_heads, tokens_per_block, head_dim].
struct QuantizePagesParams {
  DType dtype;     // of 16-bit pages
  DType kv_dtype;  // of codes: kFloat8 or kInt8
  int num_layers;
  int num_kv_heads;
  int head_dim;          // 64 or 128
  int tokens_per_block;  // 64 or 128
  int64_t num_pages;     // of 16 bits that the pool has
  void* kv_pool;  // [num_layers, num_pages, 2 (K, V), num_kv_heads, tokens_per_block, head_dim]
  float* scales;  // [num_layers, 2 * num_pages, 2, num_kv_heads]

  const int32_t* pages;   // [count]: see the functions
  const int32_t* others;  // [count]
  int count;
};

// Quantises 16-bit `pages` where they are: 8-bit page i is in half i % 2 of page i - i % 2, so that
// every second page is free afterwards. Of page i the first others[i] tokens count; the rest become
// 0. A scale is the largest magnitude over 448 (kFloat8) or 127 (kInt8), 1 where all are 0; a code
// is the nearest to value / scale, the even one of two. A NaN makes the scale one.
STAR_ATTENTION_EXPORT void quantize_pages(const QuantizePagesParams& params, cudaStream_t stream);

// Writes 8-bit `pages` as the 16-bit pages `others`, which have no memory in common.
STAR_ATTENTION_EXPORT void dequantize_pages(const QuantizePagesParams& params, cudaStream_t stream);

}  // namespace star_attention
