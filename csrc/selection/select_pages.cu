// Three kernels:
//
//   pool_rows    means of a tile's rows: 32 pooled queries a tile and KV head, and their lse
//   score_pages  pooled queries times means of keys on the tensor cores, and the largest product of
//                each tile and page. A warp holds a tile's 32 queries in registers; the 8 means of
//                a page are one n8 column of mma.m16n8k16, so that a page's score is in one warp.
//   choose       the best pages of each tile, one after the other: the winner of a round is the
//                largest key below the last winner. Keys hold score and page, so there are no ties.
//
// All that is added is added in one order: same run, same bits.
#include <algorithm>

#include "common/check.h"
#include "common/numeric.cuh"
#include "common/sm80_ptx.cuh"
#include "star_attention/selection.h"

namespace star_attention {
namespace {

constexpr int kMeanRows = 4;                         // of a tile, that a pooled row stands for
constexpr int kPooled = kSelectionPage / kMeanRows;  // rows of a tile
constexpr int kWarps = 8;                            // of a block, a tile each
constexpr int kStagePages = 8;
constexpr int kBlockPages = 64;  // that a block of score_pages scores
constexpr int kChooseThreads = 256;

struct Arguments {
  SelectPagesParams p;
  void* pooled;       // [num_kv_heads, num_tiles, kPooled, head_dim]
  float* pooled_lse;  // [num_kv_heads, num_tiles, kPooled]
  float* scores;      // [num_kv_heads, num_tiles, num_pages]
};

// A warp pools the rows of one pooled row.
template <typename T, int kHeadDim>
__global__ void pool_rows_kernel(const __grid_constant__ Arguments a) {
  constexpr int kElements = kHeadDim / 32;
  const SelectPagesParams& p = a.p;
  const int tile = blockIdx.x, kv_head = blockIdx.y, lane = threadIdx.x;
  const int row = blockIdx.z * blockDim.y + threadIdx.y;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int begin = p.tiles[tile], last = p.tiles[tile + 1] - 1;
  float sum[kElements] = {}, lse = 0.f;
#pragma unroll
  for (int r = 0; r < kMeanRows; ++r) {
    const int64_t token = min(begin + row * kMeanRows + r, last);
    for (int g = 0; g < group; ++g) {
      const int head = kv_head * group + g;
      const auto q = load_pack<T, kElements>(static_cast<const T*>(p.q) + token * p.q_stride +
                                             head * kHeadDim + lane * kElements);
#pragma unroll
      for (int i = 0; i < kElements; ++i) sum[i] += to_float(q.v[i]);
      lse += p.lse[token * p.num_q_heads + head];
    }
  }
  const float each = 1.f / (kMeanRows * group);
  const int64_t to = (int64_t{kv_head} * p.num_tiles + tile) * kPooled + row;
  Pack<T, kElements> mean;
#pragma unroll
  for (int i = 0; i < kElements; ++i) mean.v[i] = from_float<T>(sum[i] * each);
  store_pack(static_cast<T*>(a.pooled) + to * kHeadDim + lane * kElements, mean);
  if (lane == 0) a.pooled_lse[to] = lse * each;
}

// The larger; a NaN if there is one.
__device__ inline float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// Each lane's maxima of eight pages; afterwards lanes 4 i hold the warp's of page i.
__device__ inline float warp_max_of_eight(float (&best)[kStagePages], int lane) {
#pragma unroll
  for (int half = kStagePages / 2, bit = 16; half > 0; half /= 2, bit /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float other = __shfl_xor_sync(~0u, upper ? best[i] : best[i + half], bit);
      best[i] = max_or_nan(upper ? best[i + half] : best[i], other);
    }
  }
#pragma unroll
  for (int bit = 2; bit > 0; bit /= 2) {
    best[0] = max_or_nan(best[0], __shfl_xor_sync(~0u, best[0], bit));
  }
  return best[0];
}

// blockIdx: pages, tiles, KV head.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kWarps * 32)
    score_pages_kernel(const __grid_constant__ Arguments a) {
  constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, of a mean
  constexpr int kRows = kStagePages * kSelectionMeans;
  __shared__ __align__(128) T stages[2][kRows * kHeadDim];
  const SelectPagesParams& p = a.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.z;
  const int tile = blockIdx.y * kWarps + warp;
  const int own = tile < p.num_tiles ? min(p.candidates[tile], p.num_pages) : 0;

  __shared__ int most;
  if (threadIdx.x == 0) most = 0;
  __syncthreads();
  if (lane == 0) atomicMax(&most, own);
  __syncthreads();
  const int first = blockIdx.x * kBlockPages, end = min(first + kBlockPages, most);
  if (first >= end) return;

  // Chunk c of row r of a stage is at chunk c ^ (r % 8).
  const auto load = [&](int stage, int page) {
    const uint32_t to = ptx::smem_address(stages[stage]);
    for (int i = threadIdx.x; i < kRows * kChunks; i += kWarps * 32) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int from = page + row / kSelectionMeans;
      const bool valid = from < end;
      const int64_t mean =
          (int64_t{valid ? from : first} * p.num_kv_heads + kv_head) * kSelectionMeans +
          row % kSelectionMeans;
      ptx::cp_async_16(to + (row * kChunks + (chunk ^ (row % 8))) * 16,
                       static_cast<const T*>(p.means) + mean * kHeadDim + chunk * 8, valid);
    }
    ptx::cp_async_commit();
  };
  load(0, first);

