// Functions of the CUDA driver, which is not linked: it is not there where this is built.
#pragma once

#include <cuda_runtime_api.h>

#include "common/check.h"

namespace star_attention {

// `version`: of the function's interface, as in 12000.
template <class Function>
Function driver_function(const char* name, unsigned version) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &found);
#else
  static_cast<void>(version);
  const cudaError_t error = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &found);
#endif
  check_cuda(error, name);
  require(found == cudaDriverEntryPointSuccess, name, "a driver without it",
          "one for CUDA 12 or newer");
  return reinterpret_cast<Function>(entry);
}

}  // namespace star_attention
