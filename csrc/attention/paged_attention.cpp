#include "star_attention/paged_attention.h"

#include <cmath>

#include "attention/kernels.h"
#include "common/check.h"
#include "common/device.h"

namespace star_attention {
namespace {

// Up to so many rows of a KV head, loading K and V takes longer than multiplying them on either
// path.
constexpr int kMemoryBoundRows = 64;
// From so many rows of all query heads for each multiprocessor on, the sm_90a context kernel has
// work for (nearly) all of them without splitting KV, which is faster.
constexpr int kRowsThatFillSm90 = 115;

#ifdef STAR_ATTENTION_SM90
constexpr bool kBuiltSm90 = true;
#else
constexpr bool kBuiltSm90 = false;
#endif
AttentionKernel resolve(const PagedAttentionParams& p, AttentionKernel kernel) {
  const int capability = current_device().compute_capability;
  const bool sm90 = kBuiltSm90 && capability == 90;
  if (kernel == AttentionKernel::kAuto) {
    const int64_t rows = int64_t{p.max_q_len} * p.num_q_heads;
    const bool fills = sm90 && rows >= int64_t{kRowsThatFillSm90} * current_device().num_sms;
    if (p.max_q_len > kMaxQueryTokens || fills) {
      kernel = sm90 ? AttentionKernel::kContextSm90 : AttentionKernel::kContextSm80;
    } else {
      const bool few = rows / p.num_kv_heads <= kMemoryBoundRows;
      kernel = sm90 && !few ? AttentionKernel::kQuerySm90 : AttentionKernel::kQuerySm80;
    }
  }
  require(
      sm90 || (kernel != AttentionKernel::kQuerySm90 && kernel != AttentionKernel::kContextSm90),
      "kernel", "one for sm_90",
      kBuiltSm90 ? "a device of compute capability 9.0" : "a build with STAR_ATTENTION_ARCHS 90a");
  return kernel;
}

}  // namespace

void check(const PagedAttentionParams& p) {
  require(p.dtype != DType::kFloat32, "q.dtype", "float32", "float16 or bfloat16");
  require(p.o_dtype == p.dtype || p.o_dtype == DType::kFloat32, "o.dtype", "another 16-bit type",
          "q's dtype or float32");
  require(p.num_kv_heads > 0, "num_kv_heads", p.num_kv_heads, "at least 1");
  require(p.num_q_heads > 0 && p.num_q_heads % p.num_kv_heads == 0, "num_q_heads", p.num_q_heads,
          "a multiple of num_kv_heads = " + std::to_string(p.num_kv_heads));
  require(p.head_dim == 64 || p.head_dim == 128, "head_dim", p.head_dim, "64 or 128");
  require(p.tokens_per_block == 64 || p.tokens_per_block == 128, "tokens_per_block",
          p.tokens_per_block, "64 or 128");
  require(std::isfinite(p.scale) && p.scale > 0.f, "scale", p.scale, "a positive number");
  require(p.q_stride % 8 == 0, "q.stride(0)", p.q_stride, "a multiple of 8 elements");
  require(p.num_tokens >= 0, "num_tokens", p.num_tokens, "at least 0");
  require(int64_t{p.max_q_len} * p.num_seqs >= p.num_tokens, "max_q_len", p.max_q_len,
          "a bound of the longest of " + std::to_string(p.num_seqs) + " sequences with " +
              std::to_string(p.num_tokens) + " tokens in all");
  const int64_t capacity = int64_t{p.page_table_stride} * p.tokens_per_block;
  require(p.max_kv_len >= 0 && p.max_kv_len <= capacity, "max_kv_len", p.max_kv_len,
          "at most the " + std::to_string(capacity) + " tokens that a row of page_table lists");
  require(p.num_pages > 0 && p.num_pages * 2 * p.num_kv_heads <= INT32_MAX, "kv_pool.shape[0]",
          p.num_pages, "at least 1 and at most 2^31 / (2 num_kv_heads) pages");
  if (p.num_tokens == 0) return;
  require(p.num_seqs > 0, "num_seqs", p.num_seqs, "at least 1");
  require_pointer(p.q, "q", 16);
  require_pointer(p.kv_pool, "kv_pool", 16);
  if (p.page_table_stride > 0) require_pointer(p.page_table, "page_table");
  require_pointer(p.cu_seqlens_q, "cu_seqlens_q");
  require_pointer(p.kv_lens, "kv_lens");
  require_pointer(p.o, "o", 16);
  require_pointer(p.lse, "lse");
}

size_t paged_attention_workspace(const PagedAttentionParams& p, AttentionKernel kernel) {
  check(p);
  if (p.num_tokens == 0) return 0;
  switch (resolve(p, kernel)) {
    case AttentionKernel::kQuerySm80:
      return query_attention_sm80_workspace(p);
#ifdef STAR_ATTENTION_SM90
    case AttentionKernel::kQuerySm90:
      return query_attention_sm90_workspace(p);
    case AttentionKernel::kContextSm90:
      return context_attention_sm90_workspace_bytes();
#endif
    default:
      return 0;
  }
}

void paged_attention(const PagedAttentionParams& p, void* workspace, size_t workspace_bytes,
                     cudaStream_t stream, AttentionKernel kernel) {
  const size_t needed = paged_attention_workspace(p, kernel);
  if (p.num_tokens == 0) return;
  require(workspace_bytes >= needed, "workspace", std::to_string(workspace_bytes) + " bytes",
          "at least " + std::to_string(needed));
  if (needed > 0) require_pointer(workspace, "workspace", 16);
  switch (resolve(p, kernel)) {
    case AttentionKernel::kQuerySm80:
      return query_attention_sm80(p, workspace, stream);
    case AttentionKernel::kContextSm80:
      return context_attention_sm80(p, stream);
#ifdef STAR_ATTENTION_SM90
    case AttentionKernel::kQuerySm90:
      return query_attention_sm90(p, workspace, stream);
    case AttentionKernel::kContextSm90:
      return context_attention_sm90(p, workspace, stream);
#endif
    default:
      return;
  }
}

}  // namespace star_attention
