// Two kernels. The first has a block for each KV head: it marks the pages that any tile chose,
// numbers those of other ranks, and turns lists of pages into lists of planes. The second copies
// what was numbered out of the other ranks' memory: NVLink is its limit, which a few
// multiprocessors reach, while the others compute.
#include <algorithm>

#include "common/check.h"
#include "star_attention/selection.h"

namespace star_attention {
namespace {

constexpr int kLocateThreads = 1024;
// A block fills a multiprocessor, so that few of them are taken from what runs meanwhile.
constexpr int kCopyThreads = 1024;
constexpr int kCopyBlocks = 32;
constexpr int kCopyUnroll = 4;  // 16-byte loads that a thread has under way

struct Arguments {
  FetchPagesParams p;
  int words;        // of 32 pages
  int* wanted;      // [num_kv_heads, num_fetched]: which page comes to each place
  int* num_wanted;  // [num_kv_heads]
};

__global__ void __launch_bounds__(kLocateThreads)
    locate_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ uint32_t shared[];
  uint32_t* remote = shared;                               // bits of chosen pages elsewhere
  int* before = reinterpret_cast<int*>(shared + a.words);  // how many are in earlier words
  __shared__ int of_warps[kLocateThreads / 32];
  const FetchPagesParams& p = a.p;
  const int head = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto for_each_entry = [&](auto&& f) {
    for (int i = threadIdx.x; i < p.num_tiles * p.count; i += kLocateThreads) {
      const int64_t list = int64_t{i / p.count} * p.num_kv_heads + head;
      if (i % p.count < p.counts[list]) {
        const int64_t entry = list * p.count + i % p.count;
        f(entry, p.lists[entry]);
      }
    }
  };

  for (int w = threadIdx.x; w < a.words; w += kLocateThreads) remote[w] = 0;
  __syncthreads();
  for_each_entry([&](int64_t, int page) {
    if (p.owners[page] != p.rank) atomicOr(&remote[page / 32], 1u << page % 32);
  });
  __syncthreads();

  int total = 0;
  for (int base = 0; base < a.words; base += kLocateThreads) {
    const int w = base + threadIdx.x;
    const int own = w < a.words ? __popc(remote[w]) : 0;
    int sum = own;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int below = __shfl_up_sync(~0u, sum, delta);
      if (lane >= delta) sum += below;
    }
    if (lane == 31) of_warps[warp] = sum;
    __syncthreads();
    int earlier = total;
    for (int i = 0; i < kLocateThreads / 32; ++i) {
      if (i < warp) earlier += of_warps[i];
      total += of_warps[i];
    }
    if (w < a.words) before[w] = earlier + sum - own;
    __syncthreads();
  }
  if (threadIdx.x == 0) a.num_wanted[head] = min(total, p.num_fetched);

  const auto place_of = [&](int page) {
    const uint32_t lower = remote[page / 32] & ((1u << page % 32) - 1);
    return before[page / 32] + __popc(lower);
  };
  for (int w = threadIdx.x; w < a.words; w += kLocateThreads) {
    int place = before[w];
    for (uint32_t bits = remote[w]; bits != 0 && place < p.num_fetched; bits &= bits - 1) {
      a.wanted[int64_t{head} * p.num_fetched + place++] = w * 32 + __ffs(bits) - 1;
    }
  }
  for_each_entry([&](int64_t entry, int page) {
    const bool is_here = p.owners[page] == p.rank;
    const int plane = (is_here ? p.pages[page] : place_of(page)) * 2 * p.num_kv_heads + head;
    p.planes[entry] = is_here ? plane : ~plane;
  });
}

// A block copies a KV head's part of a page at a time, K and V.
__global__ void __launch_bounds__(kCopyThreads) fetch_kernel(const __grid_constant__ Arguments a) {
  const FetchPagesParams& p = a.p;
  const int packs = p.plane_bytes / 16;
  const auto first_pack = [&](int page, int head) {
    return (int64_t{page} * 2 * p.num_kv_heads + head) * packs;
  };
  int wanted = 0;  // of the heads so far
  for (int head = 0, mine = blockIdx.x; head < p.num_kv_heads; ++head) {
    const int first = wanted;
    wanted += a.num_wanted[head];
    for (; mine < wanted; mine += gridDim.x) {
      const int place = mine - first;
      const int page = a.wanted[int64_t{head} * p.num_fetched + place];
      const uint4* from =
          static_cast<const uint4*>(p.pools[p.owners[page]]) + first_pack(p.pages[page], head);
      uint4* to = static_cast<uint4*>(p.fetched) + first_pack(place, head);
      for (int begin = threadIdx.x; begin < 2 * packs; begin += kCopyThreads * kCopyUnroll) {
        const auto for_each_pack = [&](auto&& f) {
#pragma unroll
          for (int i = 0; i < kCopyUnroll; ++i) {
            const int at = begin + i * kCopyThreads;
            const int in_page = at < packs ? at : at + (p.num_kv_heads - 1) * packs;
            if (at < 2 * packs) f(i, in_page);
          }
        };
        uint4 moving[kCopyUnroll];
        for_each_pack([&](int i, int at) { moving[i] = from[at]; });
        for_each_pack([&](int i, int at) { to[at] = moving[i]; });
      }
    }
  }
}

}  // namespace

void check(const FetchPagesParams& p) {
  require(p.rank >= 0 && p.rank < FetchPagesParams::kMaxRanks, "rank", p.rank, "0 to 7");
  require(p.num_kv_heads > 0, "num_kv_heads", p.num_kv_heads, "at least 1");
  require(p.plane_bytes > 0 && p.plane_bytes % 16 == 0, "plane_bytes", p.plane_bytes,
          "a multiple of 16");
  require(p.count > 0 && p.count <= kMostSelectedPages, "count", p.count,
          "1 to " + std::to_string(kMostSelectedPages));
  require(p.num_tiles >= 0, "num_tiles", p.num_tiles, "at least 0");
  // The marks are in shared memory.
  require(p.num_pages >= 0 && p.num_pages <= 1 << 17, "num_pages", p.num_pages, "at most 131072");
  require(p.num_fetched >= 0, "num_fetched", p.num_fetched, "at least 0");
  if (p.num_tiles == 0 || p.num_pages == 0) return;
  require_pointer(p.lists, "lists");
  require_pointer(p.counts, "counts");
  require_pointer(p.pages, "pages");
  require_pointer(p.owners, "owners");
  require_pointer(p.planes, "planes");
  if (p.num_fetched > 0) require_pointer(p.fetched, "fetched", 16);
}

size_t fetch_pages_workspace(const FetchPagesParams& p) {
  check(p);
  return size_t(p.num_kv_heads) * (p.num_fetched + 1) * sizeof(int);
}

void fetch_pages(const FetchPagesParams& p, void* workspace, cudaStream_t stream) {
  check(p);
  if (p.num_tiles == 0 || p.num_pages == 0) return;
  require_pointer(workspace, "workspace");
  Arguments a{p, (p.num_pages + 31) / 32, static_cast<int*>(workspace), nullptr};
  a.num_wanted = a.wanted + int64_t{p.num_kv_heads} * p.num_fetched;
  locate_kernel<<<p.num_kv_heads, kLocateThreads, a.words * 8, stream>>>(a);
  check_launch("locate_pages");
  if (p.num_fetched == 0) return;
  fetch_kernel<<<kCopyBlocks, kCopyThreads, 0, stream>>>(a);
  check_launch("fetch_pages");
}

}  // namespace star_attention
