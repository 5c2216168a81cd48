// A block takes one row and keeps it in registers between the sum of squares and the output.
#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "layers/fp8_row.cuh"
#include "star_attention/layers.h"

namespace star_attention {
namespace {

template <typename T>
__global__ void rms_norm_kernel(const RmsNormParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);

  Pack<T, 8> pack[kRowPacks];
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < kRowPacks; ++k) {
    const int i = 8 * (threadIdx.x + k * blockDim.x);
    if (i >= p.hidden_size) break;
    pack[k] = load_pack<T, 8>(x + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += to_float(pack[k].v[j]) * to_float(pack[k].v[j]);
  }
  const float scale = rsqrtf(block_reduce(sum, Sum{}) / p.hidden_size + p.eps);
#pragma unroll
  for (int k = 0; k < kRowPacks; ++k) {
    const int i = 8 * (threadIdx.x + k * blockDim.x);
    if (i >= p.hidden_size) break;
    const Pack<T, 8> w = load_pack<T, 8>(weight + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      pack[k].v[j] = from_float<T>(to_float(pack[k].v[j]) * scale * to_float(w.v[j]));
    }
    if (!p.scales) store_pack(static_cast<T*>(p.out) + row * p.hidden_size + i, pack[k]);
  }
  if (p.scales) {
    store_fp8_row(pack, p.hidden_size, static_cast<uint8_t*>(p.out) + row * p.hidden_size,
                  p.scales + row);
  }
}

}  // namespace

void check(const RmsNormParams& p) {
  require(p.dtype != DType::kFloat32, "x.dtype", name_of(p.dtype), "float16 or bfloat16");
  require(p.hidden_size > 0 && p.hidden_size % 8 == 0 && p.hidden_size <= kMaxRowWidth,
          "hidden_size", p.hidden_size, "a multiple of 8, at most " + std::to_string(kMaxRowWidth));
  require(p.x_stride % 8 == 0, "x.stride(0)", p.x_stride, "a multiple of 8 elements");
  require(p.num_tokens >= 0, "num_tokens", p.num_tokens, "at least 0");
  if (p.num_tokens == 0) return;
  require_pointer(p.x, "x", 16);
  require_pointer(p.weight, "weight", 16);
  require_pointer(p.out, "out", p.scales ? 8 : 16);
}

void rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  check(p);
  if (p.num_tokens == 0) return;
  dispatch_16bit(p.dtype, [&](auto element) {
    launch_dependent(rms_norm_kernel<decltype(element)>, p.num_tokens, row_threads(p.hidden_size),
                     0, stream, "rms_norm", p);
  });
}

}  // namespace star_attention
