// Argument and CUDA error checks of the host entry points.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace star_attention {

inline std::string to_text(const char* text) { return text; }
inline std::string to_text(const std::string& text) { return text; }
inline std::string to_text(int64_t value) { return std::to_string(value); }
inline std::string to_text(int value) { return std::to_string(value); }
inline std::string to_text(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}
inline std::string to_text(float value) { return to_text(double{value}); }
inline std::string to_text(const void* address) {
  char text[32];
  std::snprintf(text, sizeof(text), "%p", address);
  return text;
}

// Throws std::invalid_argument "<argument>: got <got>, expected <expected>".
template <typename Got, typename Expected>
[[noreturn]] void refuse(const std::string& argument, const Got& got, const Expected& expected) {
  throw std::invalid_argument(argument + ": got " + to_text(got) + ", expected " +
                              to_text(expected));
}

// Refuses unless `ok`. What takes time to say is better said in refuse() only.
template <typename Got, typename Expected>
void require(bool ok, const char* argument, const Got& got, const Expected& expected) {
  if (!ok) refuse(argument, got, expected);
}

inline void require_pointer(const void* pointer, const char* argument, size_t alignment = 4) {
  if (pointer == nullptr) refuse(argument, "a null pointer", "device memory");
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    refuse(argument, pointer, "an address aligned to " + std::to_string(alignment) + " bytes");
  }
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Leaves no error behind for the next kernel launch: one can do without peer memory.
inline void check_peer_setup(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) cudaGetLastError();
  check_cuda(error, what.c_str());
}

inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

}  // namespace star_attention
