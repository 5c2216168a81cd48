#include "star_attention/tensorrt.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <utility>

#include "common/check.h"
#include "star_attention/plugin.h"

namespace star_attention {
namespace {

struct Libraries {
  std::string folder;
  void* nvinfer = nullptr;
  void* parser = nullptr;
};

Libraries& libraries() {
  static Libraries libraries;
  return libraries;
}

void* open_library(const std::string& folder, const std::string& name, int visibility) {
  const std::string soname = name + ".so." + std::to_string(NV_TENSORRT_MAJOR);
  const std::string path = folder.empty() ? soname : folder + "/" + soname;
  if (void* library = dlopen(path.c_str(), RTLD_NOW | visibility)) return library;
  throw std::runtime_error("TensorRT " + std::to_string(NV_TENSORRT_MAJOR) +
                           " cannot be loaded: " + dlerror());
}

template <typename Function>
Function* find(const char* symbol) {
  void* const library = libraries().nvinfer;
  if (library == nullptr) throw std::logic_error("load_tensorrt comes first");
  if (void* address = dlsym(library, symbol)) return reinterpret_cast<Function*>(address);
  throw std::runtime_error(std::string("libnvinfer has no ") + symbol);
}

// As TensorRT's headers and getInferLibVersion() write it.
std::string version_text(int version) {
  const int unit = version >= 10000 ? 10000 : 1000;
  return std::to_string(version / unit) + "." + std::to_string(version % unit / 100) + "." +
         std::to_string(version % 100);
}

int loaded_version() { return find<int32_t()>("getInferLibVersion")(); }

// "3: [file.cpp::function::12] Error Code 3: API Usage Error (text)" and its kin: "text".
std::string plain(std::string message) {
  const size_t code = message.find("Error Code ");
  const size_t open = code == std::string::npos ? code : message.find('(', code);
  const size_t close = message.rfind(')');
  if (open != std::string::npos && close != std::string::npos && close > open + 1) {
    message = message.substr(open + 1, close - open - 1);
  }
  std::replace(message.begin(), message.end(), '\n', ' ');
  return message;
}

const char* level_of(nvinfer1::ILogger::Severity severity) {
  using Severity = nvinfer1::ILogger::Severity;
  switch (severity) {
    case Severity::kINTERNAL_ERROR:
    case Severity::kERROR:
      return "error";
    case Severity::kWARNING:
      return "warning";
    case Severity::kINFO:
      return "info";
    default:
      return "verbose";
  }
}

template <typename Interface>
std::unique_ptr<Interface> create(const char* symbol, const char* what) {
  int num_devices = 0;  // TensorRT 8.6 crashes without a GPU
  check_cuda(cudaGetDeviceCount(&num_devices), "TensorRT needs a GPU");
  Logger& logger = Logger::instance();
  logger.take_error();
  const auto make = find<void*(void*, int32_t)>(symbol);
  auto* made =
      static_cast<Interface*>(make(static_cast<nvinfer1::ILogger*>(&logger), NV_TENSORRT_VERSION));
  if (made == nullptr) {
    throw std::runtime_error(std::string("TensorRT makes no ") + what + ": " + logger.take_error());
  }
  std::unique_ptr<Interface> owned(made);
  register_plugins(made->getPluginRegistry());  // its own, which no other one shares
  logger.take_error();  // of plugins that the program has made known to all of them
  return owned;
}

}  // namespace

void load_tensorrt(const std::string& folder) {
  Libraries& loaded = libraries();
  if (loaded.nvinfer == nullptr) {
    loaded.nvinfer = open_library(folder, "libnvinfer", RTLD_GLOBAL);  // plugins want its symbols
    loaded.folder = folder;
  }
  if (loaded_version() < NV_TENSORRT_VERSION) {
    throw std::runtime_error("TensorRT " + tensorrt_version() +
                             " was loaded, and this is built for " + compiled_version() +
                             " or newer: build it with TENSORRT_ROOT set to the older one");
  }
}

void* find_in_parser(const char* symbol) {
  Libraries& loaded = libraries();
  if (loaded.parser == nullptr) {
    loaded.parser = open_library(loaded.folder, "libnvonnxparser", RTLD_LOCAL);
  }
  if (void* address = dlsym(loaded.parser, symbol)) return address;
  throw std::runtime_error(std::string("libnvonnxparser has no ") + symbol);
}

void register_plugins_globally() {
  register_plugins(*find<nvinfer1::IPluginRegistry*()>("getPluginRegistry")());
}

std::string tensorrt_version() { return version_text(loaded_version()); }

std::string compiled_version() { return version_text(NV_TENSORRT_VERSION); }

std::unique_ptr<nvinfer1::IRuntime> create_runtime() {
  return create<nvinfer1::IRuntime>("createInferRuntime_INTERNAL", "runtime");
}

std::unique_ptr<nvinfer1::IBuilder> create_builder() {
  return create<nvinfer1::IBuilder>("createInferBuilder_INTERNAL", "builder");
}

LogScope::LogScope(Log log) : log_(std::make_shared<const Log>(std::move(log))) {
  Logger& logger = Logger::instance();
  const std::lock_guard lock(logger.mutex_);
  logger.logs_.push_back(log_);
}

LogScope::~LogScope() {
  Logger& logger = Logger::instance();
  const std::lock_guard lock(logger.mutex_);
  auto& logs = logger.logs_;
  logs.erase(std::find(logs.begin(), logs.end(), log_));
}

Logger& Logger::instance() {
  static Logger& logger = *new Logger;
  return logger;
}

void Logger::log(Severity severity, const char* message) noexcept {
  log(level_of(severity), message);
}

void Logger::log(const char* level, const std::string& message) noexcept {
  const bool error = std::string(level) == "error";
  std::shared_ptr<const Log> log;
  {
    const std::lock_guard lock(mutex_);
    if (error && first_error_.empty()) first_error_ = plain(message);
    if (!logs_.empty()) log = logs_.back();
  }
  // Without the lock: a Log may wait for Python's, which a thread that logs too may hold.
  try {
    if (log) {
      (*log)(level, message);
    } else if (error) {
      std::fprintf(stderr, "TensorRT: %s\n", message.c_str());
    }
  } catch (...) {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = std::current_exception();
  }
}

std::string Logger::take_error() {
  const std::lock_guard lock(mutex_);
  return std::exchange(first_error_, {});
}

void Logger::rethrow_failure() {
  std::exception_ptr failure;
  {
    const std::lock_guard lock(mutex_);
    failure = std::exchange(failure_, nullptr);
  }
  if (failure) std::rethrow_exception(failure);
}

bool Logger::failed() {
  const std::lock_guard lock(mutex_);
  return failure_ != nullptr;
}

}  // namespace star_attention
