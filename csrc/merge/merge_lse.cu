// A thread takes kDims dimensions of one token's head through all shards, kShards at a time: their
// loads are in flight together, and the sum so far moves to the new maximum once for all of them.
#include "common/check.h"
#include "common/numeric.cuh"
#include "star_attention/merge.h"

namespace star_attention {
namespace {

constexpr int kThreads = 256;

template <typename In, typename Out, int kDims>
__global__ void __launch_bounds__(kThreads, 3) merge_lse_kernel(const MergeLseParams p) {
  constexpr int kShards = 32 / kDims;
  const int lanes = p.head_dim / kDims;  // threads a head takes
  const int item = blockIdx.y * kThreads + threadIdx.x;
  const int head = item / lanes;
  if (head >= p.num_heads) return;
  const int dim = item % lanes * kDims;
  const int64_t token = blockIdx.x;
  const int64_t row = token * p.num_heads + head;
  const float* lse = p.lse + token * p.lse_token_stride + head;
  const In* o = static_cast<const In*>(p.o) + token * p.o_token_stride + head * p.head_dim + dim;

  float max = kNoMax;
  float sum = 0.f;
  float acc[kDims] = {};
  for (int first = 0; first < p.num_shards; first += kShards) {
    float shard_lse[kShards];
    Pack<In, kDims> shard[kShards];
#pragma unroll
    for (int i = 0; i < kShards; ++i) {
      const int r = first + i;
      shard_lse[i] = r < p.num_shards ? lse[r * p.lse_shard_stride] : -INFINITY;
      if (r < p.num_shards) shard[i] = load_pack<In, kDims>(o + r * p.o_shard_stride);
    }
    float new_max = max;
#pragma unroll
    for (int i = 0; i < kShards; ++i) new_max = fmaxf(new_max, shard_lse[i]);
    const float correction = __expf(max - new_max);
    max = new_max;
    sum *= correction;
#pragma unroll
    for (float& x : acc) x *= correction;
#pragma unroll
    for (int i = 0; i < kShards; ++i) {
      if (shard_lse[i] == -INFINITY) continue;
      const float weight = __expf(shard_lse[i] - max);
      sum += weight;
#pragma unroll
      for (int j = 0; j < kDims; ++j) acc[j] += weight * to_float(shard[i].v[j]);
    }
  }

  const float scale = sum == 0.f ? 0.f : 1.f / sum;
  Pack<Out, kDims> out;
#pragma unroll
  for (int i = 0; i < kDims; ++i) out.v[i] = from_float<Out>(acc[i] * scale);
  store_pack(static_cast<Out*>(p.out) + row * p.head_dim + dim, out);
  if (p.out_lse != nullptr && dim == 0) p.out_lse[row] = sum == 0.f ? -INFINITY : max + logf(sum);
}

template <typename In, int kDims>
void launch(const MergeLseParams& p, cudaStream_t stream) {
  const dim3 blocks(p.num_tokens, (p.num_heads * (p.head_dim / kDims) + kThreads - 1) / kThreads);
  if (p.out_dtype == DType::kFloat32) {
    merge_lse_kernel<In, float, kDims><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    dispatch_16bit(p.out_dtype, [&](auto element) {
      merge_lse_kernel<In, decltype(element), kDims><<<blocks, kThreads, 0, stream>>>(p);
    });
  }
}

}  // namespace

void check(const MergeLseParams& p) {
  require(p.num_shards > 0, "num_shards", p.num_shards, "at least 1");
  require(p.num_heads > 0, "num_heads", p.num_heads, "at least 1");
  require(p.head_dim > 0 && p.head_dim % 8 == 0, "head_dim", p.head_dim, "a multiple of 8");
  require(p.o_shard_stride % 8 == 0, "o.stride(0)", p.o_shard_stride, "a multiple of 8 elements");
  require(p.o_token_stride % 8 == 0, "o.stride(1)", p.o_token_stride, "a multiple of 8 elements");
  require(p.num_tokens >= 0, "num_tokens", p.num_tokens, "at least 0");
  if (p.num_tokens == 0) return;
  require_pointer(p.o, "o", 16);
  require_pointer(p.lse, "lse");
  require_pointer(p.out, "out", 16);
}

void merge_lse(const MergeLseParams& p, cudaStream_t stream) {
  check(p);
  if (p.num_tokens == 0) return;
  if (p.dtype == DType::kFloat32) {
    launch<float, 8>(p, stream);
  } else {
    dispatch_16bit(p.dtype, [&](auto element) {
      using In = decltype(element);
      p.head_dim % 16 == 0 ? launch<In, 16>(p, stream) : launch<In, 8>(p, stream);
    });
  }
  check_launch("merge_lse");
}

}  // namespace star_attention
