// Programs get at the plugin in two ways, and the library does not know which one loads it:
// - plain dlopen (trtexec --staticPlugins, Python): when loaded, the library registers the plugin
//   with TensorRT's global registry, where builders and runtimes look too;
// - IPluginRegistry::loadLibrary: dlopen, then TensorRT asks for the creators. It refuses a library
//   that has none, and one whose plugin it knows: so the global registry gives the plugin up first.
// Linked with -z nodelete: TensorRT keeps pointers to the creator.
#include "plugin_library.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>

#include "star_attention/plugin.h"
#include "star_attention_plugin.h"

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

StarAttentionCreator& creator() {
  static auto& creator = *new StarAttentionCreator;  // TensorRT may use it until the very end
  return creator;
}

nvinfer1::IPluginRegistry* global_registry() {
  const auto get = find_tensorrt<nvinfer1::IPluginRegistry*()>("getPluginRegistry");
  return get ? get() : nullptr;
}

// The plugin's creator, of this copy of the library or of another one; null: there is none.
nvinfer1::IPluginCreator* registered_creator(const nvinfer1::IPluginRegistry& registry) {
  int32_t count = 0;
  nvinfer1::IPluginCreator* const* creators = registry.getPluginCreatorList(&count);
  for (int32_t i = 0; i < count; ++i) {
    if (std::strcmp(creators[i]->getPluginName(), StarAttentionPlugin::kName) == 0 &&
        std::strcmp(creators[i]->getPluginVersion(), StarAttentionPlugin::kVersion) == 0) {
      return creators[i];
    }
  }
  return nullptr;
}

[[gnu::constructor]] void register_when_loaded() { register_plugin(); }

}  // namespace

bool register_plugin() {
  nvinfer1::IPluginRegistry* registry = global_registry();
  if (registry == nullptr) return false;
  if (!registered_creator(*registry)) registry->registerCreator(creator(), "");
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

#if NV_TENSORRT_MAJOR >= 10
using Creator = nvinfer1::IPluginCreatorInterface;
#define STAR_ATTENTION_GET_CREATORS getCreators
#else
using Creator = nvinfer1::IPluginCreator;
#define STAR_ATTENTION_GET_CREATORS getPluginCreators
#endif
[[gnu::visibility("default")]] Creator* const* STAR_ATTENTION_GET_CREATORS(int32_t& count) {
  using namespace star_attention;
  if (nvinfer1::IPluginRegistry* registry = global_registry()) {
    if (const auto* known = registered_creator(*registry)) registry->deregisterCreator(*known);
  }
  static Creator* const creators[] = {&creator()};
  count = 1;
  return creators;
}

}  // extern "C"
