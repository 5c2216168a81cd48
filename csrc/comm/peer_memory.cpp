#include "star_attention/peer_memory.h"

#include <cuda.h>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/driver.h"

namespace star_attention {
PeerMemory::PeerMemory(int rank, int size, void* memory, int device)
    : rank_(rank), size_(size), device_(device) {
  require(size >= 1 && size <= kMaxRanks, "size", size, "1 to 8");
  require(rank >= 0 && rank < size, "rank", rank, "0 to " + std::to_string(size - 1));
  require_pointer(memory, "memory");
  memory_[rank] = memory;
}

PeerMemory::~PeerMemory() {
  for (void* allocation : opened_) {
    if (allocation != nullptr) cudaIpcCloseMemHandle(allocation);
  }
}

PeerMemory::Handle PeerMemory::handle() const {
  static const auto range_of =
      driver_function<decltype(&cuMemGetAddressRange)>("cuMemGetAddressRange", 12000);
  const DeviceGuard guard(device_);
  Handle handle;
  CUdeviceptr base = 0;
  size_t bytes = 0;
  const auto memory = reinterpret_cast<CUdeviceptr>(memory_[rank_]);
  if (const CUresult result = range_of(&base, &bytes, memory); result != CUDA_SUCCESS) {
    throw std::runtime_error("cuMemGetAddressRange: CUDA driver error " + std::to_string(result));
  }
  handle.offset = static_cast<int64_t>(memory - base);
  check_peer_setup(cudaIpcGetMemHandle(&handle.allocation, reinterpret_cast<void*>(base)),
                   "cudaIpcGetMemHandle");
  return handle;
}

void PeerMemory::open(const Handle* handles) {
  const DeviceGuard guard(device_);
  for (int r = 0; r < size_; ++r) {
    if (memory_[r] != nullptr) continue;
    check_peer_setup(
        cudaIpcOpenMemHandle(&opened_[r], handles[r].allocation, cudaIpcMemLazyEnablePeerAccess),
        "memory of rank " + std::to_string(r));
    memory_[r] = static_cast<char*>(opened_[r]) + handles[r].offset;
  }
}

}  // namespace star_attention
