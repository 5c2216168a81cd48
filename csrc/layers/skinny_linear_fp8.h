// The product of skinny_linear() with weights in FP8.
#pragma once

#include "star_attention/layers.h"

namespace star_attention {

// Whose x fits into a block's shared memory; 0 where rows are not aligned.
int max_skinny_tokens_fp8(int in_features, int smem_per_block);
void skinny_linear_fp8(const SkinnyLinearParams& params, cudaStream_t stream);

}  // namespace star_attention
