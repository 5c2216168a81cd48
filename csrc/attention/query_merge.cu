// kRowWarps warps take one head of one token and stride over the pieces of its (sequence, KV head)
// pair, each lane holding a slice of the head dimension; then the warps' sums are added in order: a
// block for the few rows and many pieces of a decode step, a warp for the many rows and few pieces
// of a question. On sm_90 blocks start while the query kernel runs, find their pieces, and wait for
// it: it lets them start when what is in front of it has ended, so that the lengths are there.
#include "attention/query_shares.cuh"
#include "common/dependent_launch.cuh"
#include "common/device.h"

namespace star_attention {
namespace {

constexpr int kWarps = 8;
constexpr int kInFlight = 5;  // pieces whose loads a warp issues before it needs the first
constexpr int kMostPiecesOfWarp = 16;

template <typename Out, int kHeadDim, int kRowWarps>
__global__ void __launch_bounds__(32 * kWarps)
    query_merge_kernel(const PagedAttentionParams p, const QueryPartials partials) {
  constexpr int kSlice = kHeadDim / 32;

  allow_next_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kRowWarps;
  const int out = blockIdx.x * (kWarps / kRowWarps) + threadIdx.x / 32 / kRowWarps;
  const int token = out / p.num_q_heads, head = out % p.num_q_heads;
  const int group = p.num_q_heads / p.num_kv_heads;
  const auto tiles = [&](int seq) { return num_tiles_of(p, partials.tile, seq); };

  const SequencePosition at =
      locate(p.num_seqs, token, [&](int seq) { return num_tokens_of(p, seq); });
  const QueryLine line(p, partials);
  int first = 0, last = 0;  // shares that hold a piece
  if (at.seq < p.num_seqs) {
    const int num_tiles = tiles(at.seq);
    const int begin = p.num_kv_heads * sum_over_sequences(at.seq, tiles) + head / group * num_tiles;
    first = line.share_of(begin);
    last = line.share_of(begin + num_tiles - 1);
  }
  wait_for_previous_kernel();
  if (first == last) return;

  const int row = at.offset * group + head % group;
  const auto index = [&](int share) {
    return partials.index(2 * share + (share == first ? 1 : 0), row);
  };

  Pack<float, kSlice> slices[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int share = min(first + warp + i * kRowWarps, last);
    slices[i] = load_pack<float, kSlice>(partials.o + index(share) * kHeadDim + lane * kSlice);
  }

  float max = kNoMax, sum = 0.f;  // of exp(lse - max)
  for (int share = first + lane; share <= last; share += 32) {
    const float lse = partials.lse[index(share)];
    const float old = max;
    max = fmaxf(max, lse);
    sum = sum * __expf(old - max) + __expf(lse - max);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other_max = __shfl_xor_sync(~0u, max, mask);
    const float other_sum = __shfl_xor_sync(~0u, sum, mask);
    const float old = max;
    max = fmaxf(max, other_max);
    sum = sum * __expf(old - max) + other_sum * __expf(other_max - max);
  }
  const float scale = sum == 0.f ? 0.f : 1.f / sum;

  float acc[kSlice] = {};
  const auto add = [&](int share, const Pack<float, kSlice>& slice) {
    const float weight = scale * __expf(partials.lse[index(share)] - max);
#pragma unroll
    for (int k = 0; k < kSlice; ++k) acc[k] += weight * slice.v[k];
  };
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int share = first + warp + i * kRowWarps;
    if (share <= last) add(share, slices[i]);
  }
  for (int share = first + warp + kInFlight * kRowWarps; share <= last; share += kRowWarps) {
    add(share, load_pack<float, kSlice>(partials.o + index(share) * kHeadDim + lane * kSlice));
  }
  if (warp == 0 && lane == 0) p.lse[out] = sum == 0.f ? -INFINITY : max + logf(sum);

  Out* const o = static_cast<Out*>(p.o) + int64_t{out} * kHeadDim;
  if constexpr (kRowWarps == 1) {
    Pack<Out, kSlice> pack;
#pragma unroll
    for (int k = 0; k < kSlice; ++k) pack.v[k] = from_float<Out>(acc[k]);
    store_pack(o + lane * kSlice, pack);
  } else {
    static_assert(kRowWarps == kWarps);
    __shared__ float sums[kWarps][kHeadDim];
#pragma unroll
    for (int k = 0; k < kSlice; ++k) sums[warp][lane * kSlice + k] = acc[k];
    __syncthreads();
    if (threadIdx.x < kHeadDim) {
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += sums[w][threadIdx.x];
      o[threadIdx.x] = from_float<Out>(total);
    }
  }
}

template <typename Out, int kHeadDim>
void launch(const PagedAttentionParams& p, const QueryPartials& partials, cudaStream_t stream) {
  const int64_t rows = int64_t{p.num_tokens} * p.num_q_heads;
  const int pieces = partials.num_shares / p.num_kv_heads + 2;  // of a pair, at most
  const auto run = [&](auto kernel, int64_t blocks) {
    launch_dependent(kernel, dim3(static_cast<unsigned>(blocks)), 32 * kWarps, 0, stream,
                     "query_merge", p, partials);
  };
  if (rows > kWarps * current_device().num_sms && pieces <= kMostPiecesOfWarp) {
    run(query_merge_kernel<Out, kHeadDim, 1>, (rows + kWarps - 1) / kWarps);
  } else {
    run(query_merge_kernel<Out, kHeadDim, kWarps>, rows);
  }
}

template <typename Out>
void launch(const PagedAttentionParams& p, const QueryPartials& partials, cudaStream_t stream) {
  p.head_dim == 128 ? launch<Out, 128>(p, partials, stream) : launch<Out, 64>(p, partials, stream);
}

}  // namespace

void merge_query_partials(const PagedAttentionParams& p, const QueryPartials& partials,
                          cudaStream_t stream) {
  if (p.o_dtype == DType::kFloat32) {
    launch<float>(p, partials, stream);
  } else {
    dispatch_16bit(p.o_dtype, [&](auto out) { launch<decltype(out)>(p, partials, stream); });
  }
}

}  // namespace star_attention
