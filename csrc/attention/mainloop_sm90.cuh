// The main loop of the sm_90a attention kernels. One producer warp streams runs of KV tiles of 128
// tokens, from the last of a run to its first, through rings of shared-memory stages, and runs
// ahead into the next run. Two consumer warpgroups multiply 64 rows each. A step of a warpgroup:
//
//   tensor cores   S' = Q K'^T | O += P V      | (the other warpgroup's two products)
//   other units                | maximum of S' | P' = exp2(S' - maximum), row sums
//
// A pair of named barriers makes the warpgroups take turns at the tensor cores. The maximum that P
// refers to moves only when it grows by more than 2^8, so almost no step has to rescale O.
//
// The kCluster blocks of a cluster take the same runs with different rows. Each loads its part of
// every tile into all of them: reading L2 less often leaves power for the tensor cores.
//
// Which runs there are, where Q comes from and which tokens a row sees is the kernels' own.
#pragma once

#include "attention/tile_sm90.cuh"
#include "common/tensor_map.h"

namespace star_attention::sm90 {

constexpr int kBox = 64;  // tokens that one TMA instruction loads; a page holds one or two

struct KvPool {
  CUtensorMap map;    // [num_pages * 2 * num_kv_heads][tokens_per_block][head_dim]
  CUtensorMap other;  // of what is listed by numbers below 0
  const int32_t* page_table;
  int page_table_stride;
  int page_shift;  // log2 of tokens_per_block
  int num_kv_heads;
  bool by_head;

  __device__ int list_of(int seq, int kv_head) const {
    return by_head ? seq * num_kv_heads + kv_head : seq;
  }
  // The matrix of K or V that the entry of a list stands for.
  __device__ int matrix_of(int listed, int which, int kv_head) const {
    return by_head ? listed + which * num_kv_heads : (listed * 2 + which) * num_kv_heads + kv_head;
  }
};

inline KvPool make_kv_pool(const PagedAttentionParams& p) {
  const cuuint64_t head_dim = p.head_dim, page = p.tokens_per_block;
  const auto map_of = [&](const void* pool, int64_t num_pages) {
    const auto matrices = static_cast<cuuint64_t>(num_pages * 2 * p.num_kv_heads);
    return make_tensor_map(p.dtype, pool, {head_dim, page, matrices},
                           {head_dim * 2, page * head_dim * 2}, {kPanel, kBox, 1}, "kv_pool");
  };
  const CUtensorMap map = map_of(p.kv_pool, p.num_pages);
  return {map,
          p.other_pool != nullptr ? map_of(p.other_pool, p.num_other_pages) : map,
          p.page_table,
          p.page_table_stride,
          p.tokens_per_block == 64 ? 6 : 7,
          p.num_kv_heads,
          p.by_head};
}

template <int kHeadDim, int kCluster>
struct Stages {
  static constexpr int kQueryBytes = kRowsPerConsumer * kHeadDim * 2;
  static constexpr int kTileBytes = kTokens * kHeadDim * 2;

  alignas(1024) uint8_t q[kConsumers][kQueryBytes];
  alignas(1024) uint8_t k[kStages][kTileBytes];
  alignas(1024) uint8_t v[kStages][kTileBytes];
  uint64_t k_full[kStages], k_empty[kStages];
  uint64_t v_full[kStages], v_empty[kStages];
  uint64_t tail_full[kStages];  // of V tiles whose end is cleared before they are full

  __device__ void init_barriers() {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&k_full[s], 1);
      barrier_init(&k_empty[s], kCluster * kConsumerWarps);
      barrier_init(&v_full[s], 1);
      barrier_init(&tail_full[s], 1);
      barrier_init(&v_empty[s], kCluster * kConsumerWarps);
    }
  }
};

// One warp. It shares a scheduler of the multiprocessor with two consumer warps, which wait for it
// at every product, so what it does per KV tile is kept short.
template <int kHeadDim, int kCluster>
struct Producer {
  static constexpr int kBoxes = kTokens / kBox / kCluster;  // of a tile that this block loads

  const KvPool& pool;
  Stages<kHeadDim, kCluster>& shared;
  const int lane = threadIdx.x % 32;
  const int rank = kCluster > 1 ? cluster_rank() : 0;
  Cursor<kStages> k, v;
  uint32_t tail_phases = 0;  // a bit for each stage of V

  // Of the run.
  const int32_t* pages;
  int kv_len;
  int kv_head;

  // The page of the lane's box of a KV tile.
  __device__ int find_page(int tile) const {
    const int token = tile * kTokens + (rank * kBoxes + lane) * kBox;
    return lane < kBoxes && token < kv_len ? pages[token >> pool.page_shift] : 0;
  }

