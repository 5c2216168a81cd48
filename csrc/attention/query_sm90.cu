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
#include "attention/tile_sm90.cuh"
#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/device.h"
#include "common/tensor_map.h"

namespace star_attention {
namespace {

using namespace sm90;

struct Arguments {
  PagedAttentionParams p;
  QueryPartials partials;
  CUtensorMap kv;  // [num_pages * 2 * num_kv_heads][tokens_per_block][head_dim]
};

template <int kHeadDim>
struct Shared {
  static constexpr int kTileBytes = kTokens * kHeadDim * 2;

  alignas(1024) uint8_t q[kConsumers][kRowsPerConsumer * kHeadDim * 2];
  alignas(1024) uint8_t k[kStages][kTileBytes];
  alignas(1024) uint8_t v[kStages][kTileBytes];
  uint64_t k_full[kStages], k_empty[kStages];
  uint64_t v_full[kStages], v_empty[kStages];
  uint64_t tail_full;
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
  Cursor<kStages> k, v;
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
      load(rows, seq, tile, 1, shared.v[v.stage], &shared.tail_full);
      barrier_wait(&shared.tail_full, tail_phase);
      tail_phase ^= 1;
      clear_tail<kHeadDim>(shared.v[v.stage], tokens);
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

template <typename T, int kHeadDim>
struct Consumer {
  const Arguments& args;
  Shared<kHeadDim>& shared;
  const int id;  // which of the warpgroups
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = threadIdx.x % 32;
  const int row0 = blockIdx.x * kRows + id * kRowsPerConsumer;
  const int row = row0 + thread / 32 * 16 + lane / 4;
  Cursor<kStages> k, v;
  float o[kHeadDim / 2];

  __device__ void sync_warpgroup() { named_barrier_sync(1 + kConsumers + id, kWarpgroup); }

  __device__ void load_q(const SequenceRows& rows) {
    constexpr int kChunks = kHeadDim / 8;  // of 16 bytes in a row
    constexpr int kPasses = kRowsPerConsumer * kChunks / kWarpgroup;
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
      const int line = chunk / (kPanel / 8) * kRowsPerConsumer + r;
      reinterpret_cast<uint4*>(shared.q[id])[line * (kPanel / 8) + (chunk % (kPanel / 8) ^ r % 8)] =
          loaded[i];
    }
    fence_async_proxy();
    sync_warpgroup();
  }

  __device__ int limit(const SequenceRows& rows, int r) const {
    return min(rows.kv_len, rows.visible(args.p, r));
  }

  __device__ void mask(const SequenceRows& rows, int tile, float (&s)[kTokens / 2]) const {
    const int first = tile * kTokens;
    if (__builtin_expect(first + kTokens <= limit(rows, row0), true)) return;
    mask_scores(s, {limit(rows, row) - first, limit(rows, row + 8) - first});
  }

  __device__ Softmax attend(const SequenceRows& rows, int tile_begin, int tile_end) {
    // Lets the compiler keep stages and descriptors in uniform registers.
    tile_begin = __shfl_sync(~0u, tile_begin, 0);
    tile_end = __shfl_sync(~0u, tile_end, 0);
    Softmax softmax{args.p.scale};
#pragma unroll
    for (float& x : o) x = 0.f;
    if (tile_begin >= tile_end) return softmax;
    load_q(rows);

    float s[kTokens / 2];
    uint32_t probabilities[kTokens / 4];
    float correction[2];
    barrier_wait(&shared.k_full[k.stage], k.phase);
    multiply_qk<T, kHeadDim>(s, shared.q[id], shared.k[k.stage]);
    wgmma_wait<0>();
    pin_registers(s);
    warp_arrive(&shared.k_empty[k.stage]);
    k.advance();
    mask(rows, tile_begin, s);
    softmax.find_reference(s, correction);
    softmax.exponentiate<T>(s, probabilities);

    for (int tile = tile_begin + 1; tile < tile_end; ++tile) {
      barrier_wait(&shared.k_full[k.stage], k.phase);
      await_turn(id);
      multiply_qk<T, kHeadDim>(s, shared.q[id], shared.k[k.stage]);
      barrier_wait(&shared.v_full[v.stage], v.phase);
      multiply_pv<T>(o, probabilities, shared.v[v.stage]);
      pass_turn(id);

      wgmma_wait<1>();
      pin_registers(s);
      warp_arrive(&shared.k_empty[k.stage]);
      k.advance();
      mask(rows, tile, s);
      softmax.find_reference(s, correction);

      wgmma_wait<0>();
      pin_registers(o);
      pin_registers(probabilities);
      warp_arrive(&shared.v_empty[v.stage]);
      v.advance();
      const bool moved = correction[0] != 1.f || correction[1] != 1.f;
      if (__builtin_expect(__any_sync(~0u, moved), false)) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= correction[i / 2 % 2];
      }
      softmax.exponentiate<T>(s, probabilities);
    }

    barrier_wait(&shared.v_full[v.stage], v.phase);
    multiply_pv<T>(o, probabilities, shared.v[v.stage]);
    wgmma_wait<0>();
    pin_registers(o);
    warp_arrive(&shared.v_empty[v.stage]);
    v.advance();
    return softmax;
  }

  template <typename Store, typename StoreLse>
  __device__ void write(const SequenceRows& rows, const Softmax& softmax, Store store,
                        StoreLse store_lse) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(softmax.sum[half]);
      if (row + 8 * half >= rows.count()) continue;
      const float inverse = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        store(row + 8 * half, 8 * i + lane % 4 * 2, o[4 * i + 2 * half] * inverse,
              o[4 * i + 2 * half + 1] * inverse);
      }
      if (lane % 4 == 0) store_lse(row + 8 * half, softmax.lse(half, total));
    }
  }

  __device__ void run() {
    if (id == kConsumers - 1) pass_turn(id);
    for_each_piece(args, [&](const SequenceRows& rows, const QueryPiece& piece, int tile_end) {
      const Softmax softmax = attend(rows, piece.tile_begin, tile_end);
      write_piece<T>(args.p, args.partials, piece, blockIdx.y, rows,
                     [&](auto store, auto store_lse) { write(rows, softmax, store, store_lse); });
    });
  }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    query_sm90_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(raw_shared);

  allow_next_kernel();  // the merge
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
  wait_for_previous_kernel();

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
  launch_dependent(kernel, grid_of(args.p), kThreads, kSharedBytes, stream, "query_sm90", args);
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
