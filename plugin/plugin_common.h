// What plugins have in common, whichever of TensorRT's interfaces they implement.
#pragma once

#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "operator.h"
#include "plugin_library.h"

namespace star_attention {

inline constexpr const char* kPluginVersion = "1";
inline constexpr int32_t kFormat = 1;  // of what engines keep of a plugin

// Plugins of a network are in the build phase, and so are their clones; an engine's are in the
// runtime phase. TensorRT may time a build's plugins with tensors of arbitrary content, also where
// an engine has indices or an address: they launch nothing and read nothing.
enum class Phase { kBuild, kRuntime };

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

template <typename Op>
int32_t enqueue_in(Phase phase, Op& op, const PluginCall& call) noexcept {
  if (phase == Phase::kBuild) return 0;
  return logged(Op::kName, 1, [&] {
    op.run(call);
    return 0;
  });
}

inline bool is_activation(nvinfer1::DataType type) {
#if NV_TENSORRT_MAJOR >= 9
  if (type == nvinfer1::DataType::kBF16) return true;
#endif
  return type == nvinfer1::DataType::kHALF;
}

// Of inputs and output, the tensor at `position`; the first one's type is `first`.
template <typename Op>
bool supports(const Op& op, int32_t position, const nvinfer1::PluginTensorDesc& tensor,
              nvinfer1::DataType first, int32_t num_inputs) {
  if (num_inputs != op.num_inputs()) return false;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position == 0) return is_activation(tensor.type);
  return tensor.type == (position < num_inputs ? op.input_type(position, first) : first);
}

// What a node of the plugin has to have.
template <typename Op>
const nvinfer1::PluginFieldCollection& field_names() {
  static const auto fields = [] {
    std::array<nvinfer1::PluginField, Op::kFields.size()> all;
    for (size_t i = 0; i < all.size(); ++i) {
      all[i] = nvinfer1::PluginField(Op::kFields[i].name, nullptr, Op::kFields[i].type, 1);
    }
    return all;
  }();
  static const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()),
                                                          fields.data()};
  return collection;
}

inline const nvinfer1::PluginField& find_field(const nvinfer1::PluginFieldCollection& fields,
                                               const Field& wanted) {
  for (int i = 0; i < fields.nbFields; ++i) {
    const nvinfer1::PluginField& field = fields.fields[i];
    if (std::strcmp(field.name, wanted.name) != 0) continue;
    require(field.type == wanted.type && field.length == 1, wanted.name, "another type",
            "one number of 4 bytes");
    return field;
  }
  throw std::invalid_argument(std::string(wanted.name) + ": missing in the plugin's attributes");
}

template <typename Op>
typename Op::Attributes attributes_in(const nvinfer1::PluginFieldCollection& fields) {
  using Attributes = typename Op::Attributes;
  static_assert(std::is_trivially_copyable_v<Attributes>);
  static_assert(std::is_empty_v<Attributes> || sizeof(Attributes) == 4 * Op::kFields.size());
  Attributes attributes{};
  if constexpr (!std::is_empty_v<Attributes>) {
    for (size_t i = 0; i < Op::kFields.size(); ++i) {
      const nvinfer1::PluginField& field = find_field(fields, Op::kFields[i]);
      std::memcpy(reinterpret_cast<char*>(&attributes) + 4 * i, field.data, 4);
    }
  }
  return attributes;
}

// Of an engine.
template <typename Op>
void require_format(bool is_known) {
  require(is_known, "engine", std::string("a ") + Op::kName + " of another version",
          "one built with this version: build it again");
}

}  // namespace star_attention
