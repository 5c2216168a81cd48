// A block takes one token's head. Its warps stride over the pieces of the head's (sequence, KV
// head) pair, each lane holding a slice of the head dimension; then the warps' sums are added in
// order. On sm_90 blocks start while the query kernel runs, find their pieces, and wait for it: it
// lets them start when what is in front of it has ended, so that the lengths are there.
#include "attention/query_shares.cuh"
#include "common/dependent_launch.cuh"

namespace star_attention {
namespace {

constexpr int kWarps = 8;
constexpr int kInFlight = 5;  // pieces whose loads a warp issues before it needs the first

template <typename Out, int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps)
    query_merge_kernel(const PagedAttentionParams p, const QueryPartials partials) {
  constexpr int kSlice = kHeadDim / 32;
  __shared__ float sums[kWarps][kHeadDim];

  allow_next_kernel();
  const int token = blockIdx.x, head = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
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
    const int share = min(first + warp + i * kWarps, last);
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
    const int share = first + warp + i * kWarps;
    if (share <= last) add(share, slices[i]);
  }
  for (int share = first + warp + kInFlight * kWarps; share <= last; share += kWarps) {
    add(share, load_pack<float, kSlice>(partials.o + index(share) * kHeadDim + lane * kSlice));
  }
#pragma unroll
  for (int k = 0; k < kSlice; ++k) sums[warp][lane * kSlice + k] = acc[k];
  __syncthreads();

  const int64_t out = int64_t{token} * p.num_q_heads + head;
  if (threadIdx.x < kHeadDim) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w][threadIdx.x];
    static_cast<Out*>(p.o)[out * kHeadDim + threadIdx.x] = from_float<Out>(total);
  }
  if (threadIdx.x == 0) p.lse[out] = sum == 0.f ? -INFINITY : max + logf(sum);
}

template <typename Out, int kHeadDim>
void launch(const PagedAttentionParams& p, const QueryPartials& partials, cudaStream_t stream) {
  launch_dependent(query_merge_kernel<Out, kHeadDim>, dim3(p.num_tokens, p.num_q_heads),
                   32 * kWarps, 0, stream, "query_merge", p, partials);
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
