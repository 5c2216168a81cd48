// Context attention for sm_90a: persistent, warp-specialised, TMA and wgmma.
//
// A work tile is 128 query rows of one head. Two blocks form a cluster and take two heads of a KV
// group at a time: each loads one half of every K and V tile into both, since reading L2 half as
// often leaves power for the tensor cores. (If the group is odd, a block works alone.) Work tiles
// come from a counter, heaviest first and one KV head after the other, so that the blocks in flight
// share K and V in L2.
//
// One producer warp streams K and V pages through two rings of shared-memory stages. It runs ahead
// into the next work tile while the consumers finish theirs.
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

#include "attention/context_sm90.h"
#include "attention/tile_sm90.cuh"
#include "common/check.h"
#include "common/device.h"
#include "common/numeric.cuh"
#include "common/tensor_map.h"

namespace star_attention {
namespace {

using namespace sm90;

constexpr int kBox = 64;  // tokens that one TMA instruction loads; a page holds one or two

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
  uint64_t tail_full[kStages];
  WorkTile work[2];
  uint64_t index_full[2], index_empty[2];
  int index[2];
};

// Maps the ever growing work index of a cluster to work tiles, sequence after sequence.
template <int kCluster>
struct Scheduler {
  const Arguments& args;
  int seq = 0;
  int first_index = 0;  // of the sequence

