// The product of skinny_linear() on sm_90.
#pragma once

#include "star_attention/layers.h"

namespace star_attention {

// Whose x fits into a block's shared memory beside the weights; 0 where rows are not aligned.
int max_skinny_tokens_sm90(int in_features, int smem_per_block);
void skinny_linear_sm90(const SkinnyLinearParams& params, cudaStream_t stream);

}  // namespace star_attention
