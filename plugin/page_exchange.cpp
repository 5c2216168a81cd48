#include "star_attention/page_exchange.h"

#include <string>
#include <utility>

#include "common/device_guard.h"

namespace star_attention {
namespace {

void check(const char* name, const std::vector<PageExchange::Run>& runs, int num_ranks) {
  for (const PageExchange::Run& run : runs) {
    require(run.peer >= 0 && run.peer < num_ranks, name, run.peer,
            "ranks 0 to " + std::to_string(num_ranks - 1));
    require(run.first >= 0, name, run.first, "pages from 0 on");
    require(run.count > 0, name, run.count, "at least 1 page each");
  }
}

void check_pages(const char* name, const std::vector<PageExchange::Run>& runs, int64_t num_pages) {
  for (const PageExchange::Run& run : runs) {
    require(run.first + run.count <= num_pages, name, run.first + run.count,
            "pages below " + std::to_string(num_pages));
  }
}

}  // namespace

PageExchange::PageExchange(NcclCommunicator& nccl, std::vector<Run> sends,
                           std::vector<Run> receives)
    : nccl_(nccl), sends_(std::move(sends)), receives_(std::move(receives)) {
  check("sends", sends_, nccl.size());
  check("receives", receives_, nccl.size());
  if (sends_.empty() || !receives_.empty()) return;
  const DeviceGuard guard(nccl_.device());
  int least = 0, greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
  check_cuda(cudaStreamCreateWithPriority(&side_, cudaStreamNonBlocking, greatest),
             "cudaStreamCreate");
  check_cuda(cudaEventCreateWithFlags(&stored_, cudaEventDisableTiming), "cudaEventCreate");
  check_cuda(cudaEventCreateWithFlags(&sent_, cudaEventDisableTiming), "cudaEventCreate");
}

PageExchange::~PageExchange() {
  for (const Wait& wait : waits_) {
    cudaEventDestroy(wait.begin);
    if (wait.end) cudaEventDestroy(wait.end);
  }
  if (sent_) cudaEventDestroy(sent_);
  if (stored_) cudaEventDestroy(stored_);
  if (side_) cudaStreamDestroy(side_);
}

void PageExchange::exchange(void* layer_pool, int64_t num_pages, size_t page_bytes,
                            cudaStream_t stream) {
  check_pages("sends", sends_, num_pages);
  check_pages("receives", receives_, num_pages);
  char* const pool = static_cast<char*>(layer_pool);
  if (side_) {
    check_cuda(cudaEventRecord(stored_, stream), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(side_, stored_), "cudaStreamWaitEvent");
    transfer(pool, page_bytes, side_);
  } else if (!receives_.empty()) {
    Wait wait{};
    check_cuda(cudaEventCreate(&wait.begin), "cudaEventCreate");
    waits_.push_back(wait);
    check_cuda(cudaEventCreate(&waits_.back().end), "cudaEventCreate");
    check_cuda(cudaEventRecord(waits_.back().begin, stream), "cudaEventRecord");
    transfer(pool, page_bytes, stream);
    check_cuda(cudaEventRecord(waits_.back().end, stream), "cudaEventRecord");
  }
}

void PageExchange::finish(cudaStream_t stream) {
  if (side_ == nullptr) return;
  check_cuda(cudaEventRecord(sent_, side_), "cudaEventRecord");
  check_cuda(cudaStreamWaitEvent(stream, sent_), "cudaStreamWaitEvent");
}

double PageExchange::wait_seconds() const {
  double seconds = 0;
  for (const Wait& wait : waits_) {
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, wait.begin, wait.end),
               "wait_seconds before the step is over");
    seconds += 1e-3 * milliseconds;
  }
  return seconds;
}

void PageExchange::transfer(char* layer_pool, size_t page_bytes, cudaStream_t stream) {
  nccl_.group_start();
  for (const Run& run : sends_) {
    nccl_.send(layer_pool + run.first * page_bytes, run.count * page_bytes, run.peer, stream);
  }
  for (const Run& run : receives_) {
    nccl_.receive(layer_pool + run.first * page_bytes, run.count * page_bytes, run.peer, stream);
  }
  nccl_.group_end();
}

}  // namespace star_attention