  __device__ WorkTile find(int index) {
    for (; seq < args.num_seqs; ++seq) {
      const int token = args.cu_seqlens_q[seq];
      const int q_len = args.cu_seqlens_q[seq + 1] - token;
      const int row_tiles = ceil_div(q_len, kRows);
      const int count = row_tiles * args.num_q_heads / kCluster;
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
    const int shares = args.num_q_heads / args.num_kv_heads / kCluster;
    const int kv_head = index / (row_tiles * shares);
    index -= kv_head * row_tiles * shares;
    const int first_row = (row_tiles - 1 - index / shares) * kRows;

    WorkTile work;
    work.seq = seq;
    work.head = (kv_head * shares + index % shares) * kCluster + cluster_rank();
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

template <int kHeadDim, int kCluster>
struct Producer {
  static constexpr int kBoxes = kTokens / kBox / kCluster;  // of a tile that this block loads

  const Arguments& args;
  Shared<kHeadDim>& shared;
  const int lane = threadIdx.x % 32;
  const int rank = cluster_rank();
  Cursor<kStages> k, v;
  Cursor<1> q;
  uint32_t tail_phases = 0;  // a bit for each stage of V

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

  // The page of the lane's box of a KV tile.
  __device__ int find_page(int tile) const {
    const int token = tile * kTokens + (rank * kBoxes + lane) * kBox;
    return lane < kBoxes && token < kv_len ? pages[token >> args.page_shift] : 0;
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
      const int token = (tile * kTokens + first) & ((1 << args.page_shift) - 1);
      const int matrix = (__shfl_sync(~0u, page, i) * 2 + which) * args.num_kv_heads + kv_head;
      if (!leader || first >= tokens) continue;
#pragma unroll
      for (int d = 0; d < kHeadDim; d += kPanel) {
        uint8_t* box = destination + (d * kTokens + first * kPanel) * 2;
        if constexpr (kCluster > 1) {
          tma_load_multicast(box, &args.kv, full, (1 << kCluster) - 1, d, token, matrix);
        } else {
          tma_load(box, &args.kv, full, d, token, matrix);
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

  // Gives the first block's index to the whole cluster.
  __device__ int share_index(int index, const Cursor<2>& slot) const {
    if constexpr (kCluster == 1) return __shfl_sync(~0u, index, 0);
    if (lane == 0) {
      barrier_arrive_expect(&shared.index_full[slot.stage], sizeof(int));
      if (rank == 0) {
        barrier_wait(&shared.index_empty[slot.stage], slot.phase ^ 1);
        for (int r = 0; r < kCluster; ++r) {
          store_async(&shared.index[slot.stage], &shared.index_full[slot.stage], r, index);
        }
      }
    }
    __syncwarp();
    barrier_wait(&shared.index_full[slot.stage], slot.phase);
    index = __shfl_sync(~0u, shared.index[slot.stage], 0);
    if (lane == 0) barrier_arrive(&shared.index_empty[slot.stage], 0);
    return index;
  }

  __device__ void run() {
    Scheduler<kCluster> scheduler{args};
    Cursor<2> slot;
    int index = blockIdx.x / kCluster;
    while (true) {
      const WorkTile work = scheduler.find(index);
      barrier_wait(&shared.work_empty[slot.stage], slot.phase ^ 1);
      if (lane == 0) {
        shared.work[slot.stage] = work;
        barrier_arrive(&shared.work_full[slot.stage]);
      }
      if (work.kv_tiles < 0) return;

      int next = 0;
      if (rank == 0 && lane == 0) next = gridDim.x / kCluster + atomicAdd(args.counter, 1);
      if (work.kv_tiles > 0) load(work);
      index = share_index(next, slot);
      slot.advance();
    }
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

template <class Element, int kHeadDim, int kCluster>
struct Consumer {
  const Arguments& args;
  Shared<kHeadDim>& shared;
  const int id;  // which of the warpgroups
  const int warp = threadIdx.x % kWarpgroup / 32;
  const int lane = threadIdx.x % 32;
  const int row = id * kRowsPerConsumer + warp * 16 + lane / 4;  // of the work tile
  Cursor<kStages> k, v;
  Cursor<1> q;

  // Both blocks write to a stage, so that both need to know.
  __device__ void release_stage(uint64_t* barrier) {
    __syncwarp();
    if (lane < kCluster) barrier_arrive(barrier, lane);
  }

  __device__ int limit(const WorkTile& work, int tile_row) const {
    return min(work.kv_len, work.limit + (args.causal ? tile_row : 0));
  }

  __device__ void mask(float (&s)[kTokens / 2], const WorkTile& work, int tile) const {
    const int first = tile * kTokens;
    if (__builtin_expect(first + kTokens <= limit(work, row - lane / 4), true)) return;
    mask_scores(s, {limit(work, row) - first, limit(work, row + 8) - first});
  }

  __device__ void run() {
    Cursor<2> slot;
    if (id == kConsumers - 1) pass_turn(id);
    while (true) {
      barrier_wait(&shared.work_full[slot.stage], slot.phase);
      WorkTile work = shared.work[slot.stage];
      // Lets the compiler keep stages and descriptors in uniform registers.
      work.kv_tiles = __shfl_sync(~0u, work.kv_tiles, 0);
      warp_arrive(&shared.work_empty[slot.stage]);
      slot.advance();
      if (work.kv_tiles < 0) return;
      attend(work);
    }
  }

  __device__ void attend(const WorkTile& work) {
    Softmax softmax{args.scale};
    float o[kHeadDim / 2];
#pragma unroll
    for (float& x : o) x = 0.f;

    if (work.kv_tiles > 0) {
      float s[kTokens / 2];
      uint32_t p[kTokens / 4];
      float correction[2];

      barrier_wait(&shared.q_full[id], q.phase);
      barrier_wait(&shared.k_full[k.stage], k.phase);
      multiply_qk<Element, kHeadDim>(s, shared.q[id], shared.k[k.stage]);
      wgmma_wait<0>();
      pin_registers(s);
      release_stage(&shared.k_empty[k.stage]);
      k.advance();
      if (work.kv_tiles == 1) warp_arrive(&shared.q_empty[id]);
      mask(s, work, work.kv_tiles - 1);
      softmax.find_reference(s, correction);
      softmax.exponentiate<Element>(s, p);

      for (int tile = work.kv_tiles - 2; tile >= 0; --tile) {
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
        if (tile == 0) warp_arrive(&shared.q_empty[id]);
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

      if (valid && lane % 4 == 0) args.lse[position] = softmax.lse(r, sum);

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

template <class Element, int kHeadDim, int kCluster>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
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
      barrier_init(&shared.k_empty[s], kCluster * kConsumerWarps);
      barrier_init(&shared.v_full[s], 1);
      barrier_init(&shared.tail_full[s], 1);
      barrier_init(&shared.v_empty[s], kCluster * kConsumerWarps);
    }
    for (int s = 0; s < 2; ++s) {
      barrier_init(&shared.work_full[s], 1);
      barrier_init(&shared.work_empty[s], kConsumerWarps);
      barrier_init(&shared.index_full[s], 1);
      barrier_init(&shared.index_empty[s], kCluster);
    }
    barrier_init_fence();
  }
  cluster_sync();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int warpgroup = warp / 4;
  if (warpgroup == 0) {
    registers_decrease<40>();
    if (warp == 0) Producer<kHeadDim, kCluster>{args, shared}.run();
  } else {
    registers_increase<232>();
    Consumer<Element, kHeadDim, kCluster>{args, shared, warpgroup - 1}.run();
  }
  cluster_sync();  // the other block may still signal barriers of this one
}

// Host

template <class Element, int kHeadDim, int kCluster>
void launch(const Arguments& args, int64_t work_tiles, cudaStream_t stream) {
  const auto kernel = context_attention_kernel<Element, kHeadDim, kCluster>;
  const int64_t most_blocks = current_device().num_sms / kCluster * kCluster;
  const int blocks = static_cast<int>(std::min(most_blocks, work_tiles));
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
                            {head_dim * 2, page * head_dim * 2}, {kPanel, kBox, 1}, "kv_pool");
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
  const int64_t most_work_tiles =
      (params.num_tokens / kRows + int64_t{params.num_seqs}) * params.num_q_heads;
  const bool pairs = params.num_q_heads / params.num_kv_heads % 2 == 0;
  dispatch_16bit(params.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto run = params.head_dim == 64
                         ? (pairs ? launch<Element, 64, 2> : launch<Element, 64, 1>)
                         : (pairs ? launch<Element, 128, 2> : launch<Element, 128, 1>);
    run(args, most_work_tiles, stream);
  });
}

}  // namespace star_attention
