// The ways in which programs load the plugin library, each in a process of its own. Needs
// TensorRT's libraries, but no GPU.
//
//   plugin_loading_test <libstar_attention_plugin.so> [folder of TensorRT's libraries]
//
// Exit status 77: there is no TensorRT.
#include <NvInfer.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::string nvinfer_path, plugin_path;

void expect(bool ok, const char* what) {
  if (!ok) throw std::runtime_error(what);
}

void* open_library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_LAZY);  // as trtexec does: not RTLD_GLOBAL
  if (library == nullptr) throw std::runtime_error(dlerror());
  return library;
}

nvinfer1::IPluginRegistry& open_tensorrt() {
  void* const address = dlsym(open_library(nvinfer_path), "getPluginRegistry");
  expect(address != nullptr, "libnvinfer has a plugin registry");
  return *reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(address)();
}

#if NV_TENSORRT_MAJOR >= 10
using Creator = nvinfer1::IPluginCreatorV3One;

std::vector<Creator*> creators_in(const nvinfer1::IPluginRegistry& registry) {
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* const all = registry.getAllCreators(&count);
  std::vector<Creator*> creators;
  for (int32_t i = 0; i < count; ++i) {
    if (std::strcmp(all[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0) {
      creators.push_back(static_cast<Creator*>(all[i]));
    }
  }
  return creators;
}
#else
using Creator = nvinfer1::IPluginCreator;

std::vector<Creator*> creators_in(const nvinfer1::IPluginRegistry& registry) {
  int32_t count = 0;
  Creator* const* const all = registry.getPluginCreatorList(&count);
  return {all, all + count};
}
#endif

void expect_plugin(const nvinfer1::IPluginRegistry& registry) {
  std::vector<Creator*> known = creators_in(registry);
  const auto is_another = [](Creator* creator) {
    return std::strcmp(creator->getPluginName(), "StarAttention") != 0;
  };
  known.erase(std::remove_if(known.begin(), known.end(), is_another), known.end());
  expect(known.size() == 1, "StarAttention is registered once");
  expect(std::strcmp(known[0]->getPluginVersion(), "1") == 0, "its version is 1");
  expect(known[0]->getFieldNames()->nbFields == 4, "its creator works");
}

void by_dlopen() {
  nvinfer1::IPluginRegistry& registry = open_tensorrt();
  const std::vector<Creator*> before = creators_in(registry);
  open_library(plugin_path);
  expect(creators_in(registry) == before, "dlopen registers nothing");
}

void by_load_library() {
  nvinfer1::IPluginRegistry& registry = open_tensorrt();
  const std::vector<Creator*> before = creators_in(registry);
  const auto handle = registry.loadLibrary(plugin_path.c_str());
  expect(handle != nullptr, "loadLibrary");
  expect_plugin(registry);
  registry.deregisterLibrary(handle);
  expect(creators_in(registry) == before, "deregisterLibrary leaves nothing");
  expect(registry.loadLibrary(plugin_path.c_str()) != nullptr, "loadLibrary again");
  expect_plugin(registry);
}

void by_both() {
  nvinfer1::IPluginRegistry& registry = open_tensorrt();
  open_library(plugin_path);
  expect(registry.loadLibrary(plugin_path.c_str()) != nullptr, "loadLibrary after dlopen");
  expect_plugin(registry);
}

void before_tensorrt() {
  open_library(plugin_path);
  nvinfer1::IPluginRegistry& registry = open_tensorrt();
  expect(registry.loadLibrary(plugin_path.c_str()) != nullptr, "loadLibrary");
  expect_plugin(registry);
}

// Engines that carry their plugin library unpack it to a path of its own.
void as_two_copies() {
  char copy[] = "/tmp/libstar_attention_plugin.XXXXXX";
  const int file = mkstemp(copy);
  expect(file >= 0, "a temporary file");
  close(file);
  expect(std::system(("cp '" + plugin_path + "' " + copy).c_str()) == 0, "a copy");
  nvinfer1::IPluginRegistry& registry = open_tensorrt();
  open_library(plugin_path);
  const auto handle = registry.loadLibrary(copy);
  unlink(copy);
  expect(handle != nullptr, "loadLibrary of a copy");
  expect_plugin(registry);
}

bool passes(const char* name, const std::function<void()>& test) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    try {
      test();
    } catch (const std::exception& error) {
      std::printf("  failed: %s\n", error.what());
      std::fflush(stdout);
      _exit(1);
    }
    std::exit(0);  // with the destructors, which must not fail either
  }
  int status = 0;
  waitpid(child, &status, 0);
  const bool ok = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  std::printf("%s: %s\n", name, ok ? "ok" : "FAILED");
  return ok;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && argc != 3) {
    std::fprintf(stderr, "usage: %s <libstar_attention_plugin.so> [folder]\n", argv[0]);
    return 2;
  }
  plugin_path = argv[1];
  nvinfer_path = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
  if (argc == 3) nvinfer_path = argv[2] + ("/" + nvinfer_path);
  bool ok = passes("TensorRT", open_tensorrt);
  if (!ok) return 77;
  ok &= passes("dlopen", by_dlopen);
  ok &= passes("loadLibrary", by_load_library);
  ok &= passes("dlopen, then loadLibrary", by_both);
  ok &= passes("plugin before TensorRT", before_tensorrt);
  ok &= passes("two copies of the plugin", as_two_copies);
  return ok ? 0 : 1;
}
