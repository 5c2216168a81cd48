// How attention kernels number rows and sequences.
//
// The query heads of a KV group are packed: row r of a sequence is query token r / group with head
// kv_head * group + r % group, so that one tile serves all heads that share K and V.
#pragma once

#include "common/numeric.cuh"
#include "star_attention/attention.h"

namespace star_attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Which list of pages, and of lengths.
__device__ inline int list_of(const PagedAttentionParams& p, int seq, int kv_head) {
  return p.by_head ? seq * p.num_kv_heads + kv_head : seq;
}

// The list's length, bounded by what the host sized the launch for.
__device__ inline int kv_len_of(const PagedAttentionParams& p, int list) {
  return min(p.kv_lens[list], p.max_kv_len);
}

__device__ inline int num_tokens_of(const PagedAttentionParams& p, int seq) {
  return p.cu_seqlens_q[seq + 1] - p.cu_seqlens_q[seq];
}

struct SequenceRows {
  int kv_head;
  int group;        // query heads of a KV head
  int first_token;  // of the sequence, in q
  int num_tokens;
  int kv_len;

  __device__ SequenceRows(const PagedAttentionParams& p, int seq, int kv_head)
      : kv_head(kv_head),
        group(p.num_q_heads / p.num_kv_heads),
        first_token(p.cu_seqlens_q[seq]),
        num_tokens(p.cu_seqlens_q[seq + 1] - first_token),
        kv_len(kv_len_of(p, list_of(p, seq, kv_head))) {}

  __device__ int count() const { return num_tokens * group; }

  // A row sees the first `limit` tokens of the page list: none if it is negative. Rows that do not
  // exist see no more than all.
  __device__ int limit(const PagedAttentionParams& p, int row) const {
    return p.causal ? min(kv_len, kv_len - (num_tokens - 1 - row / group)) : kv_len;
  }

  // It sees none before this one. The row exists.
  __device__ int start(const PagedAttentionParams& p, int row) const {
    return p.starts == nullptr ? 0 : p.starts[first_token + row / group];
  }

  template <typename T>
  __device__ const T* q(const PagedAttentionParams& p, int row) const {
    return static_cast<const T*>(p.q) + (first_token + row / group) * p.q_stride +
           (kv_head * group + row % group) * p.head_dim;
  }

  // Index into [num_tokens, num_q_heads] of o and lse.
  __device__ int64_t out(const PagedAttentionParams& p, int row) const {
    return int64_t{first_token + row / group} * p.num_q_heads + kv_head * group + row % group;
  }
};

// Where rows of o and lse go: the output of a call, or partials.
struct RowsOut {
  void* o;
  float* lse;
  bool float32;  // o is so, and not of the kernel's 16-bit type
};

__host__ __device__ inline RowsOut output_of(const PagedAttentionParams& p) {
  return {p.o, p.lse, p.o_dtype == DType::kFloat32};
}

// Stores two neighbours of o.
template <typename T>
__device__ inline void store_pair(const RowsOut& out, int64_t element, float x, float y) {
  if (out.float32) {
    store_pack(static_cast<float*>(out.o) + element, Pack<float, 2>{x, y});
  } else {
    store_pack(static_cast<T*>(out.o) + element, Pack<T, 2>{from_float<T>(x), from_float<T>(y)});
  }
}

struct SequencePosition {
  int seq;     // num_seqs if the index is past the end
  int offset;  // of the index in the sequence
  int count;   // of the sequence
};

// Finds the sequence that holds `index` when sequence s has count(s) entries. Whole warps call it.
template <typename Count>
__device__ SequencePosition locate(int num_seqs, int index, Count count) {
  const int lane = threadIdx.x % 32;
  for (int base = 0; base < num_seqs; base += 32) {
    const int own = base + lane < num_seqs ? count(base + lane) : 0;
    int end = own;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int below = __shfl_up_sync(~0u, end, delta);
      if (lane >= delta) end += below;
    }
    const unsigned holds = __ballot_sync(~0u, index < end);
    if (holds) {
      const int source = __ffs(holds) - 1;
      const int own_count = __shfl_sync(~0u, own, source);
      const int own_end = __shfl_sync(~0u, end, source);
      return {base + source, index - (own_end - own_count), own_count};
    }
    index -= __shfl_sync(~0u, end, 31);
  }
  return {num_seqs, 0, 0};
}

template <typename Count>
__device__ int sum_over_sequences(int num_seqs, Count count) {
  int sum = 0;
  for (int seq = threadIdx.x % 32; seq < num_seqs; seq += 32) sum += count(seq);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  return sum;
}

}  // namespace star_attention
