// StarAttention for TensorRT: the attention of one layer, from the fused QKV projection to the
// input of the output projection.
//
// IPluginV2DynamicExt, because TensorRT 8.5 to 11 all have it. No CUDA here: see attention_step.h.
#pragma once

#include <NvInfer.h>

#include <string>

#include "attention_step.h"

namespace star_attention {

class StarAttentionPlugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  static constexpr const char* kName = "StarAttention";
  static constexpr const char* kVersion = "1";

  explicit StarAttentionPlugin(const AttentionLayer& layer) : layer_(layer) {}

  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override;
  nvinfer1::DimsExprs getOutputDimensions(int32_t index, const nvinfer1::DimsExprs* inputs,
                                          int32_t num_inputs,
                                          nvinfer1::IExprBuilder& builder) noexcept override;
  nvinfer1::DataType getOutputDataType(int32_t index, const nvinfer1::DataType* input_types,
                                       int32_t num_inputs) const noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::PluginTensorDesc* tensors,
                                 int32_t num_inputs, int32_t num_outputs) noexcept override;
  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t,
                       const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override {}
  size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::PluginTensorDesc* outputs,
                          int32_t num_outputs) const noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs,
                  const nvinfer1::PluginTensorDesc* output_descs, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;

  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  size_t getSerializationSize() const noexcept override;
  void serialize(void* buffer) const noexcept override;
  const char* getPluginType() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  void setPluginNamespace(const char* name) noexcept override { namespace_ = name; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  const StepContext& context_at(const void* words);

  AttentionLayer layer_;
  std::string namespace_;
  const void* host_words_ = nullptr;  // known to be host memory
};

class StarAttentionCreator final : public nvinfer1::IPluginCreator {
 public:
  const char* getPluginName() const noexcept override { return StarAttentionPlugin::kName; }
  const char* getPluginVersion() const noexcept override { return StarAttentionPlugin::kVersion; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
  nvinfer1::IPluginV2* createPlugin(
      const char* name, const nvinfer1::PluginFieldCollection* fields) noexcept override;
  nvinfer1::IPluginV2* deserializePlugin(const char* name, const void* data,
                                         size_t size) noexcept override;
  void setPluginNamespace(const char* name) noexcept override { namespace_ = name; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  std::string namespace_;
};

}  // namespace star_attention
