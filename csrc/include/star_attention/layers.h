// What a Llama model needs between its GEMMs and attention, one pass over memory each.
//
// Rows in FP8 are e4m3 with a float32 scale each, the row's largest magnitude over 448: a row of
// `out` stands for itself times its scale. Where `scales` is null, `out` is of `dtype`.
#pragma once

#include "star_attention/attention.h"

namespace star_attention {

// out = x / sqrt(mean(x²) + eps) * weight
struct RmsNormParams {
  DType dtype;  // kFloat16 or kBFloat16
  int num_tokens;
  int hidden_size;  // a multiple of 8, at most 32768
  float eps;

  const void* x;  // [num_tokens, hidden_size], rows x_stride elements apart
  int64_t x_stride;
  const void* weight;  // [hidden_size]
  void* out;           // [num_tokens, hidden_size], contiguous; in `dtype`, may be x
  float* scales;       // [num_tokens]: out is in FP8; or null
};

STAR_ATTENTION_EXPORT void rms_norm(const RmsNormParams& params, cudaStream_t stream);

// out = silu(gate) * up, gate and up being the halves of each row of `gate_up`.
struct SiluMulParams {
  DType dtype;  // kFloat16 or kBFloat16
  int num_tokens;
  int intermediate_size;  // a multiple of 8; in FP8, at most 32768

  const void* gate_up;  // [num_tokens, 2 * intermediate_size], rows stride elements apart
  int64_t stride;
  void* out;      // [num_tokens, intermediate_size], contiguous
  float* scales;  // [num_tokens]: out is in FP8; or null
};

STAR_ATTENTION_EXPORT void silu_mul(const SiluMulParams& params, cudaStream_t stream);

// out, scales = x in FP8
struct QuantizeRowsParams {
  DType dtype;  // kFloat16 or kBFloat16
  int num_rows;
  int width;  // a multiple of 8, at most 32768

  const void* x;  // [num_rows, width], rows x_stride elements apart
  int64_t x_stride;
  void* out;      // [num_rows, width], contiguous
  float* scales;  // [num_rows]
};

STAR_ATTENTION_EXPORT void quantize_rows(const QuantizeRowsParams& params, cudaStream_t stream);

// out[i] = x[rows[i]], of 16-bit elements.
struct GatherRowsParams {
  int num_rows;
  int width;  // a multiple of 8

  const void* x;        // [any, width], contiguous
  const int32_t* rows;  // [num_rows], rows of x
  void* out;            // [num_rows, width], contiguous
};

STAR_ATTENTION_EXPORT void gather_rows(const GatherRowsParams& params, cudaStream_t stream);

// out = x weight^T + addend, for the few rows of a decode step.
struct SkinnyLinearParams {
  DType dtype;     // kFloat16 or kBFloat16
  int num_tokens;  // at most max_skinny_tokens(in_features), or max_skinny_tokens_fp8()
  int in_features, out_features;

  const void* x;  // [num_tokens, in_features], rows x_stride elements apart
  int64_t x_stride;
  const void* weight;   // [out_features, in_features], contiguous; nothing writes it meanwhile
  const float* scales;  // [out_features]: rows of weight are in FP8; or null
  const void* addend;   // [num_tokens, out_features], rows addend_stride apart, or null; may be out
  int64_t addend_stride;  // 0: a bias
  void* out;              // [num_tokens, out_features], contiguous
};

STAR_ATTENTION_EXPORT void skinny_linear(const SkinnyLinearParams& params, cudaStream_t stream);
// As many as skinny_linear() is the fastest for, on the current device; 0: it takes none.
STAR_ATTENTION_EXPORT int max_skinny_tokens(int in_features);
// Likewise with weights in FP8.
STAR_ATTENTION_EXPORT int max_skinny_tokens_fp8(int in_features);

// Throws std::invalid_argument if the call would not be valid; the call itself checks too.
STAR_ATTENTION_EXPORT void check(const RmsNormParams& params);
STAR_ATTENTION_EXPORT void check(const SiluMulParams& params);
STAR_ATTENTION_EXPORT void check(const QuantizeRowsParams& params);
STAR_ATTENTION_EXPORT void check(const GatherRowsParams& params);
STAR_ATTENTION_EXPORT void check(const SkinnyLinearParams& params);

}  // namespace star_attention
