// Phase 2 on sm_90a: a grid of one block per multiprocessor, blockIdx.x naming the tile of packed
// rows and blockIdx.y the share of the KV line (query_shares.cuh). Blocks of one share read the
// same pages at the same time, from memory once and then from L2.
//
// One producer warp streams K and V tiles of 128 tokens by TMA through a ring of stages and runs
// ahead into the next piece of the share. Two consumer warpgroups take 64 rows each. A step of one:
//
//   tensor cores   S' = Q K'^T | O += P V      | (the other warpgroup's two products)
//   other units                | maximum of S' | P' = exp2(S' - maximum), row sums
//
// A pair of named barriers makes the warpgroups take turns at the tensor cores. The running maximum
// moves, and O is rescaled, only when a score exceeds it by 2^8.
#include <algorithm>

#include "attention/kernels.h"
#include "attention/query_shares.cuh"
#include "common/check.h"
#include "common/device.h"
#include "common/sm80_ptx.cuh"
#include "common/sm90.cuh"
#include "common/tensor_map.h"

namespace star_attention {
namespace {

using namespace sm90;

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kConsumerRows = 64;
constexpr int kRows = kConsumers * kConsumerRows;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kTokens = 128;  // of a KV tile
constexpr int kStages = 3;
constexpr int kPanel = 64;     // columns in a 128-byte row of shared memory
constexpr float kSlack = 8.f;  // log2 of how far scores may exceed the running maximum

struct Arguments {
  PagedAttentionParams p;
  QueryPartials partials;
  CUtensorMap kv;  // [num_pages * 2 * num_kv_heads][tokens_per_block][head_dim]
};

template <int kHeadDim>
struct Shared {
  static constexpr int kTileBytes = kTokens * kHeadDim * 2;

  alignas(1024) uint8_t q[kConsumers][kConsumerRows * kHeadDim * 2];
  alignas(1024) uint8_t k[kStages][kTileBytes];
  alignas(1024) uint8_t v[kStages][kTileBytes];
  uint64_t k_full[kStages], k_empty[kStages];
  uint64_t v_full[kStages], v_empty[kStages];
  uint64_t tail_full;
};

// Position in the ring of stages: a stage's barriers complete one phase a round.
struct Cursor {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Calls attend(rows, piece, tile_end) for the pieces of this block that have rows; tile_end is
// clipped to the tokens that exist, so a piece may have no tiles.
template <typename Attend>
__device__ void for_each_piece(const Arguments& args, Attend attend) {
  QueryPieces pieces(args.p, args.partials, blockIdx.y);
  for (QueryPiece piece; pieces.next(piece);) {
    const SequenceRows rows(args.p, piece.seq, piece.kv_head);
    const int tile_end = min(piece.tile_end, ceil_div(rows.kv_len, kTokens));
    if (blockIdx.x * kRows < rows.count()) attend(rows, piece, tile_end);
  }
}

template <int kHeadDim>
struct Producer {
  const Arguments& args;
  Shared<kHeadDim>& shared;
  const int lane = threadIdx.x % 32;
  Cursor k, v;
  uint32_t tail_phase = 0;

  // Loads the pages of a tile that begin before kv_len.
  __device__ void load(const SequenceRows& rows, int seq, int tile, int which, uint8_t* destination,
                       uint64_t* full) {
    const PagedAttentionParams& p = args.p;
    if (lane != 0) return;
    const int32_t* pages = p.page_table + int64_t{seq} * p.page_table_stride;
    const int box = p.tokens_per_block;
    const int boxes = ceil_div(min(kTokens, rows.kv_len - tile * kTokens), box);
    barrier_arrive_expect(full, boxes * box * kHeadDim * 2);
    for (int b = 0; b < boxes; ++b) {
      const int page = pages[tile * (kTokens / box) + b];
      const int matrix = (page * 2 + which) * p.num_kv_heads + rows.kv_head;
      for (int d = 0; d < kHeadDim; d += kPanel) {
        tma_load(destination + (d * kTokens + b * box * kPanel) * 2, &args.kv, full, d, 0, matrix);
      }
    }
  }

