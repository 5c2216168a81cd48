// Shapes of an engine's tensors.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <string>
#include <vector>

namespace star_attention {

using Shape = std::vector<int64_t>;

// What a profile of an engine takes, and what it is fastest at.
struct ShapeRange {
  Shape min, opt, max;
};

inline nvinfer1::Dims to_dims(const Shape& shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) dims.d[i] = shape[i];
  return dims;
}

inline Shape to_shape(const nvinfer1::Dims& dims) {
  return dims.nbDims < 0 ? Shape() : Shape(dims.d, dims.d + dims.nbDims);
}

inline std::string to_text(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + (shape[i] < 0 ? "any" : std::to_string(shape[i]));
  }
  return text + "]";
}

}  // namespace star_attention