  // Loads this block's boxes of a KV tile; those that begin behind kv_len are left out.
  __device__ void load_boxes(int tile, int page, int which, uint8_t* destination,
                             uint64_t* full) const {
    const bool leader = elect_one();
    const int tokens = min(kTokens, kv_len - tile * kTokens);
    if (leader) barrier_arrive_expect(full, ceil_div(tokens, kBox) * kBox * kHeadDim * 2);
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      const int first = (rank * kBoxes + i) * kBox;  // of the tile's tokens
      const int token = (tile * kTokens + first) & ((1 << pool.page_shift) - 1);
      const int listed = __shfl_sync(~0u, page, i);
      const CUtensorMap* map = listed < 0 ? &pool.other : &pool.map;
      const int matrix = pool.matrix_of(listed < 0 ? ~listed : listed, which, kv_head);
      if (!leader || first >= tokens) continue;
#pragma unroll
      for (int d = 0; d < kHeadDim; d += kPanel) {
        uint8_t* box = destination + (d * kTokens + first * kPanel) * 2;
        if constexpr (kCluster > 1) {
          tma_load_multicast(box, map, full, (1 << kCluster) - 1, d, token, matrix);
        } else {
          tma_load(box, map, full, d, token, matrix);
        }
      }
    }
  }

  __device__ void load_k(int tile, int page) {
    barrier_wait(&shared.k_empty[k.stage], k.phase ^ 1);
    load_boxes(tile, page, 0, shared.k[k.stage], &shared.k_full[k.stage]);
    k.advance();
  }

  __device__ void load_v(int tile, int page) {
    barrier_wait(&shared.v_empty[v.stage], v.phase ^ 1);
    const int tokens = kv_len - tile * kTokens;
    if (tokens >= kTokens) {
      load_boxes(tile, page, 1, shared.v[v.stage], &shared.v_full[v.stage]);
    } else {
      load_boxes(tile, page, 1, shared.v[v.stage], &shared.tail_full[v.stage]);
      barrier_wait(&shared.tail_full[v.stage], tail_phases >> v.stage & 1);
      tail_phases ^= 1 << v.stage;
      clear_tail<kHeadDim>(shared.v[v.stage], tokens);
      if (lane == 0) barrier_arrive(&shared.v_full[v.stage]);
    }
    v.advance();
  }

  // The KV tiles [begin, end), at least one, of a sequence's KV head. Calls load_q() when the first
  // K is on its way.
  template <class LoadQ>
  __device__ void load(int seq, int head, int tokens, int begin, int end, LoadQ load_q) {
    pages = pool.page_table + int64_t{pool.list_of(seq, head)} * pool.page_table_stride;
    kv_len = tokens;
    kv_head = head;

    int tile = __shfl_sync(~0u, end, 0) - 1;
    int page = find_page(tile);
    load_k(tile, page);
    load_q();
#pragma unroll 1
    for (; tile > begin; --tile) {
      const int next_page = find_page(tile - 1);
      load_k(tile - 1, next_page);
      load_v(tile, page);
      page = next_page;
    }
    load_v(begin, page);
  }
};

// Lane t of a quad holds x[n], its pair of column block n; afterwards all four pairs of block t.
__device__ inline void quad_transpose(uint32_t (&x)[4], int t) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = t & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? x[i] : x[i | bit], bit);
      (upper ? x[i] : x[i | bit]) = other;
    }
  }
}

// One of the warpgroups.
template <class Element, int kHeadDim, int kCluster>
struct Consumer {
  Stages<kHeadDim, kCluster>& shared;
  const int id;
  const int warp = threadIdx.x % kWarpgroup / 32;
  const int lane = threadIdx.x % 32;
  const int warp_row = id * kRowsPerConsumer + warp * 16;  // of the block's rows
  const int row = warp_row + lane / 4;
  Cursor<kStages> k, v;

  // Before the first run.
  __device__ void open_turns() const {
    if (id == kConsumers - 1) pass_turn(id);
  }

  // All blocks write to a stage, so that all need to know.
  __device__ void release_stage(uint64_t* barrier) {
    if constexpr (kCluster == 1) {
      warp_arrive(barrier);
    } else {
      __syncwarp();
      if (lane < kCluster) barrier_arrive(barrier, lane);
    }
  }

