// What an operator is. The interfaces that TensorRT wants around it are those of plugin_v2.h and
// plugin_v3.h.
#pragma once

#include <NvInfer.h>

#include <array>

#include "common/check.h"
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

struct NoAttributes {};

// What operators have in common, and most of them leave as it is. An operator has
//   kName                     the plugin's name
//   kFields                   the names of its attributes, in their order
//   Op(Attributes)            throws if they are not valid
//   num_inputs()
//   input_type(i, dtype)      the type of input i, if the first input's is dtype
//   output_dims(inputs, builder)
//   workspace_bytes(rows, width)  for up to so many rows of the first input
//   run(PluginCall)           launches and returns; may throw
// Tensors are linear; the first input is of a 16-bit type, which the output has too.
template <typename AttributesOf>
class Operator {
 public:
  using Attributes = AttributesOf;
  static constexpr std::array<Field, 0> kFields = {};

  explicit Operator(const Attributes& attributes) : attributes_(attributes) {}

  const Attributes& attributes() const { return attributes_; }
  nvinfer1::DataType input_type(int, nvinfer1::DataType dtype) const { return dtype; }
  size_t workspace_bytes(int64_t, int64_t) const { return 0; }

 private:
  Attributes attributes_;
};

}  // namespace star_attention
