// What the StarAttention nodes of an engine need of a step beside its tensors: where the KV is, and
// what the ranks exchange. The engine's input `runtime_context`, an int32[2] in host memory, holds
// its address, low half first; it has to stay there until the step is enqueued.
//
// A step captured in a CUDA graph keeps the values of the capture.
#pragma once

#include <cstddef>
#include <cstdint>

#include "star_attention/page_exchange.h"
#include "star_attention/rank_merge.h"

namespace star_attention {

// Pages in 8 bits, of finished contexts, that a sequence's rows see whole before their own. They
// are in the pool's memory, as quantize_pages() leaves them.
struct QuantizedPrefix {
  DType kv_dtype = DType::kFloat8;      // or kInt8
  const float* scales = nullptr;        // [num_layers, 2 * num_pages, 2, num_kv_heads]
  const int32_t* page_table = nullptr;  // [num_seqs, page_table_stride]
  int page_table_stride = 0;
  const int32_t* kv_lens = nullptr;  // [num_seqs]; null: there is no prefix
  int max_kv_len = 0;
};

struct StepContext {
  static constexpr uint64_t kMagic = 0x0003'5354'4550'4154;  // a version and a signature

  uint64_t magic = kMagic;
  void* kv_pool = nullptr;  // [num_layers, num_pages, 2, num_kv_heads, tokens_per_block, head_dim]
  int num_layers = 0;
  int64_t num_pages = 0;
  int tokens_per_block = 128;
  bool causal = true;
  int max_q_len = 0;  // of a sequence; with max_kv_len, sizes the kernels' grids
  int max_kv_len = 0;
  int attending_layers = 0;  // later layers store their KV only: nobody wants their output

  QuantizedPrefix prefix;

  const RankMerge* merge = nullptr;  // null: this rank's attention is the whole
  PageExchange* exchange = nullptr;  // null: ranks send one another no KV

  void* workspace = nullptr;  // step_workspace_bytes() of device memory
  int64_t workspace_bytes = 0;
};

// What StepContext::workspace needs on the current device for all steps with sequences of up to
// `max_q_len` rows, of which those that are merged, over ranks or with a prefix, have up to
// `max_merge_tokens` tokens. `has_prefix`: steps may have one.
STAR_ATTENTION_EXPORT size_t step_workspace_bytes(int num_q_heads, int num_kv_heads, int head_dim,
                                                  int max_q_len, int max_merge_tokens,
                                                  bool has_prefix = false);

}  // namespace star_attention
