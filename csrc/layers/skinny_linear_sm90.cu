// A product with the few rows of a decode step, where reading the weights, in x's type or in FP8,
// takes all the time. Every warp of the GPU takes rows of the weights in turn, and streams them
// through two chunks of shared memory that the copy engine fills, always ahead, across rows: there
// is no moment without loads on their way. The first are on their way before the kernel in front,
// which makes x, has ended; then x comes to shared memory too. A multiprocessor has room for one
// block only, so that the blocks of a kernel that starts early are spread over all of them.
#include <cuda_fp8.h>

#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/device.h"
#include "common/numeric.cuh"
#include "common/sm90.cuh"
#include "layers/skinny_linear_sm90.h"

namespace star_attention {
namespace {

constexpr int kWarps = 16;
constexpr int kStages = 2;
constexpr int kEach = 8;  // elements that a lane reads at a time
constexpr int kChunkBytes = 4096;
constexpr int kRingBytes = kWarps * kStages * kChunkBytes;
constexpr int kStaticBytes = 512;  // of shared memory, at most: the barriers
constexpr int kMaxTokens = 2;      // with three cuBLAS is as fast

// Walks over the chunks of a warp's rows.
template <int kChunk>
struct Place {
  int row, begin = 0;

  __device__ void advance(const SkinnyLinearParams& p) {
    begin += kChunk;
    if (begin < p.in_features) return;
    begin = 0;
    row += gridDim.x * kWarps;
  }
};

template <typename T>
__device__ inline void widen(const Pack<T, kEach>& pack, float (&out)[kEach]) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) out[j] = to_float(pack.v[j]);
}
// Pairs of e4m3.
__device__ inline void widen(const Pack<__nv_fp8x2_storage_t, kEach / 2>& pack,
                             float (&out)[kEach]) {
#pragma unroll
  for (int j = 0; j < kEach / 2; ++j) {
    const float2 pair = __half22float2(__nv_cvt_fp8x2_to_halfraw2(pack.v[j], __NV_E4M3));
    out[2 * j] = pair.x;
    out[2 * j + 1] = pair.y;
  }
}

template <typename T, bool kFp8, int kTokens>
__global__ void __launch_bounds__(32 * kWarps) skinny_linear_kernel(const SkinnyLinearParams p) {
  using Weights = std::conditional_t<kFp8, Pack<__nv_fp8x2_storage_t, kEach / 2>, Pack<T, kEach>>;
  constexpr int kElementBytes = sizeof(Weights) / kEach;
  constexpr int kChunk = kChunkBytes / kElementBytes;  // elements
  constexpr int kPacks = kChunk / (32 * kEach);
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ uint64_t chunk_barriers[kWarps][kStages], x_barrier;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint8_t* const ring = shared + warp * kStages * kChunkBytes;
  T* const x = reinterpret_cast<T*>(shared + kRingBytes);  // [kTokens, in_features]
  uint64_t* const barriers = chunk_barriers[warp];

  allow_next_kernel();
  Place<kChunk> next{static_cast<int>(blockIdx.x) * kWarps + warp};
  Place<kChunk> here = next;
  const auto load = [&](int stage) {
    if (next.row >= p.out_features) return;
    if (lane == 0) {
      const uint8_t* source = static_cast<const uint8_t*>(p.weight) +
                              (int64_t{next.row} * p.in_features + next.begin) * kElementBytes;
      const uint32_t bytes = min(kChunk, p.in_features - next.begin) * kElementBytes;
      sm90::barrier_arrive_expect(&barriers[stage], bytes);
      sm90::bulk_load(ring + stage * kChunkBytes, source, bytes, &barriers[stage]);
    }
    next.advance(p);
  };
  if (lane == 0) {
    for (int s = 0; s < kStages; ++s) sm90::barrier_init(&barriers[s], 1);
    if (warp == 0) sm90::barrier_init(&x_barrier, 1);
    sm90::barrier_init_fence();
  }
  __syncwarp();
  for (int s = 0; s < kStages; ++s) load(s);
  __syncthreads();  // x_barrier is there

  wait_for_previous_kernel();
  if (threadIdx.x == 0) {
    const uint32_t bytes = p.in_features * sizeof(T);
    sm90::barrier_arrive_expect(&x_barrier, kTokens * bytes);
    for (int t = 0; t < kTokens; ++t) {
      const T* source = static_cast<const T*>(p.x) + t * p.x_stride;
      sm90::bulk_load(x + t * p.in_features, source, bytes, &x_barrier);
    }
  }
  sm90::barrier_wait(&x_barrier, 0);

  float sums[kTokens] = {};
  for (int stage = 0, parity = 0; here.row < p.out_features;) {
    sm90::barrier_wait(&barriers[stage], parity);
    Weights weights[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      weights[k] = reinterpret_cast<const Weights*>(ring + stage * kChunkBytes)[k * 32 + lane];
    }
    __syncwarp();  // all have read the chunk
    load(stage);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int i = here.begin + kEach * (k * 32 + lane);
      if (i >= p.in_features) break;
      float widened[kEach];
      widen(weights[k], widened);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const auto xs = load_pack<T, kEach>(x + t * p.in_features + i);
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[t] += to_float(xs.v[j]) * widened[j];
      }
    }
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
    const int row = here.row;
    here.advance(p);
    if (here.row == row) continue;

#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      for (int mask = 16; mask > 0; mask /= 2) sums[t] += __shfl_xor_sync(~0u, sums[t], mask);
      if (lane == 0) {
        if constexpr (kFp8) sums[t] *= p.scales[row];
        const T* const addend = static_cast<const T*>(p.addend);
        if (addend) sums[t] += to_float(addend[t * p.addend_stride + row]);
        static_cast<T*>(p.out)[int64_t{t} * p.out_features + row] = from_float<T>(sums[t]);
      }
      sums[t] = 0.f;
    }
  }
}

template <typename T, bool kFp8>
void launch(const SkinnyLinearParams& p, cudaStream_t stream) {
  const auto kernel =
      p.num_tokens == 1 ? skinny_linear_kernel<T, kFp8, 1> : skinny_linear_kernel<T, kFp8, 2>;
  const int shared_bytes = kRingBytes + p.num_tokens * p.in_features * 2;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      "skinny_linear");
  launch_dependent(kernel, current_device().num_sms, 32 * kWarps, shared_bytes, stream,
                   "skinny_linear", p);
}

}  // namespace

int max_skinny_tokens_sm90(int in_features, int smem_per_block) {
  if (in_features <= 0 || in_features % 8 != 0) return 0;
  return std::min(kMaxTokens, (smem_per_block - kRingBytes - kStaticBytes) / (2 * in_features));
}

void skinny_linear_sm90(const SkinnyLinearParams& p, cudaStream_t stream) {
  dispatch_16bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.scales ? launch<T, true>(p, stream) : launch<T, false>(p, stream);
  });
}

}  // namespace star_attention
