// What both modules' bindings of quantize_pages and dequantize_pages have in common.
#pragma once

#include "bindings/tensor_view.h"
#include "star_attention/quantize_pages.h"

namespace star_attention {

// Checks all tensors but for kv_pool's dtype, and codes. kv_pool is [num_layers, num_pages, 2,
// num_kv_heads, tokens_per_block, head_dim].
inline QuantizePagesParams quantize_pages_params(const TensorView& kv_pool,
                                                 const TensorView& scales, const TensorView& pages,
                                                 const TensorView& others) {
  kv_pool.rank(6).shape({-1, -1, 2, -1, -1, -1}).contiguous();
  const int64_t layers = kv_pool.size(0), num_pages = kv_pool.size(1), heads = kv_pool.size(3);
  scales.dtype({kFloat32}).shape({layers, 2 * num_pages, 2, heads}).contiguous();
  pages.dtype({kInt32}).rank(1).contiguous();
  others.dtype({kInt32}).shape({pages.size(0)}).contiguous();

  QuantizePagesParams p{};
  p.num_layers = to_int(layers, "kv_pool.shape[0]");
  p.num_kv_heads = to_int(heads, "kv_pool.shape[3]");
  p.head_dim = to_int(kv_pool.size(5), "kv_pool.shape[5]");
  p.tokens_per_block = to_int(kv_pool.size(4), "kv_pool.shape[4]");
  p.num_pages = num_pages;
  p.kv_pool = kv_pool.data();
  p.scales = static_cast<float*>(scales.data());
  p.pages = static_cast<const int32_t*>(pages.data());
  p.others = static_cast<const int32_t*>(others.data());
  p.count = to_int(pages.size(0), "pages.shape[0]");
  return p;
}

}  // namespace star_attention
