#include "common/check.h"
#include "common/device.h"
#include "layers/skinny_linear_fp8.h"
#include "layers/skinny_linear_sm90.h"

namespace star_attention {

int max_skinny_tokens(int in_features) {
#ifdef STAR_ATTENTION_SM90
  const DeviceInfo& device = current_device();
  if (device.compute_capability == 90) {
    return max_skinny_tokens_sm90(in_features, device.smem_per_block);
  }
#endif
  return 0;
}

int max_skinny_tokens_fp8(int in_features) {
  return max_skinny_tokens_fp8(in_features, current_device().smem_per_block);
}

void check(const SkinnyLinearParams& p) {
  require(p.dtype != DType::kFloat32, "x.dtype", "float32", "float16 or bfloat16");
  require(p.in_features > 0, "x.shape[1]", p.in_features, "at least 1");
  const int most =
      p.scales ? max_skinny_tokens_fp8(p.in_features) : max_skinny_tokens(p.in_features);
  require(p.num_tokens >= 0 && p.num_tokens <= most, "x.shape[0]", p.num_tokens,
          "at most " + std::to_string(most) + " of this width on this GPU");
  require(p.out_features > 0, "weight.shape[0]", p.out_features, "at least 1");
  require(p.x_stride % 8 == 0, "x.stride(0)", p.x_stride, "a multiple of 8 elements");
  if (p.num_tokens == 0) return;
  require_pointer(p.x, "x", 16);
  require_pointer(p.weight, "weight", 16);
  require_pointer(p.out, "out", 2);
}

void skinny_linear(const SkinnyLinearParams& p, cudaStream_t stream) {
  check(p);
  if (p.num_tokens == 0) return;
#ifdef STAR_ATTENTION_SM90
  // Rows in FP8 are then aligned in any case.
  if (p.num_tokens <= max_skinny_tokens(p.in_features)) return skinny_linear_sm90(p, stream);
#endif
  skinny_linear_fp8(p, stream);
}

}  // namespace star_attention
