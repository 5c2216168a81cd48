#pragma once

#include <NvInfer.h>

#include <memory>
#include <string>

namespace star_attention {

// Adds the graph to `network`, whose weights live in what is returned. Throws std::runtime_error
// that names the node which cannot be read. Exists where NvOnnxParser.h was found.
std::shared_ptr<void> parse_onnx(const std::string& file, nvinfer1::INetworkDefinition& network);

}  // namespace star_attention
