// The steps of the sm_90a main loop (mainloop_sm90.cuh): products of a warpgroup's 64 query rows
// with KV tiles of 128 tokens in shared memory, masks and softmax.
//
// Of its warp's 16 rows a thread holds two, `lane / 4` and 8 below it; in every 8 columns it has
// the pair 2 * (lane % 4). So element i of an accumulator is in row i / 2 % 2 of the two.
#pragma once

#include <limits>

#include "attention/rows.cuh"
#include "common/sm80_ptx.cuh"
#include "common/sm90.cuh"

namespace star_attention::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kRowsPerConsumer = 64;
constexpr int kRows = kConsumers * kRowsPerConsumer;
constexpr int kTokens = 128;  // of a KV tile
constexpr int kStages = 3;
constexpr int kPanel = 64;  // columns in a 128-byte row of shared memory
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * 4;
constexpr uint32_t kTilePanelBytes = kTokens * kPanel * 2;
constexpr uint32_t kQueryPanelBytes = kRowsPerConsumer * kPanel * 2;
constexpr float kMaxGrowth = 8.f;  // log2 of the largest probability
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Position in a ring of stages: a stage's barriers complete one phase a round.
template <int kSize>
struct Cursor {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == kSize) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A warp clears what follows the first `tokens` of a V tile: what lies behind a sequence's end may
// be NaN, and 0 * NaN would reach O.
template <int kHeadDim>
__device__ inline void clear_tail(uint8_t* v, int tokens) {
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < (kTokens - tokens) * kHeadDim / 8; i += 32) {
    const int row = tokens + i / (kHeadDim / 8);
    const int column = i % (kHeadDim / 8) * 8;
    const int offset = (column / kPanel * kTokens + row) * kPanel * 2 + column % kPanel * 2;
    *reinterpret_cast<uint4*>(v + offset) = uint4{};
  }
  fence_async_proxy();
  __syncwarp();
}

// One arrival for the whole warp.
__device__ inline void warp_arrive(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// The consumers' turns at the tensor cores; the last one opens by passing the first.
__device__ inline void await_turn(int consumer) {
  named_barrier_sync(1 + consumer, kConsumers * kWarpgroup);
}

__device__ inline void pass_turn(int consumer) {
  named_barrier_arrive(1 + (consumer + 1) % kConsumers, kConsumers * kWarpgroup);
}

// s = Q K^T, asynchronously
template <class Element, int kHeadDim>
__device__ __forceinline__ void multiply_qk(float (&s)[kTokens / 2], const uint8_t* q,
                                            const uint8_t* k) {
  const uint64_t a = wgmma_descriptor(q, 0);
  const uint64_t b = wgmma_descriptor(k, 0);
  wgmma_fence();
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    const int panel = d / kPanel, bytes = d % kPanel * 2;
    wgmma_ss<Element>(s, wgmma_advance(a, panel * kQueryPanelBytes + bytes),
                      wgmma_advance(b, panel * kTilePanelBytes + bytes), d != 0);
  }
  wgmma_commit();
}

// o += P V, asynchronously
template <class Element, int kCount>
__device__ __forceinline__ void multiply_pv(float (&o)[kCount], const uint32_t (&p)[kTokens / 4],
                                            const uint8_t* v) {
  const uint64_t b = wgmma_descriptor(v, kTilePanelBytes);
  wgmma_fence();
#pragma unroll
  for (int t = 0; t < kTokens; t += 16) {
    wgmma_rs<Element>(o, p + t / 4, wgmma_advance(b, t * kPanel * 2));
  }
  wgmma_commit();
}

// Masks the tile's tokens that hides(token, bounds[r]) says of the thread's row r; what it says
// depends on their distance.
template <typename Hides>
__device__ __forceinline__ void mask_scores(float (&s)[kTokens / 2], const int (&bounds)[2],
                                            Hides hides) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int bound = bounds[r] - threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (hides(i * 8 + e, bound)) s[i * 4 + 2 * r + e] = -kInfinity;
      }
    }
  }
}

// Reduces over the four lanes that share rows.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Softmax of a thread's two rows, tile after tile. The maximum is one of raw scores; it moves only
// when it grows by more than 2^kMaxGrowth, so almost no step has to rescale O.
struct Softmax {
  float scale;
  float scale_log2 = scale * kLog2e;
  float maximum[2] = {-kInfinity, -kInfinity};
  float reference[2];
  float sum[2] = {};  // over the thread's own columns

  __device__ float exponent(float score) const {
    return score == -kInfinity ? 0.f : score * scale_log2;
  }

  // `correction` is what earlier results have to be scaled by.
  __device__ __forceinline__ void find_reference(const float (&s)[kTokens / 2],
                                                 float (&correction)[2]) {
    float even[2] = {s[0], s[2]}, odd[2] = {s[1], s[3]};
#pragma unroll
    for (int i = 4; i < kTokens / 2; i += 4) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        even[r] = fmaxf(even[r], s[i + 2 * r]);
        odd[r] = fmaxf(odd[r], s[i + 2 * r + 1]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float tile_maximum = quad_max(fmaxf(even[r], odd[r]));
      const float old = maximum[r];
      if ((tile_maximum - old) * scale_log2 > kMaxGrowth) maximum[r] = tile_maximum;
      reference[r] = exponent(maximum[r]);
      correction[r] = maximum[r] == old ? 1.f : ptx::exp2_approx(old * scale_log2 - reference[r]);
      sum[r] *= correction[r];
    }
  }

  // Turns scores into the probabilities of the next product.
  template <class Element>
  __device__ __forceinline__ void exponentiate(float (&s)[kTokens / 2],
                                               uint32_t (&p)[kTokens / 4]) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int r = i / 2 % 2;
      s[i] = ptx::exp2_approx(fmaf(s[i], scale_log2, -reference[r]));
      sum[r] += s[i];
    }
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) p[i] = pack2<Element>(s[2 * i], s[2 * i + 1]);
  }

  // Log-sum-exp of row r, whose probabilities add up to `total`; NaN if that is.
  __device__ float lse(int r, float total) const {
    if (total == 0.f) return -kInfinity;
    // The reference of the sum is the rounded product of maximum and scale.
    const float rounding = fmaf(-maximum[r], scale_log2, exponent(maximum[r]));
    return fmaf(maximum[r], scale, (__log2f(total) + rounding) * kLn2);
  }
};

}  // namespace star_attention::sm90
