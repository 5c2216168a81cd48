// Context attention for sm_90a: persistent, warp-specialised, TMA and wgmma.
//
// A work tile is 128 query rows of one head. One producer warp takes work tiles from a counter,
// heaviest first and one KV head after the other, so that the blocks in flight share K and V in
// L2, and streams K and V pages through two rings of shared-memory stages. It runs ahead into the
// next work tile while the consumers finish theirs.
//
// Two consumer warpgroups own 64 rows each. A step of a warpgroup, from the last KV tile to the
// first, so that masked tiles come first:
//
//   tensor cores   S' = Q K'^T | O += P V      | (the other warpgroup's two products)
//   other units                | maximum of S' | P' = exp2(S' - maximum), row sums
//
// A pair of named barriers makes the warpgroups take turns at the tensor cores. The maximum that P
// refers to moves only when it grows by more than 2^8, so almost no step has to rescale O.

#include <algorithm>
#include <limits>

#include "attention/context_sm90.h"
#include "attention/rows.cuh"
#include "common/check.h"
#include "common/device.h"
#include "common/numeric.cuh"
#include "common/sm90.cuh"
#include "common/tensor_map.h"

namespace star_attention {
namespace {

using namespace sm90;

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kRowsPerConsumer = 64;
constexpr int kRows = kConsumers * kRowsPerConsumer;
constexpr int kTokens = 128;  // of a KV tile
constexpr int kStages = 3;
constexpr int kPanel = 64;  // columns in a 128-byte row of shared memory
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * 4;
constexpr float kMaxGrowth = 8.f;  // log2 of the largest P
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Arguments {
  CUtensorMap q;   // [num_tokens][num_q_heads][head_dim]
  CUtensorMap kv;  // [num_pages * 2 * num_kv_heads][tokens_per_block][head_dim]
  const int32_t* page_table;
  const int32_t* cu_seqlens_q;
  const int32_t* kv_lens;
  void* o;
  float* lse;
  int* counter;
  int page_table_stride;
  int num_seqs;
  int max_kv_len;
  int num_q_heads;
  int num_kv_heads;
  int page_shift;  // log2 of tokens_per_block
  bool causal;
  bool float_output;
  float scale;
};

// What the consumers need to know of a work tile. Row r sees the tokens before
// min(kv_len, limit + r * causal).
struct WorkTile {
  int seq;
  int head;
  int token;  // row of q, o and lse that the tile's first row is
  int rows;   // that exist
  int kv_len;
  int limit;
  int kv_tiles;  // -1: no more work
};

template <int kHeadDim>
struct Shared {
  static constexpr int kQueryBytes = kRowsPerConsumer * kHeadDim * 2;
  static constexpr int kTileBytes = kTokens * kHeadDim * 2;

  alignas(1024) uint8_t q[kConsumers][kQueryBytes];
  alignas(1024) uint8_t k[kStages][kTileBytes];
  alignas(1024) uint8_t v[kStages][kTileBytes];
  uint64_t q_full[kConsumers], q_empty[kConsumers];
  uint64_t k_full[kStages], k_empty[kStages];
  uint64_t v_full[kStages], v_empty[kStages];
  uint64_t work_full[2], work_empty[2];
  uint64_t tail_full;
  WorkTile work[2];
};

// Position in a ring of stages: a stage's barriers complete one phase a round.
template <int kSize>
struct Cursor {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == kSize) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Maps the ever growing work index of a block to work tiles, sequence after sequence.
struct Scheduler {
  const Arguments& args;
  int seq = 0;
  int first_index = 0;  // of the sequence

  __device__ WorkTile find(int index) {
    for (; seq < args.num_seqs; ++seq) {
      const int token = args.cu_seqlens_q[seq];
      const int q_len = args.cu_seqlens_q[seq + 1] - token;
      const int row_tiles = ceil_div(q_len, kRows);
      const int count = row_tiles * args.num_q_heads;
      if (index - first_index < count) {
        return locate(index - first_index, token, q_len, row_tiles);
      }
      first_index += count;
    }
    WorkTile none{};
    none.kv_tiles = -1;
    return none;
  }

