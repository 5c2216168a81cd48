// Context attention (phase 1) on Hopper: many query rows a sequence.
#pragma once

#include "star_attention/attention.h"

namespace star_attention {

// Device memory that a launch needs, 4-byte aligned; contents do not matter before or after.
size_t context_attention_sm90_workspace_bytes();

void context_attention_sm90(const PagedAttentionParams& params, void* workspace,
                            cudaStream_t stream);

}  // namespace star_attention
