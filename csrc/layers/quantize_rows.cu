// A block takes one row and keeps it in registers between the largest magnitude and the output.
#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "layers/fp8_row.cuh"
#include "star_attention/layers.h"

namespace star_attention {
namespace {

template <typename T>
__global__ void __launch_bounds__(1024) quantize_rows_kernel(const QuantizeRowsParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  Pack<T, 8> packs[kRowPacks];
#pragma unroll
  for (int k = 0; k < kRowPacks; ++k) {
    const int i = 8 * (threadIdx.x + k * blockDim.x);
    if (i >= p.width) break;
    packs[k] = load_pack<T, 8>(x + i);
  }
  store_fp8_row(packs, p.width, static_cast<uint8_t*>(p.out) + row * p.width, p.scales + row);
}

}  // namespace

void check(const QuantizeRowsParams& p) {
  require(p.dtype != DType::kFloat32, "x.dtype", name_of(p.dtype), "float16 or bfloat16");
  require(p.width > 0 && p.width % 8 == 0 && p.width <= kMaxRowWidth, "x.shape[1]", p.width,
          "a multiple of 8, at most " + std::to_string(kMaxRowWidth));
  require(p.x_stride % 8 == 0, "x.stride(0)", p.x_stride, "a multiple of 8 elements");
  require(p.num_rows >= 0, "x.shape[0]", p.num_rows, "at least 0");
  if (p.num_rows == 0) return;
  require_pointer(p.x, "x", 16);
  require_pointer(p.out, "out", 8);
  require_pointer(p.scales, "scales", 4);
}

void quantize_rows(const QuantizeRowsParams& p, cudaStream_t stream) {
  check(p);
  if (p.num_rows == 0) return;
  dispatch_16bit(p.dtype, [&](auto element) {
    launch_dependent(quantize_rows_kernel<decltype(element)>, p.num_rows, row_threads(p.width), 0,
                     stream, "quantize_rows", p);
  });
}

}  // namespace star_attention