  __device__ WorkTile locate(int index, int token, int q_len, int row_tiles) const {
    const int heads = args.num_q_heads / args.num_kv_heads;
    const int kv_head = index / (row_tiles * heads);
    index -= kv_head * row_tiles * heads;
    const int first_row = (row_tiles - 1 - index / heads) * kRows;

    WorkTile work;
    work.seq = seq;
    work.head = kv_head * heads + index % heads;
    work.token = token + first_row;
    work.rows = min(kRows, q_len - first_row);
    work.kv_len = min(args.kv_lens[seq], args.max_kv_len);
    work.limit = args.causal ? work.kv_len - q_len + first_row + 1 : work.kv_len;
    const int end = args.causal ? max(0, work.limit + work.rows - 1) : work.kv_len;
    work.kv_tiles = ceil_div(end, kTokens);
    return work;
  }
};

// The producer: one warp. It shares a scheduler of the SM with two consumer warps, which wait for
// it at every product, so what it does per KV tile is kept short.

template <int kHeadDim>
struct Producer {
  const Arguments& args;
  Shared<kHeadDim>& shared;
  const int lane = threadIdx.x % 32;
  Cursor<kStages> k, v;
  Cursor<1> q;
  uint32_t tail_phase = 0;

  // Of the work tile.
  const int32_t* pages;
  int kv_len;
  int kv_head;

  __device__ void load_query(const WorkTile& work) {
    for (int c = 0; c < kConsumers; ++c) {
      barrier_wait(&shared.q_empty[c], q.phase ^ 1);
      if (lane == 0) {
        barrier_arrive_expect(&shared.q_full[c], Shared<kHeadDim>::kQueryBytes);
        for (int d = 0; d < kHeadDim; d += kPanel) {
          tma_load(shared.q[c] + d * kRowsPerConsumer * 2, &args.q, &shared.q_full[c], d, work.head,
                   work.token + c * kRowsPerConsumer);
        }
      }
    }
    q.advance();
  }

  // The lane's page of those that hold a KV tile.
  __device__ int find_page(int tile) const {
    const int part = lane << args.page_shift;
    const int token = tile * kTokens + part;
    return part < kTokens && token < kv_len ? pages[token >> args.page_shift] : 0;
  }

  // Loads the pages of a KV tile that begin before kv_len.
  __device__ void load_pages(int tile, int page, int which, uint8_t* destination,
                             uint64_t* full) const {
    const bool leader = elect_one();
    const int tokens = min(kTokens, kv_len - tile * kTokens);
    const int count = (tokens + (1 << args.page_shift) - 1) >> args.page_shift;
    if (leader) barrier_arrive_expect(full, (count << args.page_shift) * kHeadDim * 2);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int matrix = (__shfl_sync(~0u, page, i) * 2 + which) * args.num_kv_heads + kv_head;
      if (!leader) continue;
#pragma unroll
      for (int d = 0; d < kHeadDim; d += kPanel) {
        tma_load(destination + (d * kTokens + (i << args.page_shift) * kPanel) * 2, &args.kv, full,
                 d, 0, matrix);
      }
    }
  }

  __device__ void load_k(int tile, int page) {
    barrier_wait(&shared.k_empty[k.stage], k.phase ^ 1);
    load_pages(tile, page, 0, shared.k[k.stage], &shared.k_full[k.stage]);
    k.advance();
  }

  __device__ void load_v(int tile, int page) {
    barrier_wait(&shared.v_empty[v.stage], v.phase ^ 1);
    const int tokens = kv_len - tile * kTokens;
    if (tokens >= kTokens) {
      load_pages(tile, page, 1, shared.v[v.stage], &shared.v_full[v.stage]);
    } else {
      // What lies behind kv_len may be NaN, and 0 * NaN would reach O.
      load_pages(tile, page, 1, shared.v[v.stage], &shared.tail_full);
      barrier_wait(&shared.tail_full, tail_phase);
      tail_phase ^= 1;
#pragma unroll 1
      for (int i = lane; i < (kTokens - tokens) * kHeadDim / 8; i += 32) {
        const int row = tokens + i / (kHeadDim / 8);
        const int column = i % (kHeadDim / 8) * 8;
        const int offset = (column / kPanel * kTokens + row) * kPanel * 2 + column % kPanel * 2;
        *reinterpret_cast<uint4*>(shared.v[v.stage] + offset) = uint4{};
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.v_full[v.stage]);
    }
    v.advance();
  }

  __device__ void load(const WorkTile& work) {
    pages = args.page_table + int64_t{work.seq} * args.page_table_stride;
    kv_len = work.kv_len;
    kv_head = work.head / (args.num_q_heads / args.num_kv_heads);

    int tile = __shfl_sync(~0u, work.kv_tiles, 0) - 1;
    int page = find_page(tile);
    load_k(tile, page);
    load_query(work);
#pragma unroll 1
    for (; tile > 0; --tile) {
      const int next_page = find_page(tile - 1);
      load_k(tile - 1, next_page);
      load_v(tile, page);
      page = next_page;
    }
    load_v(0, page);
  }