  // `rows` says what is the kernels' own: await_q() returns when Q is in shared memory, release_q()
  // comes after its last use; row r of the block sees the first limit(r) tokens, all of the warp's
  // rows the first warp_limit(), but none before start(r), which is last_start() at most and not
  // called where that is 0.
  template <class Rows>
  __device__ __forceinline__ void mask(float (&s)[kTokens / 2], const Rows& rows, int tile) const {
    const int first = tile * kTokens;
    if (__builtin_expect(first + kTokens > rows.warp_limit(), false)) {
      mask_scores(s, {rows.limit(row) - first, rows.limit(row + 8) - first},
                  [](int token, int limit) { return token >= limit; });
    }
    if (__builtin_expect(first < rows.last_start(), false)) {
      mask_scores(s, {rows.start(row) - first, rows.start(row + 8) - first},
                  [](int token, int start) { return token < start; });
    }
  }

  // Attends to the KV tiles [begin, end), at least one. Afterwards o is to be divided by the
  // softmax's sums.
  template <class Rows>
  __device__ __forceinline__ void attend(const Rows& rows, int begin, int end, Softmax& softmax,
                                         float (&o)[kHeadDim / 2]) {
    float s[kTokens / 2];
    uint32_t p[kTokens / 4];
    float correction[2];

    rows.await_q();
    barrier_wait(&shared.k_full[k.stage], k.phase);
    multiply_qk<Element, kHeadDim>(s, shared.q[id], shared.k[k.stage]);
    wgmma_wait<0>();
    pin_registers(s);
    release_stage(&shared.k_empty[k.stage]);
    k.advance();
    if (end - begin == 1) rows.release_q();
    mask(s, rows, end - 1);
    softmax.find_reference(s, correction);
    softmax.exponentiate<Element>(s, p);

    for (int tile = end - 2; tile >= begin; --tile) {
      barrier_wait(&shared.k_full[k.stage], k.phase);
      await_turn(id);
      multiply_qk<Element, kHeadDim>(s, shared.q[id], shared.k[k.stage]);
      barrier_wait(&shared.v_full[v.stage], v.phase);
      multiply_pv<Element>(o, p, shared.v[v.stage]);
      pass_turn(id);

      wgmma_wait<1>();
      pin_registers(s);
      release_stage(&shared.k_empty[k.stage]);
      k.advance();
      if (tile == begin) rows.release_q();
      mask(s, rows, tile);
      softmax.find_reference(s, correction);
      const bool grew = correction[0] != 1.f || correction[1] != 1.f;
      if (__builtin_expect(__any_sync(~0u, grew), false)) {
        wgmma_wait<0>();
        pin_registers(o);
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= correction[i / 2 % 2];
      }
      wgmma_wait<0>();
      pin_registers(o);
      pin_registers(p);
      release_stage(&shared.v_empty[v.stage]);
      v.advance();
      softmax.exponentiate<Element>(s, p);
    }

    barrier_wait(&shared.v_full[v.stage], v.phase);
    multiply_pv<Element>(o, p, shared.v[v.stage]);
    wgmma_wait<0>();
    pin_registers(o);
    release_stage(&shared.v_empty[v.stage]);
    v.advance();
  }

  // Writes the warpgroup's rows of the block's first `num_rows`; index(r) is where row r goes.
  template <class Index>
  __device__ void store(const Softmax& softmax, float (&o)[kHeadDim / 2], const RowsOut& out,
                        int num_rows, Index index) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool valid = row + 8 * r < num_rows;
      const int64_t position = index(row + 8 * r);
      const float sum = quad_sum(softmax.sum[r]);
      const bool empty = sum == 0.f;  // o may be 0 * NaN
      const float inverse = __fdividef(1.f, sum);
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
        for (int j = i * 4 + 2 * r; j < i * 4 + 2 * r + 2; ++j) o[j] = empty ? 0.f : o[j] * inverse;
      }

      if (valid && lane % 4 == 0) out.lse[position] = softmax.lse(r, sum);

      const int t = lane % 4;
      if (out.float32) {
        float* to = static_cast<float*>(out.o) + position * kHeadDim + t * 2;
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
          if (valid) {
            *reinterpret_cast<float2*>(to + i * 8) =
                make_float2(o[i * 4 + 2 * r], o[i * 4 + 2 * r + 1]);
          }
        }
      } else {
        Element* to = static_cast<Element*>(out.o) + position * kHeadDim + t * 8;
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; i += 4) {
          uint32_t x[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int pair = (i + n) * 4 + 2 * r;
            x[n] = pack2<Element>(o[pair], o[pair + 1]);
          }
          quad_transpose(x, t);
          if (valid) *reinterpret_cast<uint4*>(to + i * 8) = make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
    }
  }
};

}  // namespace star_attention::sm90
