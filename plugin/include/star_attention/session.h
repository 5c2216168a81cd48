// Runs an engine.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <vector>

#include "star_attention/shape.h"
#include "star_attention/step_context.h"
#include "star_attention/tensorrt.h"

namespace star_attention {

// An input or output of an engine.
struct IoTensor {
  std::string name;
  nvinfer1::DataType type;
  bool is_input;
  Shape shape;                       // -1: varies
  std::vector<ShapeRange> profiles;  // of inputs
};

// A captured step.
class Graph {
 public:
  explicit Graph(cudaGraphExec_t executable) : executable_(executable) {}
  ~Graph() { cudaGraphExecDestroy(executable_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch(cudaStream_t stream) const;

 private:
  cudaGraphExec_t executable_;
};

class Session;

// Steps with the shapes of one profile. Those of one session share the memory of activations: their
// steps must not overlap. Device memory has to be aligned to 256 bytes and to stay where it is.
class Execution {
 public:
  Execution(Session& session, int profile);

  // Throws std::invalid_argument if the profile does not allow the shape.
  void set_input(const std::string& name, const Shape& shape, const void* data);
  // After the inputs.
  void set_output(const std::string& name, const Shape& shape, void* data);
  // The input runtime_context: read when a step is enqueued.
  void set_context(const StepContext& context);

  void enqueue(cudaStream_t stream);
  // After a step with the same shapes, which makes TensorRT prepare them. The graph is good until
  // the execution gets other inputs, outputs or shapes: a program with several graphs has an
  // execution for each.
  std::unique_ptr<Graph> capture(cudaStream_t stream);

 private:
  void set_address(const std::string& name, void* data);

  Session& session_;
  int profile_;
  alignas(256) const StepContext* context_address_ = nullptr;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

// An engine on a device. The program has called load_tensorrt().
class Session {
 public:
  // Throws std::runtime_error, as one line, if the engine is not one for this device and version.
  Session(const std::string& engine_file, int device, Log log);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const std::vector<IoTensor>& io() const { return io_; }
  const IoTensor& tensor(const std::string& name) const;
  int num_profiles() const { return engine_->getNbOptimizationProfiles(); }
  int64_t weight_bytes() const { return weight_bytes_; }
  int64_t activation_bytes() const { return activation_bytes_; }  // once for all profiles
  int device() const { return device_; }

 private:
  friend class Execution;
  class Allocator;

  std::string file_;
  int device_;
  LogScope log_;
  std::unique_ptr<Allocator> allocator_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<IoTensor> io_;
  int64_t weight_bytes_ = 0;
  int64_t activation_bytes_ = 0;
  void* activations_ = nullptr;
};

}  // namespace star_attention
