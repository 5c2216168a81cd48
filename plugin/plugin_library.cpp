// Programs get at the plugins in two ways, and the library does not know which one loads it:
// - plain dlopen (trtexec --staticPlugins, Python): when loaded, the library registers the plugins
//   with TensorRT's global registry, where builders and runtimes look too;
// - IPluginRegistry::loadLibrary: dlopen, then TensorRT asks for the creators. It refuses a library
//   that has none, and one with a plugin it knows: so the global registry gives them up first.
// Linked with -z nodelete: TensorRT keeps pointers to the creators.
#include "plugin_library.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>

#include "attention_plugin.h"
#include "layer_plugins.h"
#include "star_attention/plugin.h"
#ifdef STAR_ATTENTION_CUBLAS
#include "linear_plugin.h"
#endif

#define STAR_ATTENTION_STRING(x) #x
#define STAR_ATTENTION_SONAME(major) "libnvinfer.so." STAR_ATTENTION_STRING(major)

namespace star_attention {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

// TensorRT is not linked: the program chooses it. By its name it is found even if it was loaded
// privately; a program that is linked to another flavour of it (lean, static) shows its symbols.
template <typename Function>
Function* find_tensorrt(const char* symbol) {
  void* const library = dlopen(STAR_ATTENTION_SONAME(NV_TENSORRT_MAJOR), RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<Function*>(dlsym(library ? library : RTLD_DEFAULT, symbol));
}

#if NV_TENSORRT_MAJOR >= 10
using Creator = nvinfer1::IPluginCreatorInterface;
#define STAR_ATTENTION_GET_CREATORS getCreators
#else
using Creator = nvinfer1::IPluginCreator;
#define STAR_ATTENTION_GET_CREATORS getPluginCreators
#endif

template <typename... Ops>
struct Creators {
  std::array<nvinfer1::IPluginCreator*, sizeof...(Ops)> all{new PluginCreator<Ops>...};
  std::array<Creator*, sizeof...(Ops)> as_tensorrt_asks;

  Creators() { std::copy(all.begin(), all.end(), as_tensorrt_asks.begin()); }
};

// TensorRT may use them until the very end.
auto& creators() {
  static auto& creators = *new Creators<
#ifdef STAR_ATTENTION_CUBLAS
      LinearOp, LinearAddOp,
#endif
      AttentionOp, GatherRowsOp, RmsNormOp, SiluMulOp>;
  return creators;
}

nvinfer1::IPluginRegistry* global_registry() {
  const auto get = find_tensorrt<nvinfer1::IPluginRegistry*()>("getPluginRegistry");
  return get ? get() : nullptr;
}

// A registered creator of the same plugin, of this copy of the library or of another one, or null.
nvinfer1::IPluginCreator* registered_as(nvinfer1::IPluginCreator& creator,
                                        const nvinfer1::IPluginRegistry& registry) {
  int32_t count = 0;
  nvinfer1::IPluginCreator* const* known = registry.getPluginCreatorList(&count);
  for (int32_t i = 0; i < count; ++i) {
    if (std::strcmp(known[i]->getPluginName(), creator.getPluginName()) == 0 &&
        std::strcmp(known[i]->getPluginVersion(), creator.getPluginVersion()) == 0) {
      return known[i];
    }
  }
  return nullptr;
}

[[gnu::constructor]] void register_when_loaded() { register_plugins(); }

}  // namespace

bool register_plugins() {
  nvinfer1::IPluginRegistry* registry = global_registry();
  if (registry == nullptr) return false;
  for (nvinfer1::IPluginCreator* creator : creators().all) {
    if (!registered_as(*creator, *registry)) registry->registerCreator(*creator, "");
  }
  return true;
}

void log_error(const std::string& message) noexcept {
  nvinfer1::ILogger* logger = nullptr;
  if (nvinfer1::ILoggerFinder* finder = logger_finder) logger = finder->findLogger();
  if (logger == nullptr) {
    if (const auto global = find_tensorrt<nvinfer1::ILogger*()>("getLogger")) logger = global();
  }
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
  using namespace star_attention;
  if (nvinfer1::IPluginRegistry* registry = global_registry()) {
    for (nvinfer1::IPluginCreator* creator : creators().all) {
      if (const auto* known = registered_as(*creator, *registry)) {
        registry->deregisterCreator(*known);
      }
    }
  }
  count = static_cast<int32_t>(creators().as_tensorrt_asks.size());
  return creators().as_tensorrt_asks.data();
}

}  // extern "C"
