// Operators as IPluginV3, with the capabilities core, build and runtime, for TensorRT 10 and later.
#pragma once

#include <algorithm>

#include "plugin_common.h"

namespace star_attention {

template <typename Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  using Attributes = typename Op::Attributes;
  using DataType = nvinfer1::DataType;
  using TensorDesc = nvinfer1::PluginTensorDesc;
  using TensorRange = nvinfer1::DynamicPluginTensorDesc;

  Plugin(const Attributes& attributes, Phase phase) : op_(attributes), phase_(phase) {
    serialized_[0] = {kFormatField.name, &kFormat, kFormatField.type, 1};
    const auto* const values = reinterpret_cast<const char*>(&op_.attributes());
    for (size_t i = 0; i < Op::kFields.size(); ++i) {
      serialized_[i + 1] = {Op::kFields[i].name, values + 4 * i, Op::kFields[i].type, 1};
    }
  }
  Plugin(const Plugin&) = delete;  // serialized_ points into it

  nvinfer1::IPluginV3* clone() noexcept override {
    return logged<Plugin*>(Op::kName, nullptr,
                           [&] { return new Plugin(op_.attributes(), phase_); });
  }
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  // Core
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return ""; }

  // Build
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs,
                             int32_t) const noexcept override {
    outputs[0] = inputs[0];
    return 0;
  }
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                          const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                          int32_t, nvinfer1::IExprBuilder& builder) noexcept override {
    if (num_inputs != op_.num_inputs()) return 1;
    outputs[0] = op_.output_dims(inputs, builder);
    return 0;
  }
  bool supportsFormatCombination(int32_t position, const TensorRange* tensors, int32_t num_inputs,
                                 int32_t) noexcept override {
    return supports(op_, position, tensors[position].desc, tensors[0].desc.type, num_inputs);
  }
  int32_t configurePlugin(const TensorRange*, int32_t, const TensorRange*,
                          int32_t) noexcept override {
    return 0;
  }
  size_t getWorkspaceSize(const TensorRange* inputs, int32_t, const TensorRange*,
                          int32_t) const noexcept override {
    const auto most = [&](int axis) {  // a size that varies is -1 in `desc`
      return std::max<int64_t>(inputs[0].desc.dims.d[axis], inputs[0].max.d[axis]);
    };
    return op_.workspace_bytes(most(0), most(1));
  }

  // Runtime
  int32_t onShapeChange(const TensorDesc*, int32_t, const TensorDesc*, int32_t) noexcept override {
    return 0;
  }
  int32_t enqueue(const TensorDesc* descs, const TensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return enqueue_in(phase_, op_, {descs, inputs, outputs[0], workspace, stream});
  }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return &collection_;
  }

  static Plugin* deserialize(const nvinfer1::PluginFieldCollection& fields) {
    int32_t format = 0;
    std::memcpy(&format, find_field(fields, kFormatField).data, sizeof(format));
    require_format<Op>(format == kFormat);
    return new Plugin(attributes_in<Op>(fields), Phase::kRuntime);
  }

 private:
  static constexpr Field kFormatField = {"format", nvinfer1::PluginFieldType::kINT32};

  Op op_;
  Phase phase_;
  std::array<nvinfer1::PluginField, Op::kFields.size() + 1> serialized_;
  nvinfer1::PluginFieldCollection collection_{static_cast<int32_t>(serialized_.size()),
                                              serialized_.data()};
};

using Creator = nvinfer1::IPluginCreatorInterface;

template <typename Op>
class CreatorOf final : public nvinfer1::IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return ""; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
    return &field_names<Op>();
  }
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    return logged<Plugin<Op>*>(name, nullptr, [&] {
      if (phase == nvinfer1::TensorRTPhase::kRUNTIME) return Plugin<Op>::deserialize(*fields);
      return new Plugin<Op>(attributes_in<Op>(*fields), Phase::kBuild);
    });
  }
};

}  // namespace star_attention
