// In 16 bits, a thread takes two packs of 8 outputs of one row, all its loads in flight before the
// first use. In FP8, a block takes a row.
#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "layers/fp8_row.cuh"
#include "star_attention/layers.h"

namespace star_attention {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 2;

// In `gate`.
template <typename T>
__device__ void silu_mul(Pack<T, 8>& gate, const Pack<T, 8>& up) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float x = to_float(gate.v[j]);
    gate.v[j] = from_float<T>(x / (1.f + __expf(-x)) * to_float(up.v[j]));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(const SiluMulParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(p.gate_up) + row * p.stride;
  const T* up = gate + p.intermediate_size;
  T* out = static_cast<T*>(p.out) + row * p.intermediate_size;
  const int first = 8 * (blockIdx.y * kThreads * kPacks + threadIdx.x);

  Pack<T, 8> g[kPacks], u[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = first + 8 * k * kThreads;
    if (i >= p.intermediate_size) break;
    g[k] = load_pack<T, 8>(gate + i);
    u[k] = load_pack<T, 8>(up + i);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = first + 8 * k * kThreads;
    if (i >= p.intermediate_size) break;
    silu_mul(g[k], u[k]);
    store_pack(out + i, g[k]);
  }
}

template <typename T>
__global__ void __launch_bounds__(1024) silu_mul_fp8_kernel(const SiluMulParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(p.gate_up) + row * p.stride;
  const T* up = gate + p.intermediate_size;

  Pack<T, 8> g[kRowPacks], u[kRowPacks];
#pragma unroll
  for (int k = 0; k < kRowPacks; ++k) {
    const int i = 8 * (threadIdx.x + k * blockDim.x);
    if (i >= p.intermediate_size) break;
    g[k] = load_pack<T, 8>(gate + i);
    u[k] = load_pack<T, 8>(up + i);
  }
#pragma unroll
  for (int k = 0; k < kRowPacks; ++k) {
    if (8 * (threadIdx.x + k * blockDim.x) >= p.intermediate_size) break;
    silu_mul(g[k], u[k]);
  }
  store_fp8_row(g, p.intermediate_size, static_cast<uint8_t*>(p.out) + row * p.intermediate_size,
                p.scales + row);
}

}  // namespace

void check(const SiluMulParams& p) {
  require(p.dtype != DType::kFloat32, "gate_up.dtype", name_of(p.dtype), "float16 or bfloat16");
  require(p.intermediate_size > 0 && p.intermediate_size % 8 == 0, "intermediate_size",
          p.intermediate_size, "a multiple of 8");
  require(!p.scales || p.intermediate_size <= kMaxRowWidth, "intermediate_size",
          p.intermediate_size, "at most " + std::to_string(kMaxRowWidth) + " in FP8");
  require(p.stride % 8 == 0, "gate_up.stride(0)", p.stride, "a multiple of 8 elements");
  require(p.num_tokens >= 0, "num_tokens", p.num_tokens, "at least 0");
  if (p.num_tokens == 0) return;
  require_pointer(p.gate_up, "gate_up", 16);
  require_pointer(p.out, "out", p.scales ? 8 : 16);
}

void silu_mul(const SiluMulParams& p, cudaStream_t stream) {
  check(p);
  if (p.num_tokens == 0) return;
  if (p.scales) {
    dispatch_16bit(p.dtype, [&](auto element) {
      launch_dependent(silu_mul_fp8_kernel<decltype(element)>, p.num_tokens,
                       row_threads(p.intermediate_size), 0, stream, "silu_mul", p);
    });
    return;
  }
  constexpr int kPerBlock = 8 * kThreads * kPacks;
  const dim3 grid(p.num_tokens, (p.intermediate_size + kPerBlock - 1) / kPerBlock);
  dispatch_16bit(p.dtype, [&](auto element) {
    launch_dependent(silu_mul_kernel<decltype(element)>, grid, kThreads, 0, stream, "silu_mul", p);
  });
}

}  // namespace star_attention