  __device__ void load_k(const SequenceRows& rows, int seq, int tile) {
    barrier_wait(&shared.k_empty[k.stage], k.phase ^ 1);
    load(rows, seq, tile, 0, shared.k[k.stage], &shared.k_full[k.stage]);
    k.advance();
  }

  __device__ void load_v(const SequenceRows& rows, int seq, int tile) {
    barrier_wait(&shared.v_empty[v.stage], v.phase ^ 1);
    const int tokens = rows.kv_len - tile * kTokens;
    if (tokens >= kTokens) {
      load(rows, seq, tile, 1, shared.v[v.stage], &shared.v_full[v.stage]);
    } else {
      // What lies behind kv_len may be NaN, and 0 * NaN would reach O.
      load(rows, seq, tile, 1, shared.v[v.stage], &shared.tail_full);
      barrier_wait(&shared.tail_full, tail_phase);
      tail_phase ^= 1;
      constexpr int kChunks = kPanel / 8;
      for (int i = lane; i < (kTokens - tokens) * kHeadDim / 8; i += 32) {
        const int token = tokens + i / (kHeadDim / 8), chunk = i % (kHeadDim / 8);
        const int row = chunk / kChunks * kTokens + token;
        reinterpret_cast<uint4*>(shared.v[v.stage])[row * kChunks + chunk % kChunks] = uint4{};
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.v_full[v.stage]);
    }
    v.advance();
  }

  __device__ void run() {
    for_each_piece(args, [&](const SequenceRows& rows, const QueryPiece& piece, int tile_end) {
      if (piece.tile_begin >= tile_end) return;
      load_k(rows, piece.seq, piece.tile_begin);
      for (int tile = piece.tile_begin + 1; tile < tile_end; ++tile) {
        load_k(rows, piece.seq, tile);
        load_v(rows, piece.seq, tile - 1);
      }
      load_v(rows, piece.seq, tile_end - 1);
    });
  }
};

// A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16, and in every 8 columns the pair
// 2 * (lane % 4).
template <typename T, int kHeadDim>
struct Consumer {
  static constexpr uint32_t kTilePanelBytes = kTokens * kPanel * 2;
  static constexpr uint32_t kQueryPanelBytes = kConsumerRows * kPanel * 2;

  const Arguments& args;
  Shared<kHeadDim>& shared;
  const int id;  // which of the warpgroups
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = threadIdx.x % 32;
  const int row0 = blockIdx.x * kRows + id * kConsumerRows;
  const int row = row0 + thread / 32 * 16 + lane / 4;
  const float scale = args.p.scale * kLog2e;
  Cursor k, v;
  float o[kHeadDim / 2];
  float max[2];  // running maximum of the scores, times `scale`
  float sum[2];  // over the thread's own columns

  __device__ void release(uint64_t* barrier) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  }

  __device__ void await_turn() { named_barrier_sync(1 + id, kConsumers * kWarpgroup); }
  __device__ void pass_turn() {
    named_barrier_arrive(1 + (id + 1) % kConsumers, kConsumers * kWarpgroup);
  }
  __device__ void sync_warpgroup() { named_barrier_sync(1 + kConsumers + id, kWarpgroup); }

  __device__ void load_q(const SequenceRows& rows) {
    constexpr int kChunks = kHeadDim / 8;  // of 16 bytes in a row
    constexpr int kPasses = kConsumerRows * kChunks / kWarpgroup;
    const int chunk = thread % kChunks;
    uint4 loaded[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int r = (thread + i * kWarpgroup) / kChunks;
      loaded[i] = uint4{};
      if (row0 + r < rows.count()) {
        loaded[i] = reinterpret_cast<const uint4*>(rows.q<T>(args.p, row0 + r))[chunk];
      }
    }
    sync_warpgroup();  // the last piece's products have read the old rows
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int r = (thread + i * kWarpgroup) / kChunks;
      const int line = chunk / (kPanel / 8) * kConsumerRows + r;
      reinterpret_cast<uint4*>(shared.q[id])[line * (kPanel / 8) + (chunk % (kPanel / 8) ^ r % 8)] =
          loaded[i];
    }
    fence_async_proxy();
    sync_warpgroup();
  }

