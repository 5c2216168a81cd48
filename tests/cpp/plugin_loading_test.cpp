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

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>

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

int times_known(const nvinfer1::IPluginRegistry& registry) {
  int32_t count = 0, known = 0;
  nvinfer1::IPluginCreator* const* creators = registry.getPluginCreatorList(&count);
  for (int32_t i = 0; i < count; ++i) {
    known += std::strcmp(creators[i]->getPluginName(), "StarAttention") == 0;
  }
  return known;
}

void expect_plugin(nvinfer1::IPluginRegistry& registry) {
  expect(times_known(registry) == 1, "StarAttention is registered once");
  nvinfer1::IPluginCreator* creator = registry.getPluginCreator("StarAttention", "1", "");
  expect(creator && creator->getFieldNames()->nbFields == 4, "its creator works");
}

void by_dlopen() {
  nvinfer1::IPluginRegistry& registry = open_tensorrt();
  open_library(plugin_path);
  expect_plugin(registry);
  open_library(plugin_path);
  expect_plugin(registry);
}

void by_load_library() {
  nvinfer1::IPluginRegistry& registry = open_tensorrt();
  const auto handle = registry.loadLibrary(plugin_path.c_str());
  expect(handle != nullptr, "loadLibrary");
  expect_plugin(registry);
  registry.deregisterLibrary(handle);
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
  expect(times_known(registry) == 0, "nobody has registered StarAttention");
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
