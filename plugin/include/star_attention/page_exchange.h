// Pages that ranks send one another in every layer of a step, straight into the receivers' pages.
#pragma once

#include <cstdint>
#include <vector>

#include "star_attention/nccl_communicator.h"

namespace star_attention {

class STAR_ATTENTION_EXPORT PageExchange {
 public:
  struct Run {
    int peer;       // where the pages go to, or come from
    int64_t first;  // page of this rank's pool
    int64_t count;
  };

  // Of what one rank sends to another, both have runs of the same lengths in the same order. No
  // page is received that is sent, too. `nccl` has to outlive this.
  PageExchange(NcclCommunicator& nccl, std::vector<Run> sends, std::vector<Run> receives);
  ~PageExchange();
  PageExchange(const PageExchange&) = delete;
  PageExchange& operator=(const PageExchange&) = delete;

  // After this rank has stored a layer's KV on `stream`, which goes on when the pages have arrived.
  // A receive posted sooner would hold multiprocessors while it waits for other ranks. Where none
  // is to arrive `stream` goes on at once: a stream of high priority sends.
  void exchange(void* layer_pool, int64_t num_pages, size_t page_bytes, cudaStream_t stream);
  // After the last exchange() of a step: from here on `stream` may overwrite the pages.
  void finish(cudaStream_t stream);

  // GPU time so far between storing and the arrival of the pages. The streams of exchange() have to
  // be idle.
  double wait_seconds() const;

 private:
  struct Wait {
    cudaEvent_t begin, end;
  };
  void transfer(char* layer_pool, size_t page_bytes, cudaStream_t stream);

  NcclCommunicator& nccl_;
  std::vector<Run> sends_, receives_;
  // Where pages are sent and none arrive, else null.
  cudaStream_t side_ = nullptr;
  cudaEvent_t stored_ = nullptr;  // the layer's KV is in its pages
  cudaEvent_t sent_ = nullptr;
  std::vector<Wait> waits_;
};

}  // namespace star_attention
