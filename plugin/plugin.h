// Operators as TensorRT plugins: IPluginV2DynamicExt, because TensorRT 8.5 to 11 all have it.
#pragma once

#include <NvInfer.h>

#include <array>
#include <cstring>
#include <exception>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "plugin_library.h"
#include "star_attention/attention.h"

namespace star_attention {

// An attribute of the ONNX node, of 4 bytes.
struct Field {
  const char* name;
  nvinfer1::PluginFieldType type;
};

struct PluginCall {
  const nvinfer1::PluginTensorDesc* descs;  // of the inputs
  const void* const* inputs;
  void* output;
  void* workspace;
  cudaStream_t stream;

  int size(int input, int axis) const { return static_cast<int>(descs[input].dims.d[axis]); }
  // Of the first input, of the output, and of what else holds activations or weights.
  DType dtype() const {
    return descs[0].type == nvinfer1::DataType::kHALF ? DType::kFloat16 : DType::kBFloat16;
  }
  const int32_t* ints(int input) const { return static_cast<const int32_t*>(inputs[input]); }
};

// TensorRT's callbacks must not throw: what they would throw is logged, and `failed` returned.
template <typename Result, typename Function>
Result logged(const char* what, Result failed, Function function) noexcept {
  try {
    return function();
  } catch (const std::exception& error) {
    log_error(std::string(what) + ": " + error.what());
    return failed;
  }
}

struct NoAttributes {};

// What operators have in common, and most of them leave as it is.
template <typename AttributesOf>
class Operator {
 public:
  using Attributes = AttributesOf;
  static constexpr std::array<Field, 0> kFields = {};

  explicit Operator(const Attributes& attributes) : attributes_(attributes) {}

  const Attributes& attributes() const { return attributes_; }
  nvinfer1::DataType input_type(int, nvinfer1::DataType dtype) const { return dtype; }
  size_t workspace_bytes(const nvinfer1::PluginTensorDesc*) const { return 0; }

 private:
  Attributes attributes_;
};

// What TensorRT wants around an operator, which is an Operator with
//   kName                     the plugin's name
//   kFields                   the names of its attributes, in their order
//   Op(Attributes)            throws if they are not valid
//   num_inputs()
//   input_type(i, dtype)      the type of input i, if the first input's is dtype
//   output_dims(inputs, builder), workspace_bytes(descs)
//   run(PluginCall)           launches and returns; may throw
// Tensors are linear; the first input is of a 16-bit type, which the output has too.
template <typename Op>
class Plugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  using Attributes = typename Op::Attributes;
  using DataType = nvinfer1::DataType;
  using TensorDesc = nvinfer1::PluginTensorDesc;
  static constexpr const char* kVersion = "1";

  explicit Plugin(const Attributes& attributes) : op_(attributes) {}

  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
    return logged<Plugin*>(Op::kName, nullptr, [&] {
      auto* copy = new Plugin(op_.attributes());
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
    const DataType type = tensors[position].type, first = tensors[0].type;
    if (num_inputs != op_.num_inputs()) return false;
    if (tensors[position].format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == 0) return is_activation(type);
    return type == (position < num_inputs ? op_.input_type(position, first) : first);
  }
  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t,
                       const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override {}
  size_t getWorkspaceSize(const TensorDesc* inputs, int32_t, const TensorDesc*,
                          int32_t) const noexcept override {
    return op_.workspace_bytes(inputs);
  }
  int32_t enqueue(const TensorDesc* descs, const TensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return logged(Op::kName, 1, [&] {
      op_.run({descs, inputs, outputs[0], workspace, stream});
      return 0;
    });
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
  const char* getPluginVersion() const noexcept override { return kVersion; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  void setPluginNamespace(const char* name) noexcept override { namespace_ = name; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  static Plugin* deserialize(const void* data, size_t size) {
    Serialized serialized{};
    if (size == sizeof(serialized)) std::memcpy(&serialized, data, size);
    require(size == sizeof(serialized) && serialized.format == kFormat, "engine",
            std::string("a ") + Op::kName + " of another version",
            "one built with this version: build it again");
    return new Plugin(serialized.attributes);
  }

 private:
  static constexpr int32_t kFormat = 1;
  struct Serialized {
    int32_t format;
    Attributes attributes;
  };

  static bool is_activation(DataType type) {
#if NV_TENSORRT_MAJOR >= 9
    if (type == DataType::kBF16) return true;
#endif
    return type == DataType::kHALF;
  }

  Op op_;
  std::string namespace_;
};

template <typename Op>
class PluginCreator final : public nvinfer1::IPluginCreator {
 public:
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return Plugin<Op>::kVersion; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
    static const auto fields = [] {
      std::array<nvinfer1::PluginField, Op::kFields.size()> all;
      for (size_t i = 0; i < all.size(); ++i) {
        all[i] = nvinfer1::PluginField(Op::kFields[i].name, nullptr, Op::kFields[i].type, 1);
      }
      return all;
    }();
    static const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()),
                                                            fields.data()};
    return &collection;
  }
  nvinfer1::IPluginV2* createPlugin(
      const char* name, const nvinfer1::PluginFieldCollection* fields) noexcept override {
    return create(name, [&] { return new Plugin<Op>(attributes_in(*fields)); });
  }
  nvinfer1::IPluginV2* deserializePlugin(const char* name, const void* data,
                                         size_t size) noexcept override {
    return create(name, [&] { return Plugin<Op>::deserialize(data, size); });
  }
  void setPluginNamespace(const char* name) noexcept override { namespace_ = name; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  using Attributes = typename Op::Attributes;

  template <typename Function>
  Plugin<Op>* create(const char* name, Function function) const noexcept {
    return logged<Plugin<Op>*>(name, nullptr, [&] {
      Plugin<Op>* plugin = function();
      plugin->setPluginNamespace(namespace_.c_str());
      return plugin;
    });
  }

  static Attributes attributes_in(const nvinfer1::PluginFieldCollection& fields) {
    static_assert(std::is_trivially_copyable_v<Attributes>);
    static_assert(std::is_empty_v<Attributes> || sizeof(Attributes) == 4 * Op::kFields.size());
    Attributes attributes{};
    for (size_t i = 0; i < Op::kFields.size(); ++i) {
      const nvinfer1::PluginField& field = find(fields, Op::kFields[i]);
      std::memcpy(reinterpret_cast<char*>(&attributes) + 4 * i, field.data, 4);
    }
    return attributes;
  }

  static const nvinfer1::PluginField& find(const nvinfer1::PluginFieldCollection& fields,
                                           const Field& wanted) {
    for (int i = 0; i < fields.nbFields; ++i) {
      const nvinfer1::PluginField& field = fields.fields[i];
      if (std::strcmp(field.name, wanted.name) != 0) continue;
      require(field.type == wanted.type && field.length == 1, wanted.name, "another type",
              "one number of 4 bytes");
      return field;
    }
    throw std::invalid_argument(std::string(wanted.name) + ": missing in the node's attributes");
  }

  std::string namespace_;
};

}  // namespace star_attention
