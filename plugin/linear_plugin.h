// x weight^T + addend by cuBLAS, for few rows by skinny_linear(), for TensorRT: TensorRT 8's own
// kernels for fp16 add up in fp16.
#pragma once

#include "operator.h"

namespace star_attention {

// x [T, K], weight [N, K]; with an addend, a last input: a bias [N], or [T, N] as it is summed up.
//
// In FP8, weight is int32 [N, K / 4], four e4m3 each, and int32 [N] follows it, the bits of its
// rows' float32 scales: TensorRT 8 has no 8-bit tensors without scales of its own, and may convert
// constants that are floats. x is quantised here.
template <bool kFp8, bool kAddend>
class LinearOpOf : public Operator<NoAttributes> {
 public:
  using Operator::Operator;
  static constexpr const char* kName = kFp8 ? (kAddend ? "StarLinearFp8Add" : "StarLinearFp8")
                                            : (kAddend ? "StarLinearAdd" : "StarLinear");

  int num_inputs() const { return kNumWeights + 1 + kAddend; }
  nvinfer1::DataType input_type(int input, nvinfer1::DataType dtype) const {
    return kFp8 && input <= kNumWeights ? nvinfer1::DataType::kINT32 : dtype;
  }
  nvinfer1::DimsExprs output_dims(const nvinfer1::DimsExprs* inputs,
                                  nvinfer1::IExprBuilder& builder) const;
  size_t workspace_bytes(int64_t num_rows, int64_t in_features) const;
  void run(const PluginCall& call);

 private:
  static constexpr int kNumWeights = kFp8 ? 2 : 1;  // inputs behind x
};

using LinearOp = LinearOpOf<false, false>;
using LinearAddOp = LinearOpOf<false, true>;
using LinearFp8Op = LinearOpOf<true, false>;
using LinearFp8AddOp = LinearOpOf<true, true>;

}  // namespace star_attention
