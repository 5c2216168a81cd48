// What a layer has beside attention and its projections, for TensorRT: calls of layers.h. TensorRT
// 8 computes the same with five kernels and more, some in types of its own choice.
#pragma once

#include "plugin.h"

namespace star_attention {

// x [any, width], rows int32 [R]: x's rows. x may be a table of embeddings.
class GatherRowsOp {
 public:
  static constexpr const char* kName = "StarGatherRows";
  struct Attributes {};
  static constexpr std::array<Field, 0> kFields = {};

  explicit GatherRowsOp(const Attributes&) {}

  int num_inputs() const { return 2; }
  nvinfer1::DataType input_type(int, nvinfer1::DataType) const {
    return nvinfer1::DataType::kINT32;
  }
  nvinfer1::DimsExprs output_dims(const nvinfer1::DimsExprs* inputs,
                                  nvinfer1::IExprBuilder& builder) const;
  size_t workspace_bytes(const nvinfer1::PluginTensorDesc*) const { return 0; }
  void run(const PluginCall& call);
};

// x [T, hidden_size], weight [hidden_size].
class RmsNormOp {
 public:
  static constexpr const char* kName = "StarRmsNorm";
  struct Attributes {
    float eps;
  };
  static constexpr std::array<Field, 1> kFields = {{{"eps", nvinfer1::PluginFieldType::kFLOAT32}}};

  explicit RmsNormOp(const Attributes& attributes) : eps_(attributes.eps) {}

  int num_inputs() const { return 2; }
  nvinfer1::DataType input_type(int, nvinfer1::DataType dtype) const { return dtype; }
  nvinfer1::DimsExprs output_dims(const nvinfer1::DimsExprs* inputs,
                                  nvinfer1::IExprBuilder& builder) const;
  size_t workspace_bytes(const nvinfer1::PluginTensorDesc*) const { return 0; }
  void run(const PluginCall& call);

 private:
  float eps_;
};

// gate_up [T, 2 intermediate_size].
class SiluMulOp {
 public:
  static constexpr const char* kName = "StarSiluMul";
  struct Attributes {};
  static constexpr std::array<Field, 0> kFields = {};

  explicit SiluMulOp(const Attributes&) {}

  int num_inputs() const { return 1; }
  nvinfer1::DataType input_type(int, nvinfer1::DataType dtype) const { return dtype; }
  nvinfer1::DimsExprs output_dims(const nvinfer1::DimsExprs* inputs,
                                  nvinfer1::IExprBuilder& builder) const;
  size_t workspace_bytes(const nvinfer1::PluginTensorDesc*) const { return 0; }
  void run(const PluginCall& call);
};

}  // namespace star_attention
