// Selected pages: which pages of earlier blocks a tile of query rows sees besides, and where they
// are. All pointers are device pointers, but for what is an array here. Source: docs/selection.md.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "star_attention/attention.h"
#include "star_attention/export.h"

namespace star_attention {

constexpr int kSelectionPage = 128;     // tokens of a page, and rows of a tile
constexpr int kSelectionMeanKeys = 16;  // of a page, that a mean stands for
constexpr int kSelectionMeans = kSelectionPage / kSelectionMeanKeys;
constexpr int kMostSelectedPages = 256;

// Means of consecutive keys, summed in float32.
struct PageMeansParams {
  DType dtype;  // kFloat16 or kBFloat16
  int num_kv_heads;
  int head_dim;         // 64 or 128
  const void* kv_pool;  // [*, 2 (K, V), num_kv_heads, kSelectionPage, head_dim]
  int num_pages;
  const int32_t* pages;  // [num_pages], of the pool
  const int32_t* rows;   // [num_pages], of means
  void* means;           // [*, num_kv_heads, kSelectionMeans, head_dim]
};

// A tile's score of a page is the largest `scale * q·k - lse` over means q of four consecutive rows
// in all heads of a group, with the mean of their lse, and means k of the page's keys. The last row
// of a tile stands for those that it lacks. The best `count` are chosen, of equal scores the lower
// page; -0 equals 0, a NaN is above all, -inf is never chosen.
struct SelectPagesParams {
  DType dtype;  // of q and means: kFloat16 or kBFloat16
  int num_q_heads;
  int num_kv_heads;  // divides num_q_heads
  int head_dim;      // 64 or 128
  float scale;
  int count;      // 1 to kMostSelectedPages
  const void* q;  // [num_tokens, num_q_heads, head_dim], rows q_stride elements apart
  int64_t q_stride;
  const float* lse;      // [num_tokens, num_q_heads], over what the rows see anyway
  const int32_t* tiles;  // [num_tiles + 1], first rows; a tile has 1 to kSelectionPage
  int num_tiles;
  const int32_t* candidates;  // [num_tiles]: a tile chooses from so many of the first pages
  const void* means;          // [num_pages, num_kv_heads, kSelectionMeans, head_dim]
  int num_pages;
  int32_t* lists;   // [num_tiles, num_kv_heads, count], rows of means, ascending, 0 behind the last
  int32_t* counts;  // [num_tiles, num_kv_heads]
};

// Copies chosen pages that other ranks keep, each KV head's once, out of their memory, and says
// where all of them are. A plane is the keys or the values of one KV head in one page: plane
// (page * 2 + which) * num_kv_heads + head of a pool, `which` 0 for K.
struct FetchPagesParams {
  static constexpr int kMaxRanks = 8;

  int rank;
  int num_kv_heads;
  int plane_bytes;  // a multiple of 16
  int count, num_tiles, num_pages;
  const int32_t* lists;          // [num_tiles, num_kv_heads, count], of select_pages
  const int32_t* counts;         // [num_tiles, num_kv_heads]
  const int32_t* pages;          // [num_pages], in the pools of their ranks
  const int32_t* owners;         // [num_pages], their ranks
  const void* pools[kMaxRanks];  // of this layer, on each rank
  void* fetched;                 // a pool of num_fetched pages, written
  int num_fetched;               // at least min(num_tiles * count, pages of other ranks)
  int32_t* planes;  // [num_tiles, num_kv_heads, count]: the plane of the keys, ~plane if fetched
};

// Throw std::invalid_argument if the call would not be valid; the calls themselves check too.
STAR_ATTENTION_EXPORT void check(const PageMeansParams& params);
STAR_ATTENTION_EXPORT void check(const SelectPagesParams& params);
STAR_ATTENTION_EXPORT void check(const FetchPagesParams& params);

// Bytes of device memory, aligned to 16, whose contents do not matter before or after a call.
STAR_ATTENTION_EXPORT size_t select_pages_workspace(const SelectPagesParams& params);
STAR_ATTENTION_EXPORT size_t fetch_pages_workspace(const FetchPagesParams& params);

STAR_ATTENTION_EXPORT void page_means(const PageMeansParams& params, cudaStream_t stream);
STAR_ATTENTION_EXPORT void select_pages(const SelectPagesParams& params, void* workspace,
                                        cudaStream_t stream);
STAR_ATTENTION_EXPORT void fetch_pages(const FetchPagesParams& params, void* workspace,
                                       cudaStream_t stream);

}  // namespace star_attention
