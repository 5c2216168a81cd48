// A block copies one row, 16 bytes a thread at a time.
#include "common/check.h"
#include "common/dependent_launch.cuh"
#include "star_attention/layers.h"

namespace star_attention {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) gather_rows_kernel(const GatherRowsParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t packs = p.width / 8;
  const uint4* row = static_cast<const uint4*>(p.x) + p.rows[blockIdx.x] * packs;
  uint4* out = static_cast<uint4*>(p.out) + blockIdx.x * packs;
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) out[i] = row[i];
}

}  // namespace

void check(const GatherRowsParams& p) {
  require(p.width > 0 && p.width % 8 == 0, "x.shape[1]", p.width, "a multiple of 8");
  require(p.num_rows >= 0, "rows.shape[0]", p.num_rows, "at least 0");
  if (p.num_rows == 0) return;
  require_pointer(p.x, "x", 16);
  require_pointer(p.rows, "rows", 4);
  require_pointer(p.out, "out", 16);
}

void gather_rows(const GatherRowsParams& p, cudaStream_t stream) {
  check(p);
  if (p.num_rows == 0) return;
  launch_dependent(gather_rows_kernel, p.num_rows, kThreads, 0, stream, "gather_rows", p);
}

}  // namespace star_attention
