// Phase 1 on sm_80 and newer: a block takes a tile of packed rows of one KV head and walks the page
// list from its start to the rows' diagonal (tile_sm80.cuh): 256 rows, or 128 on GPUs with less
// shared memory. Blocks that run together share a KV head, so that its pages are read from L2; the
// rows that see most go first, so that the causal triangle leaves no long tail.
#include "attention/kernels.h"
#include "attention/steps.h"
#include "attention/tile_sm80.cuh"
#include "common/check.h"
#include "common/device.h"

namespace star_attention {
namespace {

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    context_sm80_kernel(const __grid_constant__ PagedAttentionParams p) {
  extern __shared__ __align__(256) char smem[];
  const int group = p.num_q_heads / p.num_kv_heads;
  const SequencePosition at = locate(p.num_seqs, gridDim.x - 1 - blockIdx.x, [&](int seq) {
    return ceil_div(num_tokens_of(p, seq) * group, Tile::kRows);
  });
  if (at.seq == p.num_seqs) return;
  const SequenceRows rows(p, at.seq, blockIdx.y);
  const Tile tile(p, rows, at.seq, at.offset * Tile::kRows, 0, INT32_MAX, smem);
  tile.write(output_of(p), [&](int row) { return rows.out(p, row); });
}

template <typename Tile>
void launch_tile(const PagedAttentionParams& p, cudaStream_t stream) {
  const int64_t rows = int64_t{p.num_tokens} * (p.num_q_heads / p.num_kv_heads);
  const dim3 grid(static_cast<unsigned>(rows / Tile::kRows + p.num_seqs), p.num_kv_heads);
  const auto kernel = context_sm80_kernel<Tile>;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSmemBytes),
      "context_sm80 shared memory");
  kernel<<<grid, Tile::kThreads, Tile::kSmemBytes, stream>>>(p);
}

template <typename T, int kHeadDim>
void launch(const PagedAttentionParams& p, cudaStream_t stream) {
  using Large = TileSm80<T, kHeadDim, 8, 1, 2>;
  using Small = TileSm80<T, kHeadDim, 4, 1, 2>;
  large_tile_fits_sm80(kHeadDim) ? launch_tile<Large>(p, stream) : launch_tile<Small>(p, stream);
}

}  // namespace

double context_attention_sm80_steps(const PagedAttentionParams& p) {
  const int group = p.num_q_heads / p.num_kv_heads;
  return large_tile_fits_sm80(p.head_dim)
             ? context_steps(p, 256, group, p.num_kv_heads, 1)
             : context_steps(p, 128, group, p.num_kv_heads, 2) * kSmallTileTimeSm80;
}

void context_attention_sm80(const PagedAttentionParams& p, cudaStream_t stream) {
  dispatch_16bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.head_dim == 128 ? launch<T, 128>(p, stream) : launch<T, 64>(p, stream);
  });
  check_launch("context_sm80");
}

}  // namespace star_attention
