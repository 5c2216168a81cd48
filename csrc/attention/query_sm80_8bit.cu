// Query attention of sm_80 over 8-bit pages.
#include "attention/query_sm80.cuh"

namespace star_attention {

void query_attention_sm80_8bit(const PagedAttentionParams& p, void* workspace,
                               cudaStream_t stream) {
  dispatch_16bit(p.dtype, [&](auto element) {
    dispatch_8bit(p.kv_dtype, [&](auto code) {
      using T = decltype(element);
      using Kv = decltype(code);
      p.head_dim == 128 ? query_sm80::launch<T, 128, Kv>(p, workspace, stream)
                        : query_sm80::launch<T, 64, Kv>(p, workspace, stream);
    });
  });
}

}  // namespace star_attention