  __device__ void run() {
    Scheduler scheduler{args};
    Cursor<2> slot;
    int index = blockIdx.x;
    while (true) {
      const WorkTile work = scheduler.find(index);
      barrier_wait(&shared.work_empty[slot.stage], slot.phase ^ 1);
      if (lane == 0) {
        shared.work[slot.stage] = work;
        barrier_arrive(&shared.work_full[slot.stage]);
      }
      slot.advance();
      if (work.kv_tiles < 0) return;

      int next = 0;
      if (lane == 0) next = gridDim.x + atomicAdd(args.counter, 1);
      if (work.kv_tiles > 0) load(work);
      index = __shfl_sync(~0u, next, 0);
    }
  }
};

// The consumers. A thread holds two rows of its warp's 16, `lane / 4` and 8 below it; in every 8
// columns it has the pair 2 * (lane % 4).

// Reduces over the four lanes that share rows.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

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

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Softmax of a thread's two rows, tile after tile. The maximum is one of raw scores.
struct Softmax {
  float scale_log2;
  float maximum[2] = {-kInfinity, -kInfinity};
  float reference[2];
  float sum[2] = {};  // over the thread's own columns

  __device__ float exponent(float score) const {
    return score == -kInfinity ? 0.f : score * scale_log2;
  }

  // `correction` is what earlier results have to be scaled by.
  template <int kCount>
  __device__ void find_reference(float (&s)[kCount], float (&correction)[2]) {
    float even[2] = {s[0], s[2]}, odd[2] = {s[1], s[3]};
#pragma unroll
    for (int i = 4; i < kCount; i += 4) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        even[r] = fmaxf(even[r], s[i + 2 * r]);
        odd[r] = fmaxf(odd[r], s[i + 2 * r + 1]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float tile_maximum = quad_max(fmaxf(even[r], odd[r]));
      const float old = maximum[r];
      if ((tile_maximum - old) * scale_log2 > kMaxGrowth) maximum[r] = tile_maximum;
      reference[r] = exponent(maximum[r]);
      correction[r] = maximum[r] == old ? 1.f : exp2_fast(old * scale_log2 - reference[r]);
      sum[r] *= correction[r];
    }
  }

  // Turns scores into probabilities.
  template <int kCount>
  __device__ void exponentiate(float (&s)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int r = i / 2 % 2;
      s[i] = exp2_fast(fmaf(s[i], scale_log2, -reference[r]));
      sum[r] += s[i];
    }
  }
};

template <class Element, int kHeadDim>
struct Consumer {
  static constexpr uint32_t kTilePanelBytes = kTokens * kPanel * 2;
  static constexpr uint32_t kQueryPanelBytes = kRowsPerConsumer * kPanel * 2;

  const Arguments& args;
  Shared<kHeadDim>& shared;
  const int id;  // which of the warpgroups
  const int warp = threadIdx.x % kWarpgroup / 32;
  const int lane = threadIdx.x % 32;
  const int row = id * kRowsPerConsumer + warp * 16 + lane / 4;  // of the work tile
  Cursor<kStages> k, v;
  Cursor<1> q;

