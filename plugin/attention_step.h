// One attention layer of one step, without TensorRT.
#pragma once

#include "star_attention/step_context.h"

namespace star_attention {

struct AttentionLayer {
  int32_t layer;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
};

// Device memory.
struct StepTensors {
  DType dtype;  // of qkv, q and out
  int num_tokens;
  int num_seqs;
  int page_table_stride;

  const void* qkv;              // [num_tokens, (num_q_heads + 2 num_kv_heads) * head_dim]
  const int32_t* position_ids;  // [num_tokens]
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const int32_t* kv_lens;       // [num_seqs]
  const int32_t* page_table;    // [num_seqs, page_table_stride]
  const int32_t* slot_mapping;  // [num_tokens]
  const float* rotary;          // [max_position, head_dim]

  void* q;     // [num_tokens, num_q_heads * head_dim], for the call
  float* lse;  // [num_tokens, num_q_heads], for the call
  void* out;   // [num_tokens, num_q_heads * head_dim]
};

// Throws std::invalid_argument if layer and step do not fit together.
void run_attention(const AttentionLayer& layer, const StepTensors& tensors,
                   const StepContext& context, cudaStream_t stream);

// Throws std::invalid_argument if the kernels do not know such a layer.
void check(const AttentionLayer& layer);

}  // namespace star_attention
