#include "attention_step.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "star_attention/merge.h"
#include "star_attention/paged_attention.h"
#include "star_attention/rope.h"

namespace star_attention {
namespace {

constexpr size_t kElementBytes = 2;  // float16 and bfloat16

// Of attention whose outputs are merged: in float32 until then. Each begins aligned.
class Partials {
 public:
  Partials(int num_tokens, int num_q_heads, int head_dim, bool has_prefix)
      : rows_(int64_t{num_tokens} * num_q_heads), head_dim_(head_dim), has_prefix_(has_prefix) {}

  // [num_tokens, num_q_heads, head_dim] of this rank; and of prefix and own pages, with lse
  // [2, num_tokens, num_q_heads] behind them.
  size_t o() const { return 0; }
  size_t shards() const { return o() + rounded(o_bytes()); }
  size_t shards_lse() const { return shards() + rounded(2 * o_bytes()); }
  size_t bytes() const {
    return has_prefix_ ? shards_lse() + rounded(2 * sizeof(float) * rows_) : shards();
  }

 private:
  size_t o_bytes() const { return sizeof(float) * rows_ * head_dim_; }
  static size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

  int64_t rows_;
  int head_dim_;
  bool has_prefix_;
};

void store_kv(const AttentionLayer& layer, const StepTensors& tensors, const StepContext& context,
              void* kv_pool, cudaStream_t stream) {
  RopeAppendParams p{};
  p.dtype = tensors.dtype;
  p.num_q_heads = layer.num_q_heads;
  p.num_kv_heads = layer.num_kv_heads;
  p.head_dim = layer.head_dim;
  p.tokens_per_block = context.tokens_per_block;
  p.qkv = tensors.qkv;
  p.qkv_stride = int64_t{layer.num_q_heads + 2 * layer.num_kv_heads} * layer.head_dim;
  p.positions = tensors.position_ids;
  p.rotary = tensors.rotary;
  p.slot_mapping = tensors.slot_mapping;
  p.num_tokens = tensors.num_tokens;
  p.q = tensors.q;
  p.kv_pool = kv_pool;
  rope_append(p, stream);
}

// Of a sequence's own pages, without o and lse.
PagedAttentionParams own_pages(const AttentionLayer& layer, const StepTensors& tensors,
                               const StepContext& context, const void* kv_pool) {
  PagedAttentionParams p{};
  p.dtype = p.o_dtype = tensors.dtype;
  p.num_q_heads = layer.num_q_heads;
  p.num_kv_heads = layer.num_kv_heads;
  p.head_dim = layer.head_dim;
  p.tokens_per_block = context.tokens_per_block;
  p.causal = context.causal;
  p.scale = 1.f / std::sqrt(static_cast<float>(layer.head_dim));
  p.q = tensors.q;
  p.q_stride = int64_t{layer.num_q_heads} * layer.head_dim;
  p.kv_pool = kv_pool;
  p.num_pages = context.num_pages;
  p.page_table = tensors.page_table;
  p.page_table_stride = tensors.page_table_stride;
  p.cu_seqlens_q = tensors.cu_seqlens_q;
  p.kv_lens = tensors.kv_lens;
  p.num_seqs = tensors.num_seqs;
  p.num_tokens = tensors.num_tokens;
  p.max_q_len = std::min(context.max_q_len, tensors.num_tokens);
  p.max_kv_len = context.max_kv_len;
  return p;
}

// The same rows over the pages of 8 bits that have the pool's memory.
PagedAttentionParams prefix_pages(PagedAttentionParams p, const AttentionLayer& layer,
                                  const StepContext& context) {
  const QuantizedPrefix& prefix = context.prefix;
  p.causal = false;
  p.num_pages = 2 * context.num_pages;
  p.kv_scales = prefix.scales + layer.layer * p.num_pages * 2 * layer.num_kv_heads;
  p.kv_dtype = prefix.kv_dtype;
  p.page_table = prefix.page_table;
  p.page_table_stride = prefix.page_table_stride;
  p.kv_lens = prefix.kv_lens;
  p.max_kv_len = prefix.max_kv_len;
  return p;
}

// Of a rank's prefix and own pages, o and lse as `p` says.
void attend_with_prefix(const AttentionLayer& layer, const StepContext& context,
                        const PagedAttentionParams& p, void* shards, float* shards_lse,
                        void* workspace, int64_t workspace_bytes, cudaStream_t stream) {
  const int64_t rows = int64_t{p.num_tokens} * p.num_q_heads;
  PagedAttentionParams lists[] = {prefix_pages(p, layer, context), p};
  for (int i = 0; i < 2; ++i) {
    lists[i].o_dtype = DType::kFloat32;
    lists[i].o = static_cast<float*>(shards) + i * rows * p.head_dim;
    lists[i].lse = shards_lse + i * rows;
    paged_attention(lists[i], workspace, workspace_bytes, stream);
  }
  MergeLseParams m{};
  m.dtype = DType::kFloat32;
  m.out_dtype = p.o_dtype;
  m.num_shards = 2;
  m.num_tokens = p.num_tokens;
  m.num_heads = p.num_q_heads;
  m.head_dim = p.head_dim;
  m.o = shards;
  m.o_shard_stride = rows * p.head_dim;
  m.o_token_stride = int64_t{p.num_q_heads} * p.head_dim;
  m.lse = shards_lse;
  m.lse_shard_stride = rows;
  m.lse_token_stride = p.num_q_heads;
  m.out = p.o;
  m.out_lse = p.lse;
  merge_lse(m, stream);
}

void attend(const AttentionLayer& layer, const StepTensors& tensors, const StepContext& context,
            const void* kv_pool, cudaStream_t stream) {
  char* const partials = static_cast<char*>(context.workspace);
  char* workspace = partials;
  int64_t workspace_bytes = context.workspace_bytes;
  const bool has_prefix = context.prefix.kv_lens != nullptr;
  const Partials places(tensors.num_tokens, layer.num_q_heads, layer.head_dim, has_prefix);
  if (context.merge || has_prefix) {
    require(static_cast<size_t>(workspace_bytes) >= places.bytes(), "workspace",
            std::to_string(workspace_bytes) + " bytes",
            "what step_workspace_bytes says for " + std::to_string(tensors.num_tokens) +
                " tokens that are merged");
    workspace += places.bytes();
    workspace_bytes -= places.bytes();
  }

  PagedAttentionParams p = own_pages(layer, tensors, context, kv_pool);
  if (context.merge) p.o_dtype = DType::kFloat32;
  p.o = context.merge ? partials + places.o() : tensors.out;
  p.lse = tensors.lse;
  if (has_prefix) {
    attend_with_prefix(layer, context, p, partials + places.shards(),
                       reinterpret_cast<float*>(partials + places.shards_lse()), workspace,
                       workspace_bytes, stream);
  } else {
    paged_attention(p, workspace, workspace_bytes, stream);
  }
  if (!context.merge) return;

  PeerMergeParams m{};
  m.dtype = p.o_dtype;
  m.out_dtype = tensors.dtype;
  m.num_tokens = tensors.num_tokens;
  m.num_heads = layer.num_q_heads;
  m.head_dim = layer.head_dim;
  m.o = p.o;
  m.lse = tensors.lse;
  m.out = tensors.out;
  context.merge->merge(m, stream);
}

}  // namespace

void check(const AttentionLayer& layer) {
  require(layer.layer >= 0, "layer", layer.layer, "at least 0");
  require(layer.head_dim == 64 || layer.head_dim == 128, "head_dim", layer.head_dim, "64 or 128");
  require(layer.num_kv_heads > 0, "num_kv_heads", layer.num_kv_heads, "at least 1");
  require(layer.num_q_heads > 0 && layer.num_q_heads % layer.num_kv_heads == 0, "num_q_heads",
          layer.num_q_heads, "a multiple of num_kv_heads = " + std::to_string(layer.num_kv_heads));
}

void run_attention(const AttentionLayer& layer, const StepTensors& tensors,
                   const StepContext& context, cudaStream_t stream) {
  require(layer.layer < context.num_layers, "kv_pool",
          std::to_string(context.num_layers) + " layers", "one for each layer of the engine");
  require(context.attending_layers <= context.num_layers, "attending_layers",
          context.attending_layers, "at most " + std::to_string(context.num_layers));
  const size_t page_bytes =
      kElementBytes * 2 * layer.num_kv_heads * context.tokens_per_block * layer.head_dim;
  char* const kv_pool =
      static_cast<char*>(context.kv_pool) + layer.layer * context.num_pages * page_bytes;

  store_kv(layer, tensors, context, kv_pool, stream);
  if (context.exchange) {
    context.exchange->exchange(kv_pool, context.num_pages, page_bytes, stream);
    if (layer.layer == context.num_layers - 1) context.exchange->finish(stream);
  }
  if (layer.layer >= context.attending_layers) return;
  attend(layer, tensors, context, kv_pool, stream);
}

size_t step_workspace_bytes(int num_q_heads, int num_kv_heads, int head_dim, int max_q_len,
                            int max_merge_tokens, bool has_prefix) {
  alignas(256) static char somewhere[256];  // the checks want addresses; nobody reads them
  PagedAttentionParams p{};
  p.dtype = DType::kFloat16;
  p.o_dtype = DType::kFloat32;
  p.num_q_heads = num_q_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.tokens_per_block = 128;
  p.scale = 1.f;
  p.q = p.kv_pool = p.o = somewhere;
  p.page_table = p.cu_seqlens_q = p.kv_lens = reinterpret_cast<int32_t*>(somewhere);
  p.lse = reinterpret_cast<float*>(somewhere);
  p.num_pages = p.num_seqs = p.num_tokens = 1;
  p.max_q_len = std::max(1, max_q_len);
  size_t most = most_paged_attention_workspace(p);
  if (has_prefix) {
    p.kv_scales = reinterpret_cast<float*>(somewhere);
    p.kv_dtype = DType::kFloat8;
    p.max_q_len = std::min(p.max_q_len, std::max(1, max_merge_tokens));
    most = std::max(most, most_paged_attention_workspace(p));
  }
  return Partials(max_merge_tokens, num_q_heads, head_dim, has_prefix).bytes() + most;
}

}  // namespace star_attention
