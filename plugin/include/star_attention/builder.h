// From an ONNX graph to an engine file.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "star_attention/shape.h"
#include "star_attention/tensorrt.h"

namespace star_attention {

using Profile = std::map<std::string, ShapeRange>;  // of every input whose shape varies

struct BuildOptions {
  std::string onnx_file;
  std::string engine_file;
  std::vector<Profile> profiles;
  std::string dtype;            // of the graph: float16, bfloat16 or float32
  int optimization_level = 3;   // 0 to 5
  std::string timing_cache;     // file, read and written; empty: none
  int workers = 0;              // threads; 0: TensorRT's default, one
  int64_t workspace_bytes = 0;  // the most that a tactic may use; 0: all of the GPU's memory
};

// Writes the engine file, whole or not at all. Takes minutes; on the current device. Throws
// std::runtime_error with TensorRT's first error, and what `log` throws.
void build_engine(const BuildOptions& options, const Log& log);

}  // namespace star_attention
