// The attention kernels behind paged_attention, one file each. They trust their arguments.
#pragma once

#include "attention/context_sm90.h"
#include "star_attention/attention.h"

namespace star_attention {

void context_attention_sm80(const PagedAttentionParams& params, cudaStream_t stream);

size_t query_attention_sm80_workspace(const PagedAttentionParams& params);
void query_attention_sm80(const PagedAttentionParams& params, void* workspace, cudaStream_t stream);

size_t query_attention_sm90_workspace(const PagedAttentionParams& params);
void query_attention_sm90(const PagedAttentionParams& params, void* workspace, cudaStream_t stream);

}  // namespace star_attention
