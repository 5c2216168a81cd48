#include "star_attention/paged_attention.h"

#include <algorithm>
#include <cmath>

#include "attention/kernels.h"
#include "common/check.h"
#include "common/device.h"
#include "common/numeric.cuh"

namespace star_attention {
namespace {

// Up to so many rows of a KV head, loading K and V takes longer than multiplying them on either
// path.
constexpr int kMemoryBoundRows = 64;

#ifdef STAR_ATTENTION_SM90
constexpr bool kBuiltSm90 = true;
#else
constexpr bool kBuiltSm90 = false;
#endif

bool use_sm90() { return kBuiltSm90 && current_device().compute_capability == 90; }

bool is_memory_bound(const PagedAttentionParams& p) {
  return int64_t{p.max_q_len} * (p.num_q_heads / p.num_kv_heads) <= kMemoryBoundRows;
}

// The query kernel for so many rows.
AttentionKernel query_kernel(const PagedAttentionParams& p) {
  const bool is_8bit = p.kv_scales != nullptr;
  return use_sm90() && !is_memory_bound(p) && !is_8bit ? AttentionKernel::kQuerySm90
                                                       : AttentionKernel::kQuerySm80;
}

QueryPlan query_plan(const PagedAttentionParams& p, AttentionKernel kernel) {
#ifdef STAR_ATTENTION_SM90
  if (kernel == AttentionKernel::kQuerySm90) return query_attention_sm90_plan(p);
#endif
  return query_attention_sm80_plan(p);
}

double context_steps(const PagedAttentionParams& p) {
#ifdef STAR_ATTENTION_SM90
  if (use_sm90()) return context_attention_sm90_steps(p);
#endif
  return context_attention_sm80_steps(p);
}

// Whether cutting the KV into shares is faster than giving each tile of rows to one block.
bool splitting_pays(const PagedAttentionParams& p) {
  if (p.by_head) return false;
  if (is_memory_bound(p) || p.kv_scales != nullptr) return true;
  const QueryPlan plan = query_plan(p, query_kernel(p));
  return plan.shares > 1 && plan.steps < context_steps(p);
}

AttentionKernel resolve(const PagedAttentionParams& p, AttentionKernel kernel) {
  const bool sm90 = use_sm90();
  if (kernel == AttentionKernel::kAuto) {
    kernel = splitting_pays(p) ? query_kernel(p)
             : sm90            ? AttentionKernel::kContextSm90
                               : AttentionKernel::kContextSm80;
  }
  const bool is_query =
      kernel == AttentionKernel::kQuerySm80 || kernel == AttentionKernel::kQuerySm90;
  require(!(p.by_head && is_query), "kernel", "one for queries",
          "one for contexts: lists are by head");
  require(p.kv_scales == nullptr || kernel == AttentionKernel::kQuerySm80, "kernel", "another one",
          "query_sm80 or auto: pages are of 8 bits");
  require(
      sm90 || (kernel != AttentionKernel::kQuerySm90 && kernel != AttentionKernel::kContextSm90),
      "kernel", "one for sm_90",
      kBuiltSm90 ? "a device of compute capability 9.0" : "a build with STAR_ATTENTION_ARCHS 90a");
  return kernel;
}

}  // namespace

void check(const PagedAttentionParams& p) {
  require(p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16, "q.dtype", name_of(p.dtype),
          "float16 or bfloat16");
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
  const auto countable = [&](int64_t pages) { return pages * 2 * p.num_kv_heads <= INT32_MAX; };
  require(p.num_pages > 0 && countable(p.num_pages), "kv_pool.shape[0]", p.num_pages,
          "at least 1 and at most 2^31 / (2 num_kv_heads) pages");
  require(p.other_pool == nullptr || (p.num_other_pages > 0 && countable(p.num_other_pages)),
          "other_pool.shape[0]", p.num_other_pages,
          "at least 1 and at most 2^31 / (2 num_kv_heads) pages");
  if (p.kv_scales != nullptr) {
    require(p.kv_dtype == DType::kFloat8 || p.kv_dtype == DType::kInt8, "kv_pool.dtype",
            name_of(p.kv_dtype), "float8_e4m3 or int8 with kv_scales");
    require(!p.by_head && p.other_pool == nullptr, "page_table", "lists by head",
            "lists of pages: they are of 8 bits");
    require_pointer(p.kv_scales, "kv_scales");
  }
  require(!p.by_head || !p.causal, "causal", "true", "false: lists are by head");
  require(p.starts == nullptr || (!p.by_head && p.kv_scales == nullptr), "starts", "given",
          "none: lists are by head, or pages are of 8 bits");
  if (p.num_tokens == 0) return;
  require(p.num_seqs > 0, "num_seqs", p.num_seqs, "at least 1");
  require_pointer(p.q, "q", 16);
  require_pointer(p.kv_pool, "kv_pool", 16);
  if (p.other_pool != nullptr) require_pointer(p.other_pool, "other_pool", 16);
  if (p.page_table_stride > 0) require_pointer(p.page_table, "page_table");
  require_pointer(p.cu_seqlens_q, "cu_seqlens_q");
  require_pointer(p.kv_lens, "kv_lens");
  require_pointer(p.o, "o", 16);
  require_pointer(p.lse, "lse");
}

size_t paged_attention_workspace(const PagedAttentionParams& p, AttentionKernel kernel) {
  check(p);
  if (p.num_tokens == 0) return 0;
  kernel = resolve(p, kernel);
  switch (kernel) {
    case AttentionKernel::kQuerySm80:
    case AttentionKernel::kQuerySm90:
      return query_plan(p, kernel).workspace;
#ifdef STAR_ATTENTION_SM90
    case AttentionKernel::kContextSm90:
      return context_attention_sm90_workspace();
#endif
    default:
      return 0;
  }
}

size_t most_paged_attention_workspace(PagedAttentionParams p) {
  check(p);
  size_t most = 0;
#ifdef STAR_ATTENTION_SM90
  most = context_attention_sm90_workspace();
#endif
  const int max_q_len = p.max_q_len;
  for (p.max_q_len = 1; p.max_q_len <= max_q_len; ++p.max_q_len) {
    const QueryPlan plan = query_plan(p, query_kernel(p));
    const bool takes_query_kernel = is_memory_bound(p) || p.kv_scales != nullptr;
    if (plan.shares == 1 && !takes_query_kernel) break;  // nor are there more with more rows
    most = std::max(most, plan.workspace);
  }
  return most;
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
