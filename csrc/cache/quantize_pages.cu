// A block quantises two neighbours, plane after plane (the keys or values of a KV head): what is
// written is where planes were that it has read already, and each plane is in registers before any
// of it is overwritten.
#include "common/check.h"
#include "common/eight_bits.cuh"
#include "star_attention/quantize_pages.h"

namespace star_attention {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 8;  // elements that a thread moves at once

template <typename T>
__device__ T* page_at(const QuantizePagesParams& p, int64_t page, int pages_of_pool) {
  const int64_t elements = int64_t{2} * p.num_kv_heads * p.tokens_per_block * p.head_dim;
  return static_cast<T*>(p.kv_pool) + (int64_t{blockIdx.y} * pages_of_pool + page) * elements;
}

__device__ float* scales_of(const QuantizePagesParams& p, int64_t page) {
  return p.scales + (int64_t{blockIdx.y} * 2 * p.num_pages + page) * 2 * p.num_kv_heads;
}

// The larger halves of both; those of magnitudes, so that a NaN is largest.
__device__ inline uint32_t max_halves(uint32_t a, uint32_t b) {
  return max(a & 0xffff0000, b & 0xffff0000) | max(a & 0xffff, b & 0xffff);
}

template <typename T>
__device__ float magnitude(uint32_t bits) {
  const uint16_t half = static_cast<uint16_t>(bits);
  return to_float(reinterpret_cast<const T&>(half));
}

template <typename T, typename Kv, int kVectors>
__global__ void __launch_bounds__(kThreads) quantize_pages_kernel(const QuantizePagesParams p) {
  __shared__ uint32_t largest[2][kWarps];
  const int first = blockIdx.x * 2, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int plane_elements = p.tokens_per_block * p.head_dim;
  int turn = 0;
  for (int half = 0; half < 2 && first + half < p.count; ++half) {
    const int64_t to = int64_t{p.pages[first]} * 2 + half;
    const T* source = page_at<const T>(p, p.pages[first + half], p.num_pages);
    uint8_t* codes = page_at<uint8_t>(p, to, 2 * p.num_pages);
    float* scales = scales_of(p, to);
    const int valid = p.others[first + half] * p.head_dim;  // elements of a plane
    for (int plane = 0; plane < 2 * p.num_kv_heads; ++plane, turn ^= 1) {
      uint4 x[kVectors];
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int element = (i * kThreads + threadIdx.x) * kVector;
        x[i] = uint4{};
        if (element < valid) {
          x[i] = *reinterpret_cast<const uint4*>(source + plane * plane_elements + element);
        }
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        for (const uint32_t pair : {x[i].x, x[i].y, x[i].z, x[i].w}) {
          most = max_halves(most, pair & 0x7fff7fff);
        }
      }
      most = __reduce_max_sync(~0u, max(most >> 16, most & 0xffff));
      if (lane == 0) largest[turn][warp] = most;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kWarps; ++w) most = max(most, largest[turn][w]);
      const float scale = most == 0 ? 1.f : magnitude<T>(most) / Kv::kLargest;
      if (threadIdx.x == 0) scales[plane] = scale;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int element = (i * kThreads + threadIdx.x) * kVector;
        const Pack<T, kVector>& values = reinterpret_cast<const Pack<T, kVector>&>(x[i]);
        Pack<uint8_t, kVector> out;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          out.v[k] = Kv::from_float(to_float(values.v[k]) / scale);
        }
        store_pack(codes + plane * plane_elements + element, out);
      }
    }
  }
}

template <typename T, typename Kv>
__global__ void __launch_bounds__(kThreads) dequantize_pages_kernel(const QuantizePagesParams p) {
  const int plane_elements = p.tokens_per_block * p.head_dim, plane = blockIdx.z;
  const int64_t page = p.pages[blockIdx.x];
  const uint8_t* codes = page_at<const uint8_t>(p, page, 2 * p.num_pages) + plane * plane_elements;
  T* out = page_at<T>(p, p.others[blockIdx.x], p.num_pages) + plane * plane_elements;
  const float scale = scales_of(p, page)[plane];
  for (int element = threadIdx.x * 4; element < plane_elements; element += kThreads * 4) {
    uint32_t pairs[2];
    Kv::to_half(*reinterpret_cast<const uint32_t*>(codes + element), pairs[0], pairs[1]);
    Pack<T, 4> values;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const __half2 pair = reinterpret_cast<const __half2&>(pairs[k / 2]);
      values.v[k] = from_float<T>(to_float(k % 2 ? __high2half(pair) : __low2half(pair)) * scale);
    }
    store_pack(out + element, values);
  }
}

void check(const QuantizePagesParams& p) {
  require(p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16, "kv_pool.dtype",
          name_of(p.dtype), "float16 or bfloat16");
  require(p.kv_dtype == DType::kFloat8 || p.kv_dtype == DType::kInt8, "kv_dtype",
          name_of(p.kv_dtype), "float8_e4m3 or int8");
  require(p.num_layers > 0, "num_layers", p.num_layers, "at least 1");
  require(p.num_kv_heads > 0, "num_kv_heads", p.num_kv_heads, "at least 1");
  require(p.head_dim == 64 || p.head_dim == 128, "head_dim", p.head_dim, "64 or 128");
  require(p.tokens_per_block == 64 || p.tokens_per_block == 128, "tokens_per_block",
          p.tokens_per_block, "64 or 128");
  require(p.num_pages > 0 && p.num_pages <= INT32_MAX / 2, "kv_pool.shape[1]", p.num_pages,
          "at least 1 and at most 2^30 pages");
  require(p.count >= 0, "pages", p.count, "at least 0");
  if (p.count == 0) return;
  require_pointer(p.kv_pool, "kv_pool", 16);
  require_pointer(p.scales, "scales");
  require_pointer(p.pages, "pages");
  require_pointer(p.others, "others");
}

}  // namespace

void quantize_pages(const QuantizePagesParams& p, cudaStream_t stream) {
  check(p);
  if (p.count == 0) return;
  const dim3 grid((p.count + 1) / 2, p.num_layers);
  dispatch_16bit(p.dtype, [&](auto element) {
    dispatch_8bit(p.kv_dtype, [&](auto code) {
      using T = decltype(element);
      using Kv = decltype(code);
      switch (p.tokens_per_block * p.head_dim / (kThreads * kVector)) {
        case 2:
          return quantize_pages_kernel<T, Kv, 2><<<grid, kThreads, 0, stream>>>(p);
        case 4:
          return quantize_pages_kernel<T, Kv, 4><<<grid, kThreads, 0, stream>>>(p);
        default:
          return quantize_pages_kernel<T, Kv, 8><<<grid, kThreads, 0, stream>>>(p);
      }
    });
  });
  check_launch("quantize_pages");
}

void dequantize_pages(const QuantizePagesParams& p, cudaStream_t stream) {
  check(p);
  if (p.count == 0) return;
  const dim3 grid(p.count, p.num_layers, 2 * p.num_kv_heads);
  dispatch_16bit(p.dtype, [&](auto element) {
    dispatch_8bit(p.kv_dtype, [&](auto code) {
      dequantize_pages_kernel<decltype(element), decltype(code)><<<grid, kThreads, 0, stream>>>(p);
    });
  });
  check_launch("dequantize_pages");
}

}  // namespace star_attention
