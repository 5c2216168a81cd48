// x weight^T + addend by cuBLAS, for few rows by skinny_linear(), for TensorRT: TensorRT 8's own
// kernels for fp16 add up in fp16.
#pragma once

#include "operator.h"

namespace star_attention {

// x [T, K], weight [N, K]; with an addend, a third input: a bias [N], or [T, N] as it is summed up.
template <bool kAddend>
class LinearOpOf : public Operator<NoAttributes> {
 public:
  using Operator::Operator;
  static constexpr const char* kName = kAddend ? "StarLinearAdd" : "StarLinear";

  int num_inputs() const { return kAddend ? 3 : 2; }
  nvinfer1::DimsExprs output_dims(const nvinfer1::DimsExprs* inputs,
                                  nvinfer1::IExprBuilder& builder) const;
  size_t workspace_bytes(int64_t num_rows) const;
  void run(const PluginCall& call);
};

using LinearOp = LinearOpOf<false>;
using LinearAddOp = LinearOpOf<true>;

}  // namespace star_attention
