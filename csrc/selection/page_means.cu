// A block takes the keys of one KV head in one page: a thread sums two elements of a mean's keys.
#include "common/check.h"
#include "common/numeric.cuh"
#include "star_attention/selection.h"

namespace star_attention {
namespace {

template <typename T>
__global__ void page_means_kernel(const PageMeansParams p) {
  using Pair = Pack<T, 2>;
  const int64_t plane = int64_t{p.pages[blockIdx.x]} * 2 * p.num_kv_heads + blockIdx.y;
  const int mean = threadIdx.y, first = mean * kSelectionMeanKeys;
  const T* keys = static_cast<const T*>(p.kv_pool) + (plane * kSelectionPage + first) * p.head_dim +
                  threadIdx.x * 2;
  float sum[2] = {};
#pragma unroll
  for (int i = 0; i < kSelectionMeanKeys; ++i) {
    const Pair pair = load_pack<T, 2>(keys + i * p.head_dim);
    sum[0] += to_float(pair.v[0]);
    sum[1] += to_float(pair.v[1]);
  }
  const int64_t row = int64_t{p.rows[blockIdx.x]} * p.num_kv_heads + blockIdx.y;
  T* out = static_cast<T*>(p.means) + (row * kSelectionMeans + mean) * p.head_dim + threadIdx.x * 2;
  constexpr float kEach = 1.f / kSelectionMeanKeys;
  store_pack(out, Pair{from_float<T>(sum[0] * kEach), from_float<T>(sum[1] * kEach)});
}

}  // namespace

void check(const PageMeansParams& p) {
  require(p.dtype != DType::kFloat32, "kv_pool.dtype", "float32", "float16 or bfloat16");
  require(p.num_kv_heads > 0, "num_kv_heads", p.num_kv_heads, "at least 1");
  require(p.head_dim == 64 || p.head_dim == 128, "head_dim", p.head_dim, "64 or 128");
  require(p.num_pages >= 0, "num_pages", p.num_pages, "at least 0");
  if (p.num_pages == 0) return;
  require_pointer(p.kv_pool, "kv_pool");
  require_pointer(p.pages, "pages");
  require_pointer(p.rows, "rows");
  require_pointer(p.means, "means");
}

void page_means(const PageMeansParams& p, cudaStream_t stream) {
  check(p);
  if (p.num_pages == 0) return;
  const dim3 grid(p.num_pages, p.num_kv_heads), block(p.head_dim / 2, kSelectionMeans);
  dispatch_16bit(p.dtype, [&](auto element) {
    page_means_kernel<decltype(element)><<<grid, block, 0, stream>>>(p);
  });
  check_launch("page_means");
}

}  // namespace star_attention
