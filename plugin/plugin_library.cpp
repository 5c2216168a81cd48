// Loading the library registers nothing. TensorRT's IPluginRegistry::loadLibrary asks it for its
// creators; programs that link it call register_plugins().
// Linked with -z nodelete: TensorRT keeps pointers to the creators.
#include "plugin_library.h"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdio>

#include "attention_plugin.h"
#include "layer_plugins.h"
#include "star_attention/plugin.h"
#ifdef STAR_ATTENTION_CUBLAS
#include "linear_plugin.h"
#endif
// The name of the function by which TensorRT asks.
#if NV_TENSORRT_MAJOR >= 10
#include "plugin_v3.h"
#define STAR_ATTENTION_GET_CREATORS getCreators
#else
#include "plugin_v2.h"
#define STAR_ATTENTION_GET_CREATORS getPluginCreators
#endif

#define STAR_ATTENTION_STRING(x) #x
#define STAR_ATTENTION_SONAME(major) "libnvinfer.so." STAR_ATTENTION_STRING(major)

namespace star_attention {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

// TensorRT's. It is not linked: the program chooses it. By its name it is found even if it was
// loaded privately; a program that is linked to another flavour of it (lean, static) shows its
// symbols.
nvinfer1::ILogger* global_logger() {
  void* const library = dlopen(STAR_ATTENTION_SONAME(NV_TENSORRT_MAJOR), RTLD_LAZY | RTLD_NOLOAD);
  void* const address = dlsym(library ? library : RTLD_DEFAULT, "getLogger");
  return address ? reinterpret_cast<nvinfer1::ILogger* (*)()>(address)() : nullptr;
}

template <typename... Ops>
std::array<Creator*, sizeof...(Ops)> make_creators() {
  return {new CreatorOf<Ops>...};
}

// TensorRT may use them until the very end.
const auto& creators() {
  static const auto creators = make_creators<
#ifdef STAR_ATTENTION_CUBLAS
      LinearOp, LinearAddOp, LinearFp8Op, LinearFp8AddOp,
#endif
      AttentionOp, GatherRowsOp, RmsNormOp, SiluMulOp>();
  return creators;
}

}  // namespace

void register_plugins(nvinfer1::IPluginRegistry& registry) {
  for (Creator* creator : creators()) registry.registerCreator(*creator, "");
}

void log_error(const std::string& message) noexcept {
  nvinfer1::ILogger* logger = nullptr;
  if (nvinfer1::ILoggerFinder* finder = logger_finder) logger = finder->findLogger();
  if (logger == nullptr) logger = global_logger();
  if (logger) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
  } else {
    std::fprintf(stderr, "%s\n", message.c_str());
  }
}

}  // namespace star_attention

extern "C" {

[[gnu::visibility("default")]] void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  star_attention::logger_finder = finder;
}

[[gnu::visibility("default")]] star_attention::Creator* const* STAR_ATTENTION_GET_CREATORS(
    int32_t& count) {
  count = static_cast<int32_t>(star_attention::creators().size());
  return star_attention::creators().data();
}

}  // extern "C"
