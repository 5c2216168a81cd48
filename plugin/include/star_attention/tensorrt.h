// TensorRT's libraries and its log. The libraries are loaded at run time: nothing links them, so
// one build serves every release of the major version that it was compiled with.
#pragma once

#include <NvInfer.h>

#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace star_attention {

// `folder`: where TensorRT's libraries are; empty: the loader's search path. Once one is loaded,
// does nothing. Throws std::runtime_error that says what is missing.
void load_tensorrt(const std::string& folder);
// A function of TensorRT's ONNX parser, from the same folder.
void* find_in_parser(const char* symbol);

// In TensorRT's global registry, for who runs engines without create_runtime().
void register_plugins_globally();

std::string tensorrt_version();  // of the loaded library
std::string compiled_version();  // of the headers

// They know the plugin.
std::unique_ptr<nvinfer1::IRuntime> create_runtime();
std::unique_ptr<nvinfer1::IBuilder> create_builder();

// `level` is "error", "warning", "info", "verbose" or "progress". Called from any thread.
using Log = std::function<void(const char* level, const std::string& message)>;

// While it lives, what TensorRT and the plugin say goes to `log`, unless a newer one lives.
class LogScope {
 public:
  explicit LogScope(Log log);
  ~LogScope();
  LogScope(const LogScope&) = delete;
  LogScope& operator=(const LogScope&) = delete;

 private:
  std::shared_ptr<const Log> log_;
};

// One for the process and its whole life: TensorRT keeps the first logger that it is given.
class Logger final : public nvinfer1::ILogger {
 public:
  static Logger& instance();

  void log(Severity severity, const char* message) noexcept override;
  void log(const char* level, const std::string& message) noexcept;

  // The first error since the last call, as one line without TensorRT's source positions: what
  // follows the first is its consequence.
  std::string take_error();
  // The first exception that a Log threw since the last call is thrown now, where it can be.
  void rethrow_failure();
  bool failed();

 private:
  friend class LogScope;

  std::mutex mutex_;
  std::vector<std::shared_ptr<const Log>> logs_;
  std::string first_error_;
  std::exception_ptr failure_;
};

}  // namespace star_attention
