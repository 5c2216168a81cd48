#include "star_attention/session.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "common/device_guard.h"

namespace star_attention {
namespace {

// TensorRT 10.1 takes the size of activations too.
#define STAR_ATTENTION_DEVICE_MEMORY_V2 \
  (NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 1))

constexpr char kRuntimeContext[] = "runtime_context";
constexpr size_t kAlignment = 256;  // what TensorRT asks of tensors

// A file as memory: engines are as large as their weights.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status{};
    if (file >= 0 && fstat(file, &status) == 0 && status.st_size > 0) {
      size_ = static_cast<size_t>(status.st_size);
      data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    }
    const std::string reason = file >= 0 && size_ == 0 ? "it is empty" : std::strerror(errno);
    if (file >= 0) close(file);
    if (data_ == MAP_FAILED) throw std::runtime_error(path + " cannot be read: " + reason);
  }
  ~MappedFile() { munmap(data_, size_); }
  MappedFile(const MappedFile&) = delete;

  const void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = MAP_FAILED;
  size_t size_ = 0;
};

std::string mebibytes(uint64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

// What was asked for in vain, against what there is.
std::string describe_shortage(uint64_t bytes) {
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  return mebibytes(bytes) + " of device memory were asked for, " + mebibytes(free) + " of " +
         mebibytes(total) + " are free";
}

std::string describe_device(int device) {
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return std::string(properties.name) + " (compute capability " + std::to_string(properties.major) +
         "." + std::to_string(properties.minor) + ")";
}

bool within(const Shape& shape, const ShapeRange& range) {
  if (shape.size() != range.min.size()) return false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < range.min[i] || shape[i] > range.max[i]) return false;
  }
  return true;
}

// -1 in `pattern` stands for any size.
bool matches(const Shape& shape, const Shape& pattern) {
  if (shape.size() != pattern.size()) return false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (pattern[i] >= 0 && shape[i] != pattern[i]) return false;
  }
  return true;
}

std::vector<IoTensor> describe_io(const nvinfer1::ICudaEngine& engine) {
  using Selector = nvinfer1::OptProfileSelector;
  std::vector<IoTensor> io;
  for (int i = 0; i < engine.getNbIOTensors(); ++i) {
    const char* name = engine.getIOTensorName(i);
    IoTensor tensor;
    tensor.name = name;
    tensor.type = engine.getTensorDataType(name);
    tensor.is_input = engine.getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
    tensor.shape = to_shape(engine.getTensorShape(name));
    const bool fixed = std::count(tensor.shape.begin(), tensor.shape.end(), -1) == 0;
    for (int p = 0; tensor.is_input && p < engine.getNbOptimizationProfiles(); ++p) {
      const auto limit = [&](Selector selector) {
        return fixed ? tensor.shape : to_shape(engine.getProfileShape(name, p, selector));
      };
      tensor.profiles.push_back(
          {limit(Selector::kMIN), limit(Selector::kOPT), limit(Selector::kMAX)});
    }
    io.push_back(std::move(tensor));
  }
  return io;
}

}  // namespace

// Counts what TensorRT allocates.
class Session::Allocator final : public nvinfer1::IGpuAllocator {
 public:
  void* allocate(uint64_t size, uint64_t, nvinfer1::AllocatorFlags) noexcept override {
    void* memory = nullptr;
    if (size == 0) return memory;
    if (cudaMalloc(&memory, size) != cudaSuccess) {
      cudaGetLastError();
      shortage_ = size;
      return nullptr;
    }
    allocated_ += size;
    return memory;
  }
  bool deallocate(void* memory) noexcept override { return cudaFree(memory) == cudaSuccess; }
#if NV_TENSORRT_MAJOR < 10
  void free(void* memory) noexcept override { deallocate(memory); }
#endif

  uint64_t allocated() const { return allocated_; }
  uint64_t shortage() const { return shortage_; }  // 0: there was none

 private:
  std::atomic<uint64_t> allocated_{0}, shortage_{0};
};

