// A product with the few rows of a decode step and weights in FP8, which are widened to x's type,
// so that nothing of x is lost. A block takes 16 rows of the weights at a time, and each of its
// warps a part of their columns. Weights go from global memory to registers: while a warp works on
// some, the next ones are on their way, also those of the block's next rows, and the first ones
// before the kernel in front, which makes x, has ended. Tensor cores multiply, x's rows being the
// columns of their products. What the warps sum up is added up in shared memory.
#include <algorithm>

#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/device.h"
#include "common/sm80_ptx.cuh"
#include "layers/skinny_linear_fp8.h"

namespace star_attention {
namespace {

constexpr int kWarps = 16;
constexpr int kRows = 16;
constexpr int kMaxTokens = 8;
constexpr int kStep = 64;  // columns that a warp reads at a time: 16 bytes a lane, of two rows
constexpr int kSteps = 4;  // that are on their way together
constexpr int kPartialBytes = 2 * kWarps * kMaxTokens * kRows * sizeof(float);

// From the widened exponent's bias to e4m3's.
template <typename T>
struct Widening;
template <>
struct Widening<half_t> {
  static constexpr int kShift = 1;
  static constexpr uint32_t kMask = 0x3f803f80, kFactor = 0x5c005c00;  // 2^8
};
template <>
struct Widening<bfloat16_t> {
  static constexpr int kShift = 4;
  static constexpr uint32_t kMask = 0x07f007f0, kFactor = 0x7b807b80;  // 2^120
};

__device__ inline uint32_t multiply2(uint32_t a, uint32_t b, half_t) {
  const half2 product = __hmul2(reinterpret_cast<half2&>(a), reinterpret_cast<half2&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}
__device__ inline uint32_t multiply2(uint32_t a, uint32_t b, bfloat16_t) {
  const __nv_bfloat162 product =
      __hmul2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}

// Widens the e4m3 numbers in the high bytes of both halves; exact. They are not NaN: of a row that
// had one, the scale is NaN.
template <typename T>
__device__ inline uint32_t widen_high_bytes(uint32_t bytes) {
  using W = Widening<T>;
  const uint32_t bits = ((bytes >> W::kShift) & W::kMask) | (bytes & 0x80008000);
  return multiply2(bits, W::kFactor, T{});
}

__device__ inline uint4 load_once(const uint8_t* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__host__ __device__ inline int padded(int in_features) {
  return (in_features + kStep - 1) / kStep * kStep;
}

// Bytes from one row of x to the next in shared memory: 16 more than a multiple of all banks, so
// that reads of several rows do not meet.
__host__ __device__ inline int row_bytes(int in_features) { return 2 * padded(in_features) + 16; }

// Of the weights: which a warp reads next.
struct Place {
  int row, group;

  __device__ void advance(int groups) {
    if (++group < groups) return;
    group = 0;
    row += gridDim.x * kRows;
  }
};

template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    skinny_linear_fp8_kernel(const SkinnyLinearParams p) {
  extern __shared__ __align__(16) uint8_t x[];  // rows in the order in which they are multiplied
  __shared__ float partials[2][kWarps][kMaxTokens * kRows];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int lane_row = lane / 4, lane_column = 16 * (lane % 4);
  const int x_bytes = row_bytes(p.in_features);

  // All warps have as many groups of steps, of which the last ones may be empty.
  const int steps = padded(p.in_features) / kStep, warp_steps = (steps + kWarps - 1) / kWarps;
  const int groups = (warp_steps + kSteps - 1) / kSteps;
  const int group_steps = (warp_steps + groups - 1) / groups;
  const int first_step = warp * warp_steps, end_step = min(first_step + warp_steps, steps);

  allow_next_kernel();
  Place next{static_cast<int>(blockIdx.x) * kRows, 0};
  Place here = next;
  const auto load = [&](uint4(&weights)[2][kSteps]) {
    const int first = first_step + next.group * group_steps;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int column = (first + s) * kStep + lane_column;
      const bool valid = s < group_steps && first + s < end_step && column < p.in_features;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = next.row + 8 * half + lane_row;
        weights[half][s] = valid && row < p.out_features
                               ? load_once(static_cast<const uint8_t*>(p.weight) +
                                           int64_t{row} * p.in_features + column)
                               : uint4{};
      }
    }
    next.advance(groups);
  };
  uint4 even[2][kSteps], odd[2][kSteps];
  load(even);
  load(odd);

  wait_for_previous_kernel();
  for (int t = 0; t < p.num_tokens; ++t) {
    const T* source = static_cast<const T*>(p.x) + t * p.x_stride;
#pragma unroll 4
    for (int i = 8 * threadIdx.x; i < padded(p.in_features); i += 8 * 32 * kWarps) {
      uint4 v{};
      if (i < p.in_features) v = *reinterpret_cast<const uint4*>(source + i);
      // Of four elements, the first with the third one, as the bytes of weights are widened.
      *reinterpret_cast<uint4*>(x + t * x_bytes + 2 * i) = {
          __byte_perm(v.x, v.y, 0x5410), __byte_perm(v.x, v.y, 0x7632),
          __byte_perm(v.z, v.w, 0x5410), __byte_perm(v.z, v.w, 0x7632)};
    }
  }
  __syncthreads();

  float sums[4] = {};
  int turn = 0;  // of the block's rows
  const auto multiply = [&](const uint4(&weights)[2][kSteps]) {
    const int first = first_step + here.group * group_steps;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= group_steps || first + s >= end_step) break;
      uint4 columns[2] = {};
      if (lane_row < p.num_tokens) {
        const auto* source = reinterpret_cast<const uint4*>(
            x + lane_row * x_bytes + 2 * ((first + s) * kStep + lane_column));
        columns[0] = source[0];
        columns[1] = source[1];
      }
      const uint32_t b[8] = {columns[0].x, columns[0].y, columns[0].z, columns[0].w,
                             columns[1].x, columns[1].y, columns[1].z, columns[1].w};
      const uint32_t upper[4] = {weights[0][s].x, weights[0][s].y, weights[0][s].z,
                                 weights[0][s].w};
      const uint32_t lower[4] = {weights[1][s].x, weights[1][s].y, weights[1][s].z,
                                 weights[1][s].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t a[4] = {widen_high_bytes<T>(upper[i] << 8),
                               widen_high_bytes<T>(lower[i] << 8), widen_high_bytes<T>(upper[i]),
                               widen_high_bytes<T>(lower[i])};
        ptx::mma_16816<T>(sums, a, b[2 * i], b[2 * i + 1]);
      }
    }
    const int row = here.row;
    here.advance(groups);
    if (here.row == row) return;

