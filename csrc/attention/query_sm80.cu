// Query attention of sm_80 over 16-bit pages.
#include "attention/query_sm80.cuh"

namespace star_attention {

QueryPlan query_attention_sm80_plan(const PagedAttentionParams& p) {
  const query_sm80::Grid grid(p);
  const double time = grid.tile == 256 ? 1 : kSmallTileTimeSm80;
  return {grid.shares, query_partials_bytes(p, grid.shares), query_steps(p, grid.shares) * time};
}

void query_attention_sm80(const PagedAttentionParams& p, void* workspace, cudaStream_t stream) {
  if (p.kv_scales != nullptr) return query_attention_sm80_8bit(p, workspace, stream);
  dispatch_16bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.head_dim == 128 ? query_sm80::launch<T, 128, T>(p, workspace, stream)
                      : query_sm80::launch<T, 64, T>(p, workspace, stream);
  });
}

}  // namespace star_attention
