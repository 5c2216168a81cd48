// Operators as IPluginV2DynamicExt, for TensorRT 8.6 and 9.
#pragma once

#include "plugin_common.h"

namespace star_attention {

template <typename Op>
class Plugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  using Attributes = typename Op::Attributes;
  using DataType = nvinfer1::DataType;
  using TensorDesc = nvinfer1::PluginTensorDesc;

  Plugin(const Attributes& attributes, Phase phase) : op_(attributes), phase_(phase) {}

  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
    return logged<Plugin*>(Op::kName, nullptr, [&] {
      auto* copy = new Plugin(op_.attributes(), phase_);
      copy->namespace_ = namespace_;
      return copy;
    });
  }
  nvinfer1::DimsExprs getOutputDimensions(int32_t, const nvinfer1::DimsExprs* inputs, int32_t,
                                          nvinfer1::IExprBuilder& builder) noexcept override {
    return op_.output_dims(inputs, builder);
  }
  DataType getOutputDataType(int32_t, const DataType* inputs, int32_t) const noexcept override {
    return inputs[0];
  }
  bool supportsFormatCombination(int32_t position, const TensorDesc* tensors, int32_t num_inputs,
                                 int32_t) noexcept override {
    return supports(op_, position, tensors[position], tensors[0].type, num_inputs);
  }
  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t,
                       const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override {}
  size_t getWorkspaceSize(const TensorDesc* inputs, int32_t, const TensorDesc*,
                          int32_t) const noexcept override {
    return op_.workspace_bytes(inputs[0].dims.d[0], inputs[0].dims.d[1]);
  }
  int32_t enqueue(const TensorDesc* descs, const TensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return enqueue_in(phase_, op_, {descs, inputs, outputs[0], workspace, stream});
  }

  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  size_t getSerializationSize() const noexcept override { return sizeof(Serialized); }
  void serialize(void* buffer) const noexcept override {
    const Serialized serialized{kFormat, op_.attributes()};
    std::memcpy(buffer, &serialized, sizeof(serialized));
  }
  const char* getPluginType() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  void setPluginNamespace(const char* name) noexcept override { namespace_ = name; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  static Plugin* deserialize(const void* data, size_t size) {
    Serialized serialized{};
    if (size == sizeof(serialized)) std::memcpy(&serialized, data, size);
    require_format<Op>(size == sizeof(serialized) && serialized.format == kFormat);
    return new Plugin(serialized.attributes, Phase::kRuntime);
  }

 private:
  struct Serialized {
    int32_t format;
    Attributes attributes;
  };

  Op op_;
  Phase phase_;
  std::string namespace_;
};

using Creator = nvinfer1::IPluginCreator;

template <typename Op>
class CreatorOf final : public Creator {
 public:
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
    return &field_names<Op>();
  }
  nvinfer1::IPluginV2* createPlugin(
      const char* name, const nvinfer1::PluginFieldCollection* fields) noexcept override {
    return create(name, [&] { return new Plugin<Op>(attributes_in<Op>(*fields), Phase::kBuild); });
  }
  nvinfer1::IPluginV2* deserializePlugin(const char* name, const void* data,
                                         size_t size) noexcept override {
    return create(name, [&] { return Plugin<Op>::deserialize(data, size); });
  }
  void setPluginNamespace(const char* name) noexcept override { namespace_ = name; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  template <typename Function>
  Plugin<Op>* create(const char* name, Function function) const noexcept {
    return logged<Plugin<Op>*>(name, nullptr, [&] {
      Plugin<Op>* plugin = function();
      plugin->setPluginNamespace(namespace_.c_str());
      return plugin;
    });
  }

  std::string namespace_;
};

}  // namespace star_attention