    float (&sum)[kWarps][kMaxTokens * kRows] = partials[turn % 2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 2 * (lane % 4) + i % 2;
      if (token < p.num_tokens) sum[warp][token * kRows + 8 * (i / 2) + lane_row] = sums[i];
      sums[i] = 0.f;
    }
    __syncthreads();  // also: what was written here two turns ago has been read
    if (warp == turn % kWarps) {
      for (int i = lane; i < p.num_tokens * kRows; i += 32) {
        const int token = i / kRows, out_row = row + i % kRows;
        if (out_row >= p.out_features) continue;
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += sum[w][i];
        total *= p.scales[out_row];
        const T* const addend = static_cast<const T*>(p.addend);
        if (addend) total += to_float(addend[token * p.addend_stride + out_row]);
        static_cast<T*>(p.out)[int64_t{token} * p.out_features + out_row] = from_float<T>(total);
      }
    }
    ++turn;
  };
  while (here.row < p.out_features) {
    multiply(even);
    load(even);
    if (here.row >= p.out_features) break;
    multiply(odd);
    load(odd);
  }
}

}  // namespace

int max_skinny_tokens_fp8(int in_features, int smem_per_block) {
  if (in_features <= 0 || in_features % 16 != 0) return 0;
  return std::min(kMaxTokens, (smem_per_block - kPartialBytes) / row_bytes(in_features));
}

void skinny_linear_fp8(const SkinnyLinearParams& p, cudaStream_t stream) {
  const int blocks = std::min(current_device().num_sms, (p.out_features + kRows - 1) / kRows);
  const int shared_bytes = p.num_tokens * row_bytes(p.in_features);
  dispatch_16bit(p.dtype, [&](auto element) {
    const auto kernel = skinny_linear_fp8_kernel<decltype(element)>;
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "skinny_linear");
    launch_dependent(kernel, blocks, 32 * kWarps, shared_bytes, stream, "skinny_linear", p);
  });
}

}  // namespace star_attention