  uint32_t q[2][kHeadDim / 16][4];
  float lse[2][2];
  const int64_t base = (int64_t{kv_head} * p.num_tiles + min(tile, p.num_tiles - 1)) * kPooled;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = base + m * 16 + half * 8 + lane / 4;
      const T* from = static_cast<const T*>(a.pooled) + row * kHeadDim + lane % 4 * 2;
      lse[m][half] = a.pooled_lse[row];
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        q[m][k][half] = *reinterpret_cast<const uint32_t*>(from + k * 16);
        q[m][k][half + 2] = *reinterpret_cast<const uint32_t*>(from + k * 16 + 8);
      }
    }
  }

  float* scores = a.scores + (int64_t{kv_head} * p.num_tiles + tile) * p.num_pages;
  int stage = 0;
  for (int page = first; page < end; page += kStagePages, stage ^= 1) {
    if (page + kStagePages < end) {
      load(stage ^ 1, page + kStagePages);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    if (page < own) {
      const uint32_t smem = ptx::smem_address(stages[stage]);
      float best[kStagePages];
#pragma unroll
      for (int n = 0; n < kStagePages; ++n) {
        float s[2][4] = {};
#pragma unroll
        for (int k = 0; k < kHeadDim / 32; ++k) {
          const int row = n * kSelectionMeans + lane % 8, chunk = k * 4 + lane / 8;
          uint32_t b[4];
          ptx::ldmatrix_x4(b, smem + (row * kChunks + (chunk ^ (row % 8))) * 16);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            ptx::mma_16816<T>(s[m], q[m][2 * k], b[0], b[1]);
            ptx::mma_16816<T>(s[m], q[m][2 * k + 1], b[2], b[3]);
          }
        }
        best[n] = -INFINITY;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float larger = max_or_nan(s[m][2 * half], s[m][2 * half + 1]);
            best[n] = max_or_nan(best[n], larger * p.scale - lse[m][half]);
          }
        }
      }
      const float score = warp_max_of_eight(best, lane);
      const int scored = page + lane / 4;
      if (lane % 4 == 0 && scored < own) scores[scored] = score;
    }
    __syncthreads();  // before the stage is loaded again
  }
}

// Grows with the score; of equal scores the lower page is the larger. 0: not to be chosen.
__device__ inline uint64_t key_of(float score, int page) {
  if (score == -INFINITY) return 0;
  const uint32_t bits = __float_as_uint(score + 0.f);  // -0 becomes 0
  const uint32_t ordered = isnan(score) ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | ~static_cast<uint32_t>(page);
}

// A block chooses for one tile and KV head.
__global__ void __launch_bounds__(kChooseThreads)
    choose_kernel(const __grid_constant__ Arguments a) {
  __shared__ uint64_t of_warps[kChooseThreads / 32];
  __shared__ int chosen[kMostSelectedPages];
  const SelectPagesParams& p = a.p;
  const int tile = blockIdx.x, kv_head = blockIdx.y;
  const int pages = min(p.candidates[tile], p.num_pages);
  const float* scores = a.scores + (int64_t{kv_head} * p.num_tiles + tile) * p.num_pages;

  uint64_t last = ~0ull, own = 0;
  bool taken = true;  // this thread's best was the last winner
  int count = 0;
  for (; count < p.count; ++count) {
    if (taken) {
      own = 0;
      for (int page = threadIdx.x; page < pages; page += kChooseThreads) {
        const uint64_t key = key_of(scores[page], page);
        if (key < last) own = max(own, key);
      }
    }
    uint64_t best = own;
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) best = max(best, __shfl_xor_sync(~0u, best, bit));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kChooseThreads / 32; ++w) best = max(best, of_warps[w]);
    __syncthreads();
    if (best == 0) break;
    if (threadIdx.x == 0) chosen[count] = static_cast<int>(~static_cast<uint32_t>(best));
    taken = best == own;
    last = best;
  }
  __syncthreads();
  const int64_t list = int64_t{tile} * p.num_kv_heads + kv_head;
  for (int i = threadIdx.x; i < p.count; i += kChooseThreads) {
    int at = i;
    if (i < count) {
      at = 0;
      for (int j = 0; j < count; ++j) at += chosen[j] < chosen[i];
    }
    p.lists[list * p.count + at] = i < count ? chosen[i] : 0;
  }
  if (threadIdx.x == 0) p.counts[list] = count;
}

