// Pages whose KV rank 0 computes for all ranks, layer by layer: those of the anchor.
#pragma once

#include <cstdint>
#include <vector>

#include "star_attention/nccl_communicator.h"

namespace star_attention {

class SharedPages {
 public:
  struct Run {
    int64_t first;  // page of this rank's pool
    int64_t count;
  };

  // `runs`: the pages in an order that all ranks agree on, cut into runs of the same lengths on all
  // of them. `nccl` has to outlive this.
  SharedPages(NcclCommunicator& nccl, int rank, std::vector<Run> runs);
  ~SharedPages();
  SharedPages(const SharedPages&) = delete;
  SharedPages& operator=(const SharedPages&) = delete;

  // After this rank has stored a layer's KV on `stream`. Rank 0's `stream` goes on at once: a
  // stream of high priority sends. On other ranks it goes on when the pages have arrived; they ask
  // no sooner, because a receive that waits for rank 0 holds multiprocessors.
  void share(void* layer_pool, int64_t num_pages, size_t page_bytes, cudaStream_t stream);
  // After the last share() of a step: from here on `stream` may overwrite the pages.
  void finish(cudaStream_t stream);

  // GPU time between storing and the arrival of the pages, summed since the last call. The streams
  // of share() have to be idle. 0 on rank 0.
  double wait_seconds();

 private:
  struct Wait {
    cudaEvent_t begin, end;
  };
  const Wait& next_wait();
  void broadcast(char* layer_pool, size_t page_bytes, cudaStream_t stream);

  NcclCommunicator& nccl_;
  int rank_;
  std::vector<Run> runs_;
  cudaStream_t side_ = nullptr;   // rank 0's
  cudaEvent_t stored_ = nullptr;  // rank 0's: the layer's KV is in its pages
  cudaEvent_t sent_ = nullptr;    // rank 0's
  std::vector<Wait> waits_;       // kept for reuse
  size_t num_waits_ = 0;          // in use since wait_seconds()
};

}  // namespace star_attention