  // s = Q K^T
  __device__ void multiply_qk(float (&s)[kTokens / 2]) {
    const uint64_t a = wgmma_descriptor(shared.q[id], 0);
    const uint64_t b = wgmma_descriptor(shared.k[k.stage], 0);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      const int panel = d / kPanel, bytes = d % kPanel * 2;
      wgmma_ss<T>(s, wgmma_advance(a, panel * kQueryPanelBytes + bytes),
                  wgmma_advance(b, panel * kTilePanelBytes + bytes), d != 0);
    }
    wgmma_commit();
  }

  // o += P V
  __device__ void multiply_pv(const uint32_t (&probabilities)[kTokens / 4]) {
    const uint64_t b = wgmma_descriptor(shared.v[v.stage], kTilePanelBytes);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < kTokens; t += 16) {
      wgmma_rs<T>(o, probabilities + t / 4, wgmma_advance(b, t * kPanel * 2));
    }
    wgmma_commit();
  }

  __device__ void mask(const SequenceRows& rows, int tile, float (&s)[kTokens / 2]) {
    const int token = tile * kTokens;
    const int full = min(rows.kv_len, rows.visible(args.p, row0));  // what every row sees
    if (__builtin_expect(token + kTokens <= full, true)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int visible = min(rows.kv_len, rows.visible(args.p, row + 8 * half)) - token;
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * i + lane % 4 * 2 + e >= visible) s[4 * i + 2 * half + e] = -INFINITY;
        }
      }
    }
  }

  // Moves the running maxima if the scores call for it; o is to be scaled by `correction` then.
  __device__ void update_max(const float (&s)[kTokens / 2], float (&correction)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float even = s[2 * half], odd = s[2 * half + 1];
#pragma unroll
      for (int i = 4; i < kTokens / 2; i += 4) {
        even = fmaxf(even, s[i + 2 * half]);
        odd = fmaxf(odd, s[i + 2 * half + 1]);
      }
      float tile_max = fmaxf(even, odd);
      tile_max = fmaxf(tile_max, __shfl_xor_sync(~0u, tile_max, 1));
      tile_max = fmaxf(tile_max, __shfl_xor_sync(~0u, tile_max, 2)) * scale;
      const float old = max[half];
      if (tile_max > old + kSlack) max[half] = tile_max;
      correction[half] = ptx::exp2_approx(old - max[half]);
      sum[half] *= correction[half];
    }
  }

  __device__ void exponentiate(float (&s)[kTokens / 2]) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      s[i] = ptx::exp2_approx(fmaf(s[i], scale, -max[i / 2 % 2]));
      sum[i / 2 % 2] += s[i];
    }
  }

  __device__ static void to_operand(const float (&s)[kTokens / 2], uint32_t (&x)[kTokens / 4]) {
#pragma unroll
    for (int i = 0; i < kTokens / 4; ++i) x[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  __device__ void attend(const SequenceRows& rows, int tile_begin, int tile_end) {
    // Lets the compiler keep stages and descriptors in uniform registers.
    tile_begin = __shfl_sync(~0u, tile_begin, 0);
    tile_end = __shfl_sync(~0u, tile_end, 0);
    max[0] = max[1] = kNoMax;
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (float& x : o) x = 0.f;
    if (tile_begin >= tile_end) return;
    load_q(rows);

    float s[kTokens / 2];
    uint32_t probabilities[kTokens / 4];
    float correction[2];
    barrier_wait(&shared.k_full[k.stage], k.phase);
    multiply_qk(s);
    wgmma_wait<0>();
    pin_registers(s);
    release(&shared.k_empty[k.stage]);
    k.advance();
    mask(rows, tile_begin, s);
    update_max(s, correction);
    exponentiate(s);
    to_operand(s, probabilities);

    for (int tile = tile_begin + 1; tile < tile_end; ++tile) {
      barrier_wait(&shared.k_full[k.stage], k.phase);
      await_turn();
      multiply_qk(s);
      barrier_wait(&shared.v_full[v.stage], v.phase);
      multiply_pv(probabilities);
      pass_turn();

      wgmma_wait<1>();
      pin_registers(s);
      release(&shared.k_empty[k.stage]);
      k.advance();
      mask(rows, tile, s);
      update_max(s, correction);

      wgmma_wait<0>();
      pin_registers(o);
      pin_registers(probabilities);
      release(&shared.v_empty[v.stage]);
      v.advance();
      const bool moved = correction[0] != 1.f || correction[1] != 1.f;
      if (__builtin_expect(__any_sync(~0u, moved), false)) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= correction[i / 2 % 2];
      }
      exponentiate(s);
      to_operand(s, probabilities);
    }

    barrier_wait(&shared.v_full[v.stage], v.phase);
    multiply_pv(probabilities);
    wgmma_wait<0>();
    pin_registers(o);
    release(&shared.v_empty[v.stage]);
    v.advance();
  }

  template <typename Store, typename StoreLse>
  __device__ void write(const SequenceRows& rows, Store store, StoreLse store_lse) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half] + __shfl_xor_sync(~0u, sum[half], 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (row + 8 * half >= rows.count()) continue;
      const float inverse = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        store(row + 8 * half, 8 * i + lane % 4 * 2, o[4 * i + 2 * half] * inverse,
              o[4 * i + 2 * half + 1] * inverse);
      }
      if (lane % 4 == 0) {
        store_lse(row + 8 * half, total > 0.f ? max[half] * kLn2 + logf(total) : -INFINITY);
      }
    }
  }

  __device__ void run() {
    if (id == kConsumers - 1) pass_turn();
    for_each_piece(args, [&](const SequenceRows& rows, const QueryPiece& piece, int tile_end) {
      attend(rows, piece.tile_begin, tile_end);
      write_piece<T>(args.p, args.partials, piece, blockIdx.y, rows,
                     [&](auto store, auto store_lse) { write(rows, store, store_lse); });
    });
  }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    query_sm90_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(raw_shared);

  start_merge();
  if (threadIdx.x == 0) {
    tma_prefetch(&args.kv);
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.k_full[s], 1);
      barrier_init(&shared.k_empty[s], kConsumers * 4);
      barrier_init(&shared.v_full[s], 1);
      barrier_init(&shared.v_empty[s], kConsumers * 4);
    }
    barrier_init(&shared.tail_full, 1);
    barrier_init_fence();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    registers_decrease<40>();
    if (threadIdx.x < 32) Producer<kHeadDim>{args, shared}.run();
  } else {
    registers_increase<232>();
    Consumer<T, kHeadDim>{args, shared, warpgroup - 1}.run();
  }
}