int64_t pooled_rows(const SelectPagesParams& p) {
  return int64_t{p.num_kv_heads} * p.num_tiles * kPooled;
}

template <typename T, int kHeadDim>
void launch(const Arguments& a, cudaStream_t stream) {
  const SelectPagesParams& p = a.p;
  const dim3 pool_grid(p.num_tiles, p.num_kv_heads, kPooled / kWarps);
  pool_rows_kernel<T, kHeadDim><<<pool_grid, dim3(32, kWarps), 0, stream>>>(a);
  check_launch("pool_rows");
  const auto parts = [](int whole, int part) { return (whole + part - 1) / part; };
  if (p.num_pages > 0) {
    const dim3 grid(parts(p.num_pages, kBlockPages), parts(p.num_tiles, kWarps), p.num_kv_heads);
    score_pages_kernel<T, kHeadDim><<<grid, kWarps * 32, 0, stream>>>(a);
    check_launch("score_pages");
  }
  choose_kernel<<<dim3(p.num_tiles, p.num_kv_heads), kChooseThreads, 0, stream>>>(a);
  check_launch("choose_pages");
}

}  // namespace

void check(const SelectPagesParams& p) {
  require(p.dtype != DType::kFloat32, "q.dtype", "float32", "float16 or bfloat16");
  require(p.num_kv_heads > 0, "num_kv_heads", p.num_kv_heads, "at least 1");
  require(p.num_q_heads > 0 && p.num_q_heads % p.num_kv_heads == 0, "num_q_heads", p.num_q_heads,
          "a multiple of num_kv_heads = " + std::to_string(p.num_kv_heads));
  require(p.head_dim == 64 || p.head_dim == 128, "head_dim", p.head_dim, "64 or 128");
  require(p.scale > 0.f, "scale", p.scale, "a positive number");
  require(p.count > 0 && p.count <= kMostSelectedPages, "count", p.count,
          "1 to " + std::to_string(kMostSelectedPages));
  require(p.q_stride % 8 == 0, "q.stride(0)", p.q_stride, "a multiple of 8 elements");
  require(p.num_tiles >= 0, "num_tiles", p.num_tiles, "at least 0");
  require(p.num_pages >= 0, "num_pages", p.num_pages, "at least 0");
  if (p.num_tiles == 0) return;
  require_pointer(p.q, "q", 16);
  require_pointer(p.lse, "lse");
  require_pointer(p.tiles, "tiles");
  require_pointer(p.candidates, "candidates");
  if (p.num_pages > 0) require_pointer(p.means, "means", 16);
  require_pointer(p.lists, "lists");
  require_pointer(p.counts, "counts");
}

size_t select_pages_workspace(const SelectPagesParams& p) {
  check(p);
  const int64_t scores = int64_t{p.num_kv_heads} * p.num_tiles * p.num_pages;
  return pooled_rows(p) * (p.head_dim * size_of(p.dtype) + sizeof(float)) + scores * sizeof(float);
}

void select_pages(const SelectPagesParams& p, void* workspace, cudaStream_t stream) {
  check(p);
  if (p.num_tiles == 0) return;
  require_pointer(workspace, "workspace", 16);
  Arguments a{p, workspace, nullptr, nullptr};
  const int64_t rows = pooled_rows(p);
  a.pooled_lse = reinterpret_cast<float*>(static_cast<char*>(workspace) +
                                          rows * p.head_dim * size_of(p.dtype));
  a.scores = a.pooled_lse + rows;
  dispatch_16bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.head_dim == 128 ? launch<T, 128>(a, stream) : launch<T, 64>(a, stream);
  });
}

}  // namespace star_attention
