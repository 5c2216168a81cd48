// Conversions between float32 and the 16-bit types, one and several elements at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>

#include "star_attention/attention.h"

namespace star_attention {

using half_t = __half;
using bfloat16_t = __nv_bfloat16;

// A running maximum before the first score. Finite, so that differences are never NaN.
constexpr float kNoMax = -FLT_MAX;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(half_t x) { return __half2float(x); }
__device__ inline float to_float(bfloat16_t x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline half_t from_float<half_t>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline bfloat16_t from_float<bfloat16_t>(float x) {
  return __float2bfloat16_rn(x);
}

// Two values in one 32-bit register, `lo` in the low half.
template <typename T>
__device__ inline uint32_t pack2(float lo, float hi);
template <>
__device__ inline uint32_t pack2<half_t>(float lo, float hi) {
  __half2 v = __floats2half2_rn(lo, hi);
  return reinterpret_cast<uint32_t&>(v);
}
template <>
__device__ inline uint32_t pack2<bfloat16_t>(float lo, float hi) {
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return reinterpret_cast<uint32_t&>(v);
}

// `kSize` consecutive elements that move as one memory access.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize < 16 ? sizeof(T) * kSize : 16) Pack {
  T v[kSize];
};

template <typename T, int kSize>
__device__ inline Pack<T, kSize> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, kSize>*>(p);
}

template <typename T, int kSize>
__device__ inline void store_pack(T* p, const Pack<T, kSize>& pack) {
  *reinterpret_cast<Pack<T, kSize>*>(p) = pack;
}

// Calls f with a value of the CUDA type that `dtype` (kFloat16 or kBFloat16) names.
template <typename F>
void dispatch_16bit(DType dtype, F&& f) {
  if (dtype == DType::kFloat16) {
    f(half_t{});
  } else {
    f(bfloat16_t{});
  }
}

inline size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat8:
    case DType::kInt8:
      return 1;
    default:
      return 2;
  }
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat8:
      return "float8_e4m3";
    case DType::kInt8:
      return "int8";
    default:
      return "float32";
  }
}

}  // namespace star_attention