  __device__ void release(uint64_t* barrier) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  }

  __device__ void await_turn() { named_barrier_sync(1 + id, kConsumers * kWarpgroup); }
  __device__ void pass_turn() {
    named_barrier_arrive(1 + (id + 1) % kConsumers, kConsumers * kWarpgroup);
  }

  // s = Q K^T
  __device__ void multiply_qk(float (&s)[kTokens / 2]) {
    const uint64_t a = wgmma_descriptor(shared.q[id], 0);
    const uint64_t b = wgmma_descriptor(shared.k[k.stage], 0);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      const int panel = d / kPanel, bytes = d % kPanel * 2;
      wgmma_ss<Element>(s, wgmma_advance(a, panel * kQueryPanelBytes + bytes),
                        wgmma_advance(b, panel * kTilePanelBytes + bytes), d != 0);
    }
    wgmma_commit();
  }

  // o += P V
  __device__ void multiply_pv(float (&o)[kHeadDim / 2], const uint32_t (&p)[kTokens / 4]) {
    const uint64_t b = wgmma_descriptor(shared.v[v.stage], kTilePanelBytes);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < kTokens; t += 16) {
      wgmma_rs<Element>(o, p + t / 4, wgmma_advance(b, t * kPanel * 2));
    }
    wgmma_commit();
  }

  __device__ void mask(float (&s)[kTokens / 2], const WorkTile& work, int tile) {
    const int first_row = row - lane / 4;
    const int limit = min(work.kv_len, work.limit + (args.causal ? first_row : 0));
    if (__builtin_expect((tile + 1) * kTokens <= limit, true)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int limit = min(work.kv_len, work.limit + (args.causal ? row + 8 * r : 0)) -
                        tile * kTokens - lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (i * 8 + e >= limit) s[i * 4 + 2 * r + e] = -kInfinity;
        }
      }
    }
  }

  __device__ static void to_operand(const float (&s)[kTokens / 2], uint32_t (&p)[kTokens / 4]) {
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) p[i] = pack2<Element>(s[2 * i], s[2 * i + 1]);
  }

  __device__ void run() {
    Cursor<2> slot;
    if (id == kConsumers - 1) pass_turn();
    while (true) {
      barrier_wait(&shared.work_full[slot.stage], slot.phase);
      WorkTile work = shared.work[slot.stage];
      // Lets the compiler keep stages and descriptors in uniform registers.
      work.kv_tiles = __shfl_sync(~0u, work.kv_tiles, 0);
      release(&shared.work_empty[slot.stage]);
      slot.advance();
      if (work.kv_tiles < 0) return;
      attend(work);
    }
  }

  __device__ void attend(const WorkTile& work) {
    Softmax softmax{args.scale * kLog2e};
    float o[kHeadDim / 2];
#pragma unroll
    for (float& x : o) x = 0.f;

    if (work.kv_tiles > 0) {
      float s[kTokens / 2];
      uint32_t p[kTokens / 4];
      float correction[2];

      barrier_wait(&shared.q_full[id], q.phase);
      barrier_wait(&shared.k_full[k.stage], k.phase);
      multiply_qk(s);
      wgmma_wait<0>();
      pin_registers(s);
      release(&shared.k_empty[k.stage]);
      k.advance();
      if (work.kv_tiles == 1) release(&shared.q_empty[id]);
      mask(s, work, work.kv_tiles - 1);
      softmax.find_reference(s, correction);
      softmax.exponentiate(s);
      to_operand(s, p);

      for (int tile = work.kv_tiles - 2; tile >= 0; --tile) {
        barrier_wait(&shared.k_full[k.stage], k.phase);
        await_turn();
        multiply_qk(s);
        barrier_wait(&shared.v_full[v.stage], v.phase);
        multiply_pv(o, p);
        pass_turn();

        wgmma_wait<1>();
        pin_registers(s);
        release(&shared.k_empty[k.stage]);
        k.advance();
        if (tile == 0) release(&shared.q_empty[id]);
        mask(s, work, tile);
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
        release(&shared.v_empty[v.stage]);
        v.advance();
        softmax.exponentiate(s);
        to_operand(s, p);
      }

      barrier_wait(&shared.v_full[v.stage], v.phase);
      multiply_pv(o, p);
      wgmma_wait<0>();
      pin_registers(o);
      release(&shared.v_empty[v.stage]);
      v.advance();
      q.advance();
    }
    store(work, softmax, o);
  }

  __device__ void store(const WorkTile& work, const Softmax& softmax, float (&o)[kHeadDim / 2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int tile_row = row + 8 * r;
      const bool valid = tile_row < work.rows;
      const int64_t position = int64_t{work.token + tile_row} * args.num_q_heads + work.head;
      const float sum = quad_sum(softmax.sum[r]);
      const float inverse = sum > 0.f ? __fdividef(1.f, sum) : 0.f;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        o[i * 4 + 2 * r] *= inverse;
        o[i * 4 + 2 * r + 1] *= inverse;
      }

      if (valid && lane % 4 == 0) {
        // The reference of the sum is the rounded product of maximum and scale.
        const float maximum = softmax.maximum[r];
        const float rounding = fmaf(-maximum, softmax.scale_log2, softmax.exponent(maximum));
        args.lse[position] =
            sum > 0.f ? fmaf(maximum, args.scale, (__log2f(sum) + rounding) * kLn2) : -kInfinity;
      }

      const int t = lane % 4;
      if (args.float_output) {
        float* out = static_cast<float*>(args.o) + position * kHeadDim + t * 2;
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
          if (valid) {
            *reinterpret_cast<float2*>(out + i * 8) =
                make_float2(o[i * 4 + 2 * r], o[i * 4 + 2 * r + 1]);
          }
        }
      } else {
        Element* out = static_cast<Element*>(args.o) + position * kHeadDim + t * 8;
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; i += 4) {
          uint32_t x[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int pair = (i + n) * 4 + 2 * r;
            x[n] = pack2<Element>(o[pair], o[pair + 1]);
          }
          quad_transpose(x, t);
          if (valid) *reinterpret_cast<uint4*>(out + i * 8) = make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
    }
  }
};

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    context_attention_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(raw_shared);

  if (threadIdx.x == 0) {
    tma_prefetch(&args.q);
    tma_prefetch(&args.kv);
    for (int c = 0; c < kConsumers; ++c) {
      barrier_init(&shared.q_full[c], 1);
      barrier_init(&shared.q_empty[c], 4);
    }
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.k_full[s], 1);
      barrier_init(&shared.k_empty[s], kConsumerWarps);
      barrier_init(&shared.v_full[s], 1);
      barrier_init(&shared.v_empty[s], kConsumerWarps);
    }
    for (int s = 0; s < 2; ++s) {
      barrier_init(&shared.work_full[s], 1);
      barrier_init(&shared.work_empty[s], kConsumerWarps);
    }
    barrier_init(&shared.tail_full, 1);
    barrier_init_fence();
  }
  __syncthreads();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int warpgroup = warp / 4;
  if (warpgroup == 0) {
    registers_decrease<40>();
    if (warp == 0) Producer<kHeadDim>{args, shared}.run();
  } else {
    registers_increase<232>();
    Consumer<Element, kHeadDim>{args, shared, warpgroup - 1}.run();
  }
}

