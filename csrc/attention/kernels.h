// The attention kernels behind paged_attention, one file each. They trust their arguments.
//
// Context kernels give a tile of rows to one block, which walks all it sees; query kernels cut the
// KV of a tile into shares and merge their results. `steps` estimates the time of the busiest
// multiprocessor, in units of a full tile of rows times 128 tokens, to compare the two on one path.
#pragma once

#include <cstddef>

#include "star_attention/attention.h"

namespace star_attention {

struct QueryPlan {
  int shares;  // of KV; 1: nothing is cut
  size_t workspace;
  double steps;
};

void context_attention_sm80(const PagedAttentionParams& params, cudaStream_t stream);
double context_attention_sm80_steps(const PagedAttentionParams& params);

void query_attention_sm80(const PagedAttentionParams& params, void* workspace, cudaStream_t stream);
void query_attention_sm80_8bit(const PagedAttentionParams& params, void* workspace,
                               cudaStream_t stream);
QueryPlan query_attention_sm80_plan(const PagedAttentionParams& params);

// Contents of the workspace do not matter before or after.
void context_attention_sm90(const PagedAttentionParams& params, void* workspace,
                            cudaStream_t stream);
size_t context_attention_sm90_workspace();
double context_attention_sm90_steps(const PagedAttentionParams& params);

void query_attention_sm90(const PagedAttentionParams& params, void* workspace, cudaStream_t stream);
QueryPlan query_attention_sm90_plan(const PagedAttentionParams& params);

}  // namespace star_attention
