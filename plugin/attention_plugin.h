// StarAttention for TensorRT: the attention of one layer, from the fused QKV projection to the
// input of the output projection. What it does is in attention_step.h.
#pragma once

#include "attention_step.h"
#include "operator.h"

namespace star_attention {

class AttentionOp : public Operator<AttentionLayer> {
 public:
  static constexpr const char* kName = "StarAttention";
  static constexpr std::array<Field, 4> kFields = {{
      {"layer", nvinfer1::PluginFieldType::kINT32},
      {"num_q_heads", nvinfer1::PluginFieldType::kINT32},
      {"num_kv_heads", nvinfer1::PluginFieldType::kINT32},
      {"head_dim", nvinfer1::PluginFieldType::kINT32},
  }};

  explicit AttentionOp(const AttentionLayer& layer) : Operator(layer) { check(layer); }

  int num_inputs() const;
  nvinfer1::DataType input_type(int input, nvinfer1::DataType dtype) const;
  nvinfer1::DimsExprs output_dims(const nvinfer1::DimsExprs* inputs,
                                  nvinfer1::IExprBuilder& builder) const;
  size_t workspace_bytes(int64_t num_tokens, int64_t width) const;
  void run(const PluginCall& call);

 private:
  const StepContext& context_at(const void* words);

  const void* host_words_ = nullptr;  // known to be host memory
};

}  // namespace star_attention
