// A block takes one token. A thread takes the same 8 dimensions of both halves of a head (two
// 16-byte accesses), so a rotation pair never leaves the thread, and keeps the cosines and sines of
// its dimensions in registers while it strides over the heads of Q, K and V.
#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/numeric.cuh"
#include "star_attention/rope.h"

namespace star_attention {
namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 4;  // heads whose loads a thread issues before it needs the first

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(const RopeAppendParams p) {
  constexpr int kHalf = kHeadDim / 2;
  constexpr int kLanes = kHalf / 8;          // threads a head takes
  constexpr int kHeads = kThreads / kLanes;  // heads that are read together

  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x;
  const int dim = threadIdx.x % kLanes * 8;
  const int num_rotated = p.num_q_heads + p.num_kv_heads;
  const int num_heads = num_rotated + p.num_kv_heads;
  const int slot = p.slot_mapping[token];
  const int64_t page = slot / p.tokens_per_block;
  const int offset = slot % p.tokens_per_block;

  const float* rotary = p.rotary + int64_t{p.positions[token]} * kHeadDim + dim;
  const Pack<float, 8> cosine = load_pack<float, 8>(rotary);
  const Pack<float, 8> sine = load_pack<float, 8>(rotary + kHalf);
  const T* qkv = static_cast<const T*>(p.qkv) + token * p.qkv_stride + dim;

  for (int first = threadIdx.x / kLanes; first < num_heads; first += kInFlight * kHeads) {
    Pack<T, 8> lo[kInFlight], hi[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int head = first + k * kHeads;
      if (head >= num_heads) break;
      lo[k] = load_pack<T, 8>(qkv + head * kHeadDim);
      hi[k] = load_pack<T, 8>(qkv + head * kHeadDim + kHalf);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int head = first + k * kHeads;
      if (head >= num_heads) break;
      T* out;
      if (head < p.num_q_heads) {
        out = static_cast<T*>(p.q) + (token * p.num_q_heads + head) * kHeadDim;
      } else {
        if (slot < 0) return;
        const int plane = head - p.num_q_heads;  // the page's K heads, then its V heads
        out = static_cast<T*>(p.kv_pool) +
              ((page * 2 * p.num_kv_heads + plane) * p.tokens_per_block + offset) * kHeadDim;
      }
      if (head < num_rotated) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float x = to_float(lo[k].v[i]), y = to_float(hi[k].v[i]);
          lo[k].v[i] = from_float<T>(x * cosine.v[i] - y * sine.v[i]);
          hi[k].v[i] = from_float<T>(y * cosine.v[i] + x * sine.v[i]);
        }
      }
      store_pack(out + dim, lo[k]);
      store_pack(out + dim + kHalf, hi[k]);
    }
  }
}

}  // namespace

void check(const RopeAppendParams& p) {
  require(p.dtype != DType::kFloat32, "qkv.dtype", name_of(p.dtype), "float16 or bfloat16");
  require(p.head_dim == 64 || p.head_dim == 128, "head_dim", p.head_dim, "64 or 128");
  require(p.tokens_per_block == 64 || p.tokens_per_block == 128, "tokens_per_block",
          p.tokens_per_block, "64 or 128");
  require(p.num_q_heads > 0, "num_q_heads", p.num_q_heads, "at least 1");
  require(p.num_kv_heads > 0, "num_kv_heads", p.num_kv_heads, "at least 1");
  require(p.qkv_stride % 8 == 0, "qkv.stride(0)", p.qkv_stride, "a multiple of 8 elements");
  require(p.num_tokens >= 0, "num_tokens", p.num_tokens, "at least 0");
  if (p.num_tokens == 0) return;
  require_pointer(p.qkv, "qkv", 16);
  require_pointer(p.positions, "positions");
  require_pointer(p.rotary, "rotary", 32);
  require_pointer(p.slot_mapping, "slot_mapping");
  require_pointer(p.q, "q", 16);
  require_pointer(p.kv_pool, "kv_pool", 16);
}

void rope_append(const RopeAppendParams& p, cudaStream_t stream) {
  check(p);
  if (p.num_tokens == 0) return;
  dispatch_16bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = p.head_dim == 128 ? rope_append_kernel<T, 128> : rope_append_kernel<T, 64>;
    launch_dependent(kernel, p.num_tokens, kThreads, 0, stream, "rope_append", p);
  });
}

}  // namespace star_attention
