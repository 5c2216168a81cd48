#include "attention_step.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "star_attention/paged_attention.h"
#include "star_attention/rope.h"

namespace star_attention {
namespace {

constexpr size_t kElementBytes = 2;  // float16 and bfloat16

// Of attention that is merged over ranks: kept in float32 until then. Rounded up, so that what
// follows is aligned.
size_t partials_bytes(int num_tokens, int num_q_heads, int head_dim) {
  const size_t bytes = sizeof(float) * num_tokens * num_q_heads * head_dim;
  return (bytes + 255) / 256 * 256;
}

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

void attend(const AttentionLayer& layer, const StepTensors& tensors, const StepContext& context,
            const void* kv_pool, cudaStream_t stream) {
  char* workspace = static_cast<char*>(context.workspace);
  int64_t workspace_bytes = context.workspace_bytes;
  void* o = tensors.out;
  if (context.merge) {
    const size_t bytes = partials_bytes(tensors.num_tokens, layer.num_q_heads, layer.head_dim);
    require(static_cast<size_t>(workspace_bytes) >= bytes, "workspace",
            std::to_string(workspace_bytes) + " bytes",
            "what step_workspace_bytes says for " + std::to_string(tensors.num_tokens) +
                " tokens that are merged");
    o = workspace;
    workspace += bytes;
    workspace_bytes -= bytes;
  }

  PagedAttentionParams p{};
  p.dtype = tensors.dtype;
  p.o_dtype = context.merge ? DType::kFloat32 : tensors.dtype;
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
  p.o = o;
  p.lse = tensors.lse;
  paged_attention(p, workspace, workspace_bytes, stream);
  if (!context.merge) return;

  PeerMergeParams m{};
  m.dtype = p.o_dtype;
  m.out_dtype = tensors.dtype;
  m.num_tokens = tensors.num_tokens;
  m.num_heads = layer.num_q_heads;
  m.head_dim = layer.head_dim;
  m.o = o;
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
                            int max_merge_tokens) {
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
  return partials_bytes(max_merge_tokens, num_q_heads, head_dim) +
         most_paged_attention_workspace(p);
}

}  // namespace star_attention
