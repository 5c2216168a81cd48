// Phase 2 on sm_90a: the main loop of mainloop_sm90.cuh over a grid of one block per
// multiprocessor, blockIdx.x naming the tile of 128 packed rows and blockIdx.y the share of the KV
// line (query_shares.cuh). Blocks of one share read the same pages at the same time, from memory
// once and then from L2; where two of them make a cluster, from L2 half as often.
//
// The consumers gather their packed rows of Q themselves, once a piece, and leave partials that
// query_merge.cu adds up.
#include <algorithm>

#include "attention/kernels.h"
#include "attention/mainloop_sm90.cuh"
#include "attention/query_shares.cuh"
#include "attention/steps.h"
#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/device.h"

namespace star_attention {
namespace {

using namespace sm90;

struct Arguments {
  PagedAttentionParams p;
  QueryPartials partials;
  KvPool kv;
};

// Lets the compiler keep what depends on x, such as stages and descriptors, in uniform registers.
__device__ inline int warp_uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Calls attend(rows, piece, tile_begin, tile_end) for the pieces of this block's share where the
// cluster has rows. Both ends are clipped to the tokens that they see: there may be no tiles.
template <int kCluster, typename Attend>
__device__ void for_each_piece(const Arguments& args, Attend attend) {
  const int first_row = blockIdx.x / kCluster * kCluster * kRows;
  QueryPieces pieces(args.p, args.partials, blockIdx.y);
  for (QueryPiece piece; warp_uniform(pieces.next(piece));) {
    const SequenceRows rows(args.p, piece.seq, piece.kv_head);
    if (warp_uniform(first_row >= rows.count())) continue;
    const int last_row = min(first_row + kCluster * kRows, rows.count()) - 1;
    const int seen = max(0, rows.limit(args.p, last_row));
    const int first = rows.start(args.p, first_row) / kTokens;
    attend(rows, piece, warp_uniform(max(piece.tile_begin, first)),
           warp_uniform(min(piece.tile_end, ceil_div(seen, kTokens))));
  }
}

template <typename T, int kHeadDim, int kCluster>
struct PieceConsumer {
  const Arguments& args;
  Stages<kHeadDim, kCluster>& shared;
  const int id;
  Consumer<T, kHeadDim, kCluster> consumer{shared, id};
  const int thread = threadIdx.x % kWarpgroup;
  const int block_row = blockIdx.x * kRows;

  struct Rows {
    const PieceConsumer& self;
    const SequenceRows& rows;
    const int first = rows.limit(self.args.p, self.block_row + self.consumer.warp_row);
    const int last = start(self.consumer.warp_row + 15);

    __device__ void await_q() const { self.load_q(rows); }
    __device__ void release_q() const {}
    __device__ int limit(int row) const { return rows.limit(self.args.p, self.block_row + row); }
    __device__ int warp_limit() const { return first; }
    __device__ int start(int row) const {
      return rows.start(self.args.p, min(self.block_row + row, rows.count() - 1));
    }
    __device__ int last_start() const { return last; }
  };

  __device__ void sync_warpgroup() const { named_barrier_sync(1 + kConsumers + id, kWarpgroup); }

  __device__ void load_q(const SequenceRows& rows) const {
    constexpr int kChunks = kHeadDim / 8;  // of 16 bytes in a row
    constexpr int kPasses = kRowsPerConsumer * kChunks / kWarpgroup;
    const int row0 = block_row + id * kRowsPerConsumer;
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

  __device__ void run() {
    consumer.open_turns();
    for_each_piece<kCluster>(
        args, [&](const SequenceRows& rows, const QueryPiece& piece, int tile_begin, int tile_end) {
          Softmax softmax{args.p.scale};
          float o[kHeadDim / 2];
#pragma unroll
          for (float& x : o) x = 0.f;
          if (tile_begin < tile_end) {
            consumer.attend(Rows{*this, rows}, tile_begin, tile_end, softmax, o);
          }
          const PieceOut out(args.p, args.partials, piece, blockIdx.y);
          consumer.store(softmax, o, out.to, rows.count() - block_row,
                         [&](int row) { return out.index(args.p, rows, block_row + row); });
        });
  }
};

template <typename T, int kHeadDim, int kCluster>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    query_sm90_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<Stages<kHeadDim, kCluster>*>(raw_shared);

  if (threadIdx.x == 0) {
    tma_prefetch(&args.kv.map);
    shared.init_barriers();
    barrier_init_fence();
  }
  if constexpr (kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  wait_for_previous_kernel();
  allow_next_kernel();  // the merge, which reads lengths before it waits

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int warpgroup = warp / 4;
  if (warpgroup == 0) {
    registers_decrease<40>();
    if (warp == 0) {
      Producer<kHeadDim, kCluster> producer{args.kv, shared};
      for_each_piece<kCluster>(args, [&](const SequenceRows& rows, const QueryPiece& piece,
                                         int tile_begin, int tile_end) {
        if (tile_begin >= tile_end) return;
        producer.load(piece.seq, piece.kv_head, rows.kv_len, tile_begin, tile_end, [] {});
      });
    }
  } else {
    registers_increase<232>();
    PieceConsumer<T, kHeadDim, kCluster>{args, shared, warpgroup - 1}.run();
  }
  if constexpr (kCluster > 1)
    cluster_sync();  // the other block may still signal barriers of this one
}

int row_tiles_of(const PagedAttentionParams& p) {
  const int rows = p.max_q_len * (p.num_q_heads / p.num_kv_heads);
  return std::max(1, (rows + kRows - 1) / kRows);
}

// Blocks along the grid's x (tiles of rows) and y (shares). With clusters there may be one more
// tile, unless that costs a share.
struct Grid {
  int row_tiles;
  int shares;
  bool clusters;

  explicit Grid(const PagedAttentionParams& p) : row_tiles(row_tiles_of(p)) {
    const int sms = current_device().num_sms;
    shares = std::max(1, sms / row_tiles);
    const int even = (row_tiles + 1) / 2 * 2;
    clusters = row_tiles > 1 && sms / even == shares;
    if (clusters) row_tiles = even;
  }
};

template <typename T, int kHeadDim, int kCluster>
void launch(const Arguments& args, const Grid& grid, cudaStream_t stream) {
  const auto kernel = query_sm90_kernel<T, kHeadDim, kCluster>;
  constexpr int kSharedBytes = sizeof(Stages<kHeadDim, kCluster>);
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
      "query_sm90 shared memory");
  launch_dependent(kernel, dim3(grid.row_tiles, grid.shares), kThreads, kSharedBytes, stream,
                   "query_sm90", args);
}

template <typename T, int kHeadDim>
void launch(const Arguments& args, const Grid& grid, cudaStream_t stream) {
  grid.clusters ? launch<T, kHeadDim, 2>(args, grid, stream)
                : launch<T, kHeadDim, 1>(args, grid, stream);
}

}  // namespace

QueryPlan query_attention_sm90_plan(const PagedAttentionParams& p) {
  const int shares = Grid(p).shares;
  return {shares, query_partials_bytes(p, shares), query_steps(p, shares)};
}

void query_attention_sm90(const PagedAttentionParams& p, void* workspace, cudaStream_t stream) {
  const Grid grid(p);
  const Arguments args{p, query_partials(p, grid.shares, kTokens, workspace), make_kv_pool(p)};
  dispatch_16bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.head_dim == 128 ? launch<T, 128>(args, grid, stream) : launch<T, 64>(args, grid, stream);
  });
  merge_query_partials(p, args.partials, stream);
}

}  // namespace star_attention
