// Rows in FP8 (e4m3) with a scale each. A block holds a row in registers, in packs of 8 elements
// that lie blockDim.x packs apart.
#pragma once

#include <algorithm>

#include "common/eight_bits.cuh"

namespace star_attention {

constexpr int kRowPacks = 4;  // that a thread holds at most
constexpr int kMaxRowWidth = 8 * kRowPacks * 1024;

constexpr float kLeastMagnitude = 1e-12f;  // a row of less is scaled as if it had this

// Threads of a block for rows of `width` elements.
inline int row_threads(int width) {
  const int packs = width / 8;
  const int per_thread = std::min(kRowPacks, std::max(1, packs / 256));
  return ((packs + per_thread - 1) / per_thread + 31) / 32 * 32;
}

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Of numbers that are not negative, NaN being the largest.
struct Largest {
  __device__ float operator()(float a, float b) const {
    return __uint_as_float(max(__float_as_uint(a), __float_as_uint(b)));
  }
};

// Over all threads of the block, 0 changing nothing. Once a kernel for each `Combine`.
template <typename Combine>
__device__ float block_reduce(float x, Combine combine) {
  __shared__ float partial[32];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = combine(x, __shfl_xor_sync(~0u, x, mask));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0.f;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = combine(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}

// Writes the row as the nearest multiples of *scale that e4m3 has.
template <typename T>
__device__ void store_fp8_row(const Pack<T, 8> (&packs)[kRowPacks], int width, uint8_t* out,
                              float* scale) {
  float most = 0.f;
#pragma unroll
  for (int k = 0; k < kRowPacks; ++k) {
    if (8 * (threadIdx.x + k * blockDim.x) >= width) break;
#pragma unroll
    for (int j = 0; j < 8; ++j) most = Largest{}(most, fabsf(to_float(packs[k].v[j])));
  }
  most = block_reduce(most, Largest{});
  if (most < kLeastMagnitude) most = kLeastMagnitude;
  const float inverse = Float8::kLargest / most;
#pragma unroll
  for (int k = 0; k < kRowPacks; ++k) {
    const int i = 8 * (threadIdx.x + k * blockDim.x);
    if (i >= width) break;
    Pack<uint16_t, 4> bytes;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = {to_float(packs[k].v[2 * j]) * inverse,
                           to_float(packs[k].v[2 * j + 1]) * inverse};
      bytes.v[j] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
    }
    store_pack(reinterpret_cast<uint16_t*>(out + i), bytes);
  }
  if (threadIdx.x == 0) *scale = most / Float8::kLargest;
}

}  // namespace star_attention