// Blocks along the grid's x (tiles of rows) and y (shares).
dim3 grid_of(const PagedAttentionParams& p) {
  const int rows = p.max_q_len * (p.num_q_heads / p.num_kv_heads);
  const int row_tiles = (rows + kRows - 1) / kRows;
  return dim3(row_tiles, std::max(1, current_device().num_sms / row_tiles));
}

template <typename T, int kHeadDim>
void launch(const Arguments& args, cudaStream_t stream) {
  const auto kernel = query_sm90_kernel<T, kHeadDim>;
  constexpr int kSharedBytes = sizeof(Shared<kHeadDim>);
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
      "query_sm90 shared memory");
  kernel<<<grid_of(args.p), kThreads, kSharedBytes, stream>>>(args);
  check_launch("query_sm90");
}

}  // namespace

size_t query_attention_sm90_workspace(const PagedAttentionParams& p) {
  return query_partials_bytes(p, grid_of(p).y);
}

void query_attention_sm90(const PagedAttentionParams& p, void* workspace, cudaStream_t stream) {
  const cuuint64_t head_dim = p.head_dim, page = p.tokens_per_block;
  const auto matrices = static_cast<cuuint64_t>(p.num_pages * 2 * p.num_kv_heads);
  const Arguments args{p, query_partials(p, grid_of(p).y, kTokens, workspace),
                       make_tensor_map(p.dtype, p.kv_pool, {head_dim, page, matrices},
                                       {head_dim * 2, page * head_dim * 2},
                                       {kPanel, cuuint32_t(page), 1}, "kv_pool")};
  dispatch_16bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.head_dim == 128 ? launch<T, 128>(args, stream) : launch<T, 64>(args, stream);
  });
  merge_query_partials(p, args.partials, stream);
}

}  // namespace star_attention
