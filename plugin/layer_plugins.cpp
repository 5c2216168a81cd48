#include "layer_plugins.h"

#include "star_attention/layers.h"

namespace star_attention {

using nvinfer1::DimsExprs;
using nvinfer1::IExprBuilder;

DimsExprs GatherRowsOp::output_dims(const DimsExprs* inputs, IExprBuilder&) const {
  DimsExprs out = inputs[0];
  out.d[0] = inputs[1].d[0];
  return out;
}

void GatherRowsOp::run(const PluginCall& call) {
  GatherRowsParams p{};
  p.num_rows = call.size(1, 0);
  p.width = call.size(0, 1);
  p.x = call.inputs[0];
  p.rows = call.ints(1);
  p.out = call.output;
  gather_rows(p, call.stream);
}

DimsExprs RmsNormOp::output_dims(const DimsExprs* inputs, IExprBuilder&) const { return inputs[0]; }

void RmsNormOp::run(const PluginCall& call) {
  RmsNormParams p{};
  p.dtype = call.dtype();
  p.num_tokens = call.size(0, 0);
  p.hidden_size = call.size(0, 1);
  p.eps = attributes().eps;
  p.x = call.inputs[0];
  p.x_stride = p.hidden_size;
  p.weight = call.inputs[1];
  p.out = call.output;
  rms_norm(p, call.stream);
}

DimsExprs SiluMulOp::output_dims(const DimsExprs* inputs, IExprBuilder& builder) const {
  DimsExprs out = inputs[0];
  out.d[1] = builder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *inputs[0].d[1],
                               *builder.constant(2));
  return out;
}

void SiluMulOp::run(const PluginCall& call) {
  SiluMulParams p{};
  p.dtype = call.dtype();
  p.num_tokens = call.size(0, 0);
  p.intermediate_size = call.size(0, 1) / 2;
  p.gate_up = call.inputs[0];
  p.stride = call.size(0, 1);
  p.out = call.output;
  silu_mul(p, call.stream);
}

}  // namespace star_attention
