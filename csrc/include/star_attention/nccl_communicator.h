// NCCL between ranks that each have a GPU of their own, on one or several nodes.
//
// libnccl.so.2 is loaded at first use, so that neither the build nor a program without NCCL needs
// it. Errors of NCCL are std::runtime_error with NCCL's text.
#pragma once

#include <array>
#include <atomic>
#include <string>

#include "star_attention/attention.h"

namespace star_attention {

// Takes the libnccl.so.2 that the process has already, else the file `path` unless that is empty,
// else the system's. Once one is loaded, does nothing.
STAR_ATTENTION_EXPORT void load_nccl(const std::string& path);

// Made by one rank; the program brings it to the others.
using NcclId = std::array<char, 128>;
STAR_ATTENTION_EXPORT NcclId make_nccl_id();

// Every rank makes the same calls in the same order. They return at once and run on `stream`, a
// stream of `device`.
class STAR_ATTENTION_EXPORT NcclCommunicator {
 public:
  // Waits until all ranks have come.
  NcclCommunicator(const NcclId& id, int rank, int size, int device);
  // Waits for what is under way, and for the end of all CUDA graphs that captured a call.
  ~NcclCommunicator();
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  // `gathered` holds `bytes` of each rank, in rank order.
  void all_gather(const void* buffer, void* gathered, size_t bytes, cudaStream_t stream);
  // To one rank, which receives as much. What goes from one to another keeps its order.
  void send(const void* buffer, size_t bytes, int dest, cudaStream_t stream);
  void receive(void* buffer, size_t bytes, int source, cudaStream_t stream);
  // Overwrites `buffer` with the sum over ranks.
  void all_reduce(void* buffer, size_t count, DType dtype, cudaStream_t stream);

  // Calls between the two become one operation: scattered buffers, or several small ones.
  void group_start();
  void group_end();

  // Throws if the connection to another rank has broken.
  void check() const;
  // Ends what is under way, without the other ranks; later calls throw. From any thread.
  void abort();

  // Ends it, on all ranks, when no graph that captured its calls is left.
  void close();

  int size() const { return size_; }
  int device() const { return device_; }

 private:
  void* comm() const;

  int size_, device_;
  std::atomic<void*> comm_{nullptr};
};

}  // namespace star_attention
