#include "star_attention/builder.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#ifdef STAR_ATTENTION_ONNX_PARSER
#include "onnx_parser.h"
#endif

namespace star_attention {
namespace {

using nvinfer1::DataType;

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(what + ": " + Logger::instance().take_error());
}

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_file(const std::string& path, const nvinfer1::IHostMemory& data) {
  const std::string unfinished = path + ".unfinished";
  std::ofstream file(unfinished, std::ios::binary);
  file.write(static_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
  file.close();
  if (file && std::rename(unfinished.c_str(), path.c_str()) == 0) return;
  const std::string reason = std::strerror(errno);
  std::remove(unfinished.c_str());
  throw std::runtime_error(path + " cannot be written: " + reason);
}

#if NV_TENSORRT_MAJOR >= 10
class Progress final : public nvinfer1::IProgressMonitor {
 public:
  void phaseStart(const char* phase, const char*, int32_t num_steps) noexcept override {
    const std::lock_guard lock(mutex_);
    num_steps_[phase] = num_steps;
  }
  bool stepComplete(const char* phase, int32_t step) noexcept override {
    int num_steps = 0;
    {
      const std::lock_guard lock(mutex_);
      num_steps = num_steps_[phase];
    }
    Logger& logger = Logger::instance();
    logger.log("progress", std::string(phase) + ": " + std::to_string(step + 1) + " of " +
                               std::to_string(num_steps));
    return !logger.failed();  // false ends the build
  }
  void phaseFinish(const char*) noexcept override {}

 private:
  std::mutex mutex_;
  std::map<std::string, int> num_steps_;
};
#else
// TensorRT 8 and 9 show progress in their log only.
Log with_progress(const Log& log) {
  return [log](const char* level, const std::string& message) {
    log(level, message);
    constexpr char kTiming[] = "--------------- Timing Runner: ";
    if (message.rfind(kTiming, 0) == 0) {
      log("progress", "timing " + message.substr(sizeof(kTiming) - 1));
    }
  };
}
#endif

#if NV_TENSORRT_MAJOR >= 9
// The types of the graph are those of the engine.
constexpr auto kNetworkFlags =
    1U << static_cast<int>(nvinfer1::NetworkDefinitionCreationFlag::kSTRONGLY_TYPED);

void set_types(const std::string&, nvinfer1::INetworkDefinition&, nvinfer1::IBuilderConfig&) {}
#else
constexpr auto kNetworkFlags =
    1U << static_cast<int>(nvinfer1::NetworkDefinitionCreationFlag::kEXPLICIT_BATCH);

// TensorRT 8 gives the types of plugins' tensors to nothing else: it may compute in float32 what
// the graph has in float16, and convert on the way.
void set_types(const std::string& dtype, nvinfer1::INetworkDefinition& network,
               nvinfer1::IBuilderConfig& config) {
  if (dtype != "float16") throw std::invalid_argument(dtype + " needs TensorRT 9 or newer");
  config.setFlag(nvinfer1::BuilderFlag::kFP16);
  config.setFlag(nvinfer1::BuilderFlag::kOBEY_PRECISION_CONSTRAINTS);
  for (int i = 0; i < network.getNbLayers(); ++i) {
    nvinfer1::ILayer& layer = *network.getLayer(i);
    const nvinfer1::LayerType type = layer.getType();
    if (type != nvinfer1::LayerType::kMATRIX_MULTIPLY &&
        type != nvinfer1::LayerType::kELEMENTWISE) {
      continue;
    }
    layer.setPrecision(DataType::kHALF);
    layer.setOutputType(0, DataType::kHALF);
  }
}
#endif

void add_profile(const Profile& profile, nvinfer1::IBuilder& builder,
                 nvinfer1::IBuilderConfig& config) {
  using Selector = nvinfer1::OptProfileSelector;
  nvinfer1::IOptimizationProfile& added = *builder.createOptimizationProfile();
  for (const auto& [name, range] : profile) {
    if (!added.setDimensions(name.c_str(), Selector::kMIN, to_dims(range.min)) ||
        !added.setDimensions(name.c_str(), Selector::kOPT, to_dims(range.opt)) ||
        !added.setDimensions(name.c_str(), Selector::kMAX, to_dims(range.max))) {
      fail("profile of input " + name);
    }
  }
  if (config.addOptimizationProfile(&added) < 0) fail("profile");
}

std::unique_ptr<nvinfer1::ITimingCache> add_timing_cache(const std::string& path,
                                                         nvinfer1::IBuilderConfig& config) {
  const std::vector<char> data = path.empty() ? std::vector<char>() : read_file(path);
  std::unique_ptr<nvinfer1::ITimingCache> cache(config.createTimingCache(data.data(), data.size()));
  if (cache && config.setTimingCache(*cache, /*ignoreMismatch=*/false)) return cache;
  Logger::instance().log("warning", path + " is of another GPU or TensorRT: starting a new one");
  cache.reset(config.createTimingCache(nullptr, 0));
  if (!cache || !config.setTimingCache(*cache, false)) fail("timing cache");
  Logger::instance().take_error();  // about the old one
  return cache;
}

}  // namespace

void build_engine(const BuildOptions& options, const Log& log) {
#if NV_TENSORRT_MAJOR >= 10
  const LogScope scope(log);
#else
  const LogScope scope(with_progress(log));
#endif
  Logger& logger = Logger::instance();
  const auto builder = create_builder();
  const std::unique_ptr<nvinfer1::INetworkDefinition> network(
      builder->createNetworkV2(kNetworkFlags));
  const std::unique_ptr<nvinfer1::IBuilderConfig> config(builder->createBuilderConfig());
  if (!network || !config) fail("network");

#ifdef STAR_ATTENTION_ONNX_PARSER
  const std::shared_ptr<void> weights = parse_onnx(options.onnx_file, *network);
#else
  throw std::runtime_error(
      "this build cannot read ONNX, because NvOnnxParser.h was not found: build it with "
      "TENSORRT_ROOT, or use trtexec --dynamicPlugins=libstar_attention_plugin.so");
#endif
  logger.take_error();
  set_types(options.dtype, *network, *config);
  for (const Profile& profile : options.profiles) add_profile(profile, *builder, *config);
  config->setBuilderOptimizationLevel(options.optimization_level);
  if (options.workers > 0) builder->setMaxThreads(options.workers);
#if NV_TENSORRT_MAJOR < 9
  // As newer versions do: any number of executions with the same profile.
  config->setPreviewFeature(nvinfer1::PreviewFeature::kPROFILE_SHARING_0806, true);
#endif
  // Layers follow one another anyway: one stream, and nothing for CUDA graphs to fork.
  config->setMaxAuxStreams(0);
  // TensorRT's own kernels only: it would load cuBLAS and cuDNN, of the versions it was made with.
  config->setTacticSources(0);
  if (options.workspace_bytes > 0) {
    config->setMemoryPoolLimit(nvinfer1::MemoryPoolType::kWORKSPACE, options.workspace_bytes);
  }
  const auto timing_cache = add_timing_cache(options.timing_cache, *config);
#if NV_TENSORRT_MAJOR >= 10
  Progress progress;
  config->setProgressMonitor(&progress);
#endif

  const std::unique_ptr<nvinfer1::IHostMemory> engine(
      builder->buildSerializedNetwork(*network, *config));
  if (!options.timing_cache.empty()) {  // also of a build that failed: it took its time
    const std::unique_ptr<nvinfer1::IHostMemory> data(timing_cache->serialize());
    if (data) write_file(options.timing_cache, *data);
  }
  logger.rethrow_failure();
  if (!engine) fail(options.onnx_file);
  write_file(options.engine_file, *engine);
}

}  // namespace star_attention