// Host

template <class Element, int kHeadDim>
void launch(const Arguments& args, int blocks, cudaStream_t stream) {
  const auto kernel = context_attention_kernel<Element, kHeadDim>;
  constexpr int kSharedBytes = sizeof(Shared<kHeadDim>);
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
      "context_attention_sm90 shared memory");
  kernel<<<blocks, kThreads, kSharedBytes, stream>>>(args);
  check_launch("context_attention_sm90");
}

}  // namespace

size_t context_attention_sm90_workspace_bytes() { return sizeof(int); }

void context_attention_sm90(const PagedAttentionParams& params, void* workspace,
                            cudaStream_t stream) {
  const cuuint64_t head_dim = params.head_dim;
  const cuuint64_t page = params.tokens_per_block;
  const cuuint64_t q_heads = params.num_q_heads;
  const cuuint64_t matrices = params.num_pages * 2 * params.num_kv_heads;
  Arguments args;
  args.q = make_tensor_map(
      params.dtype, params.q, {head_dim, q_heads, cuuint64_t(params.num_tokens)},
      {head_dim * 2, cuuint64_t(params.q_stride) * 2}, {kPanel, 1, kRowsPerConsumer}, "q");
  args.kv = make_tensor_map(params.dtype, params.kv_pool, {head_dim, page, matrices},
                            {head_dim * 2, page * head_dim * 2}, {kPanel, cuuint32_t(page), 1},
                            "kv_pool");
  args.page_table = params.page_table;
  args.cu_seqlens_q = params.cu_seqlens_q;
  args.kv_lens = params.kv_lens;
  args.o = params.o;
  args.lse = params.lse;
  args.counter = static_cast<int*>(workspace);
  args.page_table_stride = params.page_table_stride;
  args.num_seqs = params.num_seqs;
  args.max_kv_len = params.max_kv_len;
  args.num_q_heads = params.num_q_heads;
  args.num_kv_heads = params.num_kv_heads;
  args.page_shift = params.tokens_per_block == 64 ? 6 : 7;
  args.causal = params.causal;
  args.float_output = params.o_dtype == DType::kFloat32;
  args.scale = params.scale;

  check_cuda(cudaMemsetAsync(workspace, 0, sizeof(int), stream), "context_attention_sm90 counter");
  const int64_t most_tiles =
      (params.num_tokens / kRows + int64_t{params.num_seqs}) * params.num_q_heads;
  const int blocks = static_cast<int>(std::min<int64_t>(current_device().num_sms, most_tiles));
  dispatch_16bit(params.dtype, [&](auto element) {
    using Element = decltype(element);
    if (params.head_dim == 64) {
      launch<Element, 64>(args, blocks, stream);
    } else {
      launch<Element, 128>(args, blocks, stream);
    }
  });
}

}  // namespace star_attention
