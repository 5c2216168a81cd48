// Phase 2 on sm_80 and newer: a grid of resident blocks, blockIdx.x naming the tile of packed rows
// and blockIdx.y the share of the KV line (query_shares.cuh). Blocks of one share read the same
// pages at the same time, from memory once and then from L2. Each piece of a share runs through
// tile_sm80.cuh.
#pragma once

#include <algorithm>

#include "attention/kernels.h"
#include "attention/query_shares.cuh"
#include "attention/steps.h"
#include "attention/tile_sm80.cuh"
#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "common/device.h"

namespace star_attention::query_sm80 {

constexpr int kTile = 64;

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    query_sm80_kernel(const __grid_constant__ PagedAttentionParams p,
                      const __grid_constant__ QueryPartials partials) {
  extern __shared__ __align__(256) char smem[];
  wait_for_previous_kernel();
  allow_next_kernel();  // the merge, which reads lengths before it waits
  const int row0 = blockIdx.x * Tile::kRows, share = blockIdx.y;
  QueryPieces pieces(p, partials, share);
  for (QueryPiece piece; pieces.next(piece);) {
    const SequenceRows rows(p, piece.seq, piece.kv_head);
    if (row0 >= rows.count()) continue;
    const Tile tile(p, rows, piece.seq, row0, piece.tile_begin, piece.tile_end, smem);
    const PieceOut out(p, partials, piece, share);
    tile.write(out.to, [&](int row) { return out.index(p, rows, row); });
  }
}

// Blocks along the grid's x (tiles of rows) and y (shares).
struct Grid {
  int tile;  // rows
  int row_tiles;
  int shares;

  explicit Grid(const PagedAttentionParams& p) {
    const int rows = p.max_q_len * (p.num_q_heads / p.num_kv_heads);
    const auto tiles_of = [&](int size) { return std::max(1, (rows + size - 1) / size); };
    tile = rows <= 16 ? 16 : rows <= 64 ? 64 : 128;
    if (rows > 128 && large_tile_fits_sm80(p.head_dim) &&
        256 * tiles_of(256) <= kSmallTileTimeSm80 * 128 * tiles_of(128)) {
      tile = 256;
    }
    row_tiles = tiles_of(tile);
    const int blocks_per_sm = tile == 256 ? 1 : 2;
    shares = std::max(1, blocks_per_sm * current_device().num_sms / row_tiles);
  }
};

template <typename Tile>
void launch(const PagedAttentionParams& p, void* workspace, cudaStream_t stream) {
  static_assert(Tile::kTokens == kTile);
  const Grid grid(p);
  const QueryPartials partials = query_partials(p, grid.shares, kTile, workspace);
  const auto kernel = query_sm80_kernel<Tile>;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSmemBytes),
      "query_sm80 shared memory");
  launch_dependent(kernel, dim3(grid.row_tiles, grid.shares), Tile::kThreads, Tile::kSmemBytes,
                   stream, "query_sm80", p, partials);
  merge_query_partials(p, partials, stream);
}

template <typename T, int kHeadDim, typename Kv>
void launch(const PagedAttentionParams& p, void* workspace, cudaStream_t stream) {
  switch (Grid(p).tile) {
    case 16:
      return launch<TileSm80<T, kHeadDim, 1, 4, 1, Kv>>(p, workspace, stream);
    case 64:
      return launch<TileSm80<T, kHeadDim, 4, 1, 1, Kv>>(p, workspace, stream);
    case 128:
      return launch<TileSm80<T, kHeadDim, 4, 1, 2, Kv>>(p, workspace, stream);
    default:
      return launch<TileSm80<T, kHeadDim, 8, 1, 2, Kv>>(p, workspace, stream);
  }
}

}  // namespace star_attention::query_sm80
