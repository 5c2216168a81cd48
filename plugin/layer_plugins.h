// What a layer has beside attention and its projections, for TensorRT: calls of layers.h. TensorRT
// 8 computes the same with five kernels and more, some in types of its own choice.
#pragma once

#include "operator.h"

namespace star_attention {

// x [any, width], rows int32 [R]: x's rows. x may be a table of embeddings.
class GatherRowsOp : public Operator<NoAttributes> {
 public:
  using Operator::Operator;
  static constexpr const char* kName = "StarGatherRows";

  int num_inputs() const { return 2; }
  nvinfer1::DataType input_type(int, nvinfer1::DataType) const {
    return nvinfer1::DataType::kINT32;
  }
  nvinfer1::DimsExprs output_dims(const nvinfer1::DimsExprs* inputs,
                                  nvinfer1::IExprBuilder& builder) const;
  void run(const PluginCall& call);
};

struct RmsNormAttributes {
  float eps;
};

// x [T, hidden_size], weight [hidden_size].
class RmsNormOp : public Operator<RmsNormAttributes> {
 public:
  using Operator::Operator;
  static constexpr const char* kName = "StarRmsNorm";
  static constexpr std::array<Field, 1> kFields = {{{"eps", nvinfer1::PluginFieldType::kFLOAT32}}};

  int num_inputs() const { return 2; }
  nvinfer1::DimsExprs output_dims(const nvinfer1::DimsExprs* inputs,
                                  nvinfer1::IExprBuilder& builder) const;
  void run(const PluginCall& call);
};

// gate_up [T, 2 intermediate_size].
class SiluMulOp : public Operator<NoAttributes> {
 public:
  using Operator::Operator;
  static constexpr const char* kName = "StarSiluMul";

  int num_inputs() const { return 1; }
  nvinfer1::DimsExprs output_dims(const nvinfer1::DimsExprs* inputs,
                                  nvinfer1::IExprBuilder& builder) const;
  void run(const PluginCall& call);
};

}  // namespace star_attention
