// Programmatic dependent launch, on compute capability 9.0 and newer: a kernel starts while the one
// in front of it in the stream still runs, does what does not depend on it, and waits for it.
#pragma once

#include "common/check.h"
#include "common/device.h"

namespace star_attention {

// The blocks of the next kernel may start as soon as all blocks of this one have called it. What
// the next one reads before its wait must not be the work of any kernel still running: if it reads
// more than constants, this one calls wait_for_previous_kernel() first. (Kernels that start one
// another early make a chain: the kernel in front of this one may not be the only one that still
// runs.)
__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// What the kernel in front wrote can be read from here on. Every block has to call it, so that what
// follows on the stream follows that kernel too.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches a kernel that calls wait_for_previous_kernel(): early where it was compiled to wait.
template <typename... Params>
void launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                      cudaStream_t stream, const char* name, const Params&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = compiled_for_sm90(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace star_attention