Session::Session(const std::string& engine_file, int device, Log log)
    : file_(engine_file),
      device_(device),
      log_(std::move(log)),
      allocator_(std::make_unique<Allocator>()) {
  const DeviceGuard guard(device);
  const MappedFile file(engine_file);
  runtime_ = create_runtime();
  runtime_->setGpuAllocator(allocator_.get());
  Logger& logger = Logger::instance();
  logger.take_error();
  engine_.reset(runtime_->deserializeCudaEngine(file.data(), file.size()));
  if (engine_ == nullptr) {
    const std::string error = logger.take_error();
    const uint64_t shortage = allocator_->shortage();
    throw std::runtime_error(engine_file +
                             (shortage ? " does not fit: " + describe_shortage(shortage)
                                       : " cannot be run by TensorRT " + tensorrt_version() +
                                             " on " + describe_device(device) + ": " + error));
  }
  weight_bytes_ = static_cast<int64_t>(allocator_->allocated());
  io_ = describe_io(*engine_);
#if STAR_ATTENTION_DEVICE_MEMORY_V2
  activation_bytes_ = engine_->getDeviceMemorySizeV2();
#else
  activation_bytes_ = static_cast<int64_t>(engine_->getDeviceMemorySize());
#endif
  if (activation_bytes_ > 0 && cudaMalloc(&activations_, activation_bytes_) != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(
        engine_file + ": its activations do not fit: " + describe_shortage(activation_bytes_) +
        " (an engine with a smaller max_num_tokens needs less)");
  }
}

Session::~Session() { cudaFree(activations_); }

const IoTensor& Session::tensor(const std::string& name) const {
  for (const IoTensor& tensor : io_) {
    if (tensor.name == name) return tensor;
  }
  throw std::invalid_argument(file_ + " has no tensor " + name);
}

Execution::Execution(Session& session, int profile) : session_(session), profile_(profile) {
  require(profile >= 0 && profile < session.num_profiles(), "profile", profile,
          "less than the engine's " + std::to_string(session.num_profiles()));
  const DeviceGuard guard(session.device_);
  Logger& logger = Logger::instance();
  logger.take_error();
  nvinfer1::ICudaEngine& engine = *session.engine_;
#if NV_TENSORRT_MAJOR >= 10
  context_.reset(
      engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
#else
  context_.reset(engine.createExecutionContextWithoutDeviceMemory());
#endif
  if (context_ == nullptr) {
    const uint64_t shortage = session.allocator_->shortage();
    const std::string error = logger.take_error();
    throw std::runtime_error(
        session.file_ + ", execution context: " + (shortage ? describe_shortage(shortage) : error));
  }
#if STAR_ATTENTION_DEVICE_MEMORY_V2
  context_->setDeviceMemoryV2(session.activations_, session.activation_bytes_);
#else
  context_->setDeviceMemory(session.activations_);
#endif
  if (!context_->setOptimizationProfileAsync(profile, nullptr) ||
      cudaStreamSynchronize(nullptr) != cudaSuccess) {
    throw std::runtime_error(session.file_ + ", profile " + std::to_string(profile) + ": " +
                             logger.take_error());
  }
}

void Execution::set_input(const std::string& name, const Shape& shape, const void* data) {
  const IoTensor& tensor = session_.tensor(name);
  require(tensor.is_input, "set_input", name, "an input");
  const ShapeRange& range = tensor.profiles[profile_];
  require(within(shape, range), name.c_str(), to_text(shape),
          to_text(range.min) + " to " + to_text(range.max) +
              ", the limits of the engine's profile " + std::to_string(profile_));
  if (!context_->setInputShape(name.c_str(), to_dims(shape))) {
    throw std::runtime_error(name + ": " + Logger::instance().take_error());
  }
  require_pointer(data, name.c_str(), kAlignment);
  set_address(name, const_cast<void*>(data));
}

void Execution::set_output(const std::string& name, const Shape& shape, void* data) {
  require(!session_.tensor(name).is_input, "set_output", name, "an output");
  const Shape expected = to_shape(context_->getTensorShape(name.c_str()));
  require(matches(shape, expected), name.c_str(), to_text(shape), to_text(expected));
  require_pointer(data, name.c_str(), kAlignment);
  set_address(name, data);
}

void Execution::set_context(const StepContext& context) {
  context_address_ = &context;
  set_address(kRuntimeContext, &context_address_);
}

void Execution::set_address(const std::string& name, void* data) {
  if (context_->setTensorAddress(name.c_str(), data)) return;
  throw std::runtime_error(name + ": " + Logger::instance().take_error());
}

void Execution::enqueue(cudaStream_t stream) {
  const DeviceGuard guard(session_.device_);
  Logger& logger = Logger::instance();
  logger.take_error();
  if (context_->enqueueV3(stream)) return;
  throw std::runtime_error(session_.file_ + ": " + logger.take_error());
}

std::unique_ptr<Graph> Execution::capture(cudaStream_t stream) {
  const DeviceGuard guard(session_.device_);
  // Thread-local: what other threads do meanwhile, such as NCCL's, is their own affair.
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    enqueue(stream);
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    cudaGetLastError();
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  check_cuda(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check_cuda(error, "cudaGraphInstantiate");
  return std::make_unique<Graph>(executable);
}

void Graph::launch(cudaStream_t stream) const {
  check_cuda(cudaGraphLaunch(executable_, stream), "cudaGraphLaunch");
}

}  // namespace star_attention
