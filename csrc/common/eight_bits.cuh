// 8-bit codes of KV: float32 to code, and codes to float16, which holds each of them exactly.
#pragma once

#include <cuda_fp8.h>

#include "common/numeric.cuh"

namespace star_attention {

// Elements of 8-bit pages. `kLargest` is what a page's largest value becomes.
struct Float8 {  // e4m3
  static constexpr float kLargest = 448.f;

  static __device__ uint8_t from_float(float x) {
    return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  }

  // Bytes 0 and 1, and 2 and 3.
  static __device__ void to_half(uint32_t codes, uint32_t& lo, uint32_t& hi) {
#if __CUDA_ARCH__ >= 890
    asm("{\n"
        ".reg .b16 first, second;\n"
        "mov.b32 {first, second}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, first;\n"
        "cvt.rn.f16x2.e4m3x2 %1, second;\n"
        "}"
        : "=r"(lo), "=r"(hi)
        : "r"(codes));
#else
    lo = widen(__byte_perm(codes, 0, 0x1404));
    hi = widen(__byte_perm(codes, 0, 0x3424));
#endif
  }

 private:
  // Codes in the upper bytes. Exponents have 4 bits with a bias of 7, those of float16 5 with 15.
  static __device__ uint32_t widen(uint32_t codes) {
    const uint32_t bits = (codes & 0x80008000) | (codes >> 1 & 0x3f803f80);
    const __half2 x = __hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(256.f));
    return reinterpret_cast<const uint32_t&>(x);
  }
};

struct Int8 {
  static constexpr float kLargest = 127.f;

  static __device__ uint8_t from_float(float x) {
    return static_cast<uint8_t>(max(-127, min(127, __float2int_rn(x))));
  }

  static __device__ void to_half(uint32_t codes, uint32_t& lo, uint32_t& hi) {
    const uint32_t biased = codes ^ 0x80808080;  // 0 to 255
    lo = widen(__byte_perm(biased, 0x64646464, 0x4140));
    hi = widen(__byte_perm(biased, 0x64646464, 0x4342));
  }

 private:
  // 1024 + 128 + code in float16.
  static __device__ uint32_t widen(uint32_t bits) {
    const __half2 x = __hsub2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(1152.f));
    return reinterpret_cast<const uint32_t&>(x);
  }
};

// Calls f with a Float8 or an Int8.
template <typename F>
void dispatch_8bit(DType dtype, F&& f) {
  if (dtype == DType::kFloat8) {
    f(Float8{});
  } else {
    f(Int8{});
  }
}

}  // namespace star_attention
