#include "star_attention/shared_pages.h"

#include <utility>

#include "common/device_guard.h"

namespace star_attention {

SharedPages::SharedPages(NcclCommunicator& nccl, int rank, std::vector<Run> runs)
    : nccl_(nccl), rank_(rank), runs_(std::move(runs)) {
  require(rank >= 0 && rank < nccl.size(), "rank", rank, "0 to " + std::to_string(nccl.size() - 1));
  for (const Run& run : runs_) {
    require(run.first >= 0, "runs", run.first, "pages from 0 on");
    require(run.count > 0, "runs", run.count, "at least 1 page each");
  }
  if (rank_ > 0) return;
  const DeviceGuard guard(nccl_.device());
  int least = 0, greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
  check_cuda(cudaStreamCreateWithPriority(&side_, cudaStreamNonBlocking, greatest),
             "cudaStreamCreate");
  check_cuda(cudaEventCreateWithFlags(&stored_, cudaEventDisableTiming), "cudaEventCreate");
  check_cuda(cudaEventCreateWithFlags(&sent_, cudaEventDisableTiming), "cudaEventCreate");
}

SharedPages::~SharedPages() {
  for (const Wait& wait : waits_) {
    cudaEventDestroy(wait.begin);
    cudaEventDestroy(wait.end);
  }
  if (sent_) cudaEventDestroy(sent_);
  if (stored_) cudaEventDestroy(stored_);
  if (side_) cudaStreamDestroy(side_);
}

void SharedPages::share(void* layer_pool, int64_t num_pages, size_t page_bytes,
                        cudaStream_t stream) {
  for (const Run& run : runs_) {
    require(run.first + run.count <= num_pages, "runs", run.first + run.count,
            "pages below " + std::to_string(num_pages));
  }
  char* const pool = static_cast<char*>(layer_pool);
  if (rank_ == 0) {
    check_cuda(cudaEventRecord(stored_, stream), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(side_, stored_), "cudaStreamWaitEvent");
    broadcast(pool, page_bytes, side_);
  } else {
    const Wait& wait = next_wait();
    check_cuda(cudaEventRecord(wait.begin, stream), "cudaEventRecord");
    broadcast(pool, page_bytes, stream);
    check_cuda(cudaEventRecord(wait.end, stream), "cudaEventRecord");
  }
}

void SharedPages::finish(cudaStream_t stream) {
  if (rank_ > 0) return;
  check_cuda(cudaEventRecord(sent_, side_), "cudaEventRecord");
  check_cuda(cudaStreamWaitEvent(stream, sent_), "cudaStreamWaitEvent");
}

double SharedPages::wait_seconds() {
  double seconds = 0;
  for (size_t i = 0; i < num_waits_; ++i) {
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, waits_[i].begin, waits_[i].end),
               "wait_seconds before the step is over");
    seconds += 1e-3 * milliseconds;
  }
  num_waits_ = 0;
  return seconds;
}

const SharedPages::Wait& SharedPages::next_wait() {
  if (num_waits_ == waits_.size()) {
    Wait wait{};
    check_cuda(cudaEventCreate(&wait.begin), "cudaEventCreate");
    waits_.push_back(wait);
    check_cuda(cudaEventCreate(&waits_.back().end), "cudaEventCreate");
  }
  return waits_[num_waits_++];
}

void SharedPages::broadcast(char* layer_pool, size_t page_bytes, cudaStream_t stream) {
  nccl_.group_start();
  for (const Run& run : runs_) {
    nccl_.broadcast(layer_pool + run.first * page_bytes, run.count * page_bytes, /*root=*/0,
                    stream);
  }
  nccl_.group_end();
}

}  // namespace star_attention
