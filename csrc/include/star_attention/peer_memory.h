// Device memory of each rank of one node, as the other ranks see it (CUDA IPC, over NVLink).
#pragma once

#include <array>
#include <cstdint>

#include "star_attention/attention.h"
#include "star_attention/export.h"

namespace star_attention {

class STAR_ATTENTION_EXPORT PeerMemory {
 public:
  static constexpr int kMaxRanks = 8;
  struct Handle {
    cudaIpcMemHandle_t allocation;
    int64_t offset;  // of the memory in its allocation
  };

  // `memory`, of cudaMalloc, of `device`; it is the owner's, and has to stay.
  PeerMemory(int rank, int size, void* memory, int device);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // For the other processes. Ranks may share a GPU, but not a process.
  Handle handle() const;
  // Maps the peers' memory. Throws std::runtime_error if some of it is out of reach.
  void open(const Handle* handles);  // [size], in rank order

  int size() const { return size_; }
  void* at(int rank) const { return memory_[rank]; }  // null before open

 private:
  int rank_, size_, device_;
  std::array<void*, kMaxRanks> opened_{};  // allocations
  std::array<void*, kMaxRanks> memory_{};
};

}  // namespace star_attention
