#include "star_attention/rank_merge.h"

#include <algorithm>

#include "common/check.h"
#include "common/device_guard.h"
#include "star_attention/merge.h"

namespace star_attention {
namespace {

// A token's o.
int64_t token_bytes(DType dtype, int num_heads, int head_dim) {
  return int64_t{dtype == DType::kFloat32 ? 4 : 2} * num_heads * head_dim;
}

int64_t token_bytes(const PeerMergeParams& p) {
  return token_bytes(p.dtype, p.num_heads, p.head_dim);
}

int64_t lse_bytes(const PeerMergeParams& p) {
  return int64_t{sizeof(float)} * p.num_tokens * p.num_heads;
}

// The tokens from `first` on, `count` of them.
PeerMergeParams part_of(const PeerMergeParams& p, int64_t first, int count) {
  PeerMergeParams part = p;
  part.num_tokens = count;
  part.o = static_cast<const char*>(p.o) + first * token_bytes(p);
  part.lse = p.lse + first * p.num_heads;
  part.out = static_cast<char*>(p.out) + first * token_bytes(p.out_dtype, p.num_heads, p.head_dim);
  return part;
}

}  // namespace

int RankMerge::max_tokens(DType dtype, int num_heads, int head_dim) const {
  if (peers_) return peers_->max_tokens(dtype, num_heads, head_dim);
  const int64_t each = token_bytes(dtype, num_heads, head_dim) + sizeof(float) * num_heads;
  return static_cast<int>(workspace_bytes_ / (nccl_->size() * each));
}

void RankMerge::merge(const PeerMergeParams& p, cudaStream_t stream) const {
  check(p);
  const int most = max_tokens(p.dtype, p.num_heads, p.head_dim);
  require(most > 0, "o", std::to_string(token_bytes(p)) + " bytes a token",
          "as many as the merge's buffers hold, or fewer");
  for (int first = 0; first < p.num_tokens; first += most) {
    const PeerMergeParams part = part_of(p, first, std::min(most, p.num_tokens - first));
    if (peers_) {
      peers_->merge(part, stream);
    } else {
      merge_over_nccl(part, stream);
    }
  }
}

void RankMerge::merge_over_nccl(const PeerMergeParams& p, cudaStream_t stream) const {
  const int64_t o_bytes = p.num_tokens * token_bytes(p);
  char* const every_lse = static_cast<char*>(workspace_) + nccl_->size() * o_bytes;
  nccl_->group_start();
  nccl_->all_gather(p.o, workspace_, o_bytes, stream);
  nccl_->all_gather(p.lse, every_lse, lse_bytes(p), stream);
  nccl_->group_end();
  const DeviceGuard guard(device());
  merge_gathered(p, workspace_, nccl_->size(), stream);
}

void merge_gathered(const PeerMergeParams& p, const void* gathered, int size, cudaStream_t stream) {
  MergeLseParams merge{};
  merge.dtype = p.dtype;
  merge.out_dtype = p.out_dtype;
  merge.num_shards = size;
  merge.num_tokens = p.num_tokens;
  merge.num_heads = p.num_heads;
  merge.head_dim = p.head_dim;
  merge.o = gathered;
  merge.o_token_stride = int64_t{p.num_heads} * p.head_dim;
  merge.o_shard_stride = p.num_tokens * merge.o_token_stride;
  merge.lse = reinterpret_cast<const float*>(static_cast<const char*>(gathered) +
                                             size * p.num_tokens * token_bytes(p));
  merge.lse_token_stride = p.num_heads;
  merge.lse_shard_stride = int64_t{p.num_tokens} * p.num_heads;
  merge.out = p.out;
  merge_lse(merge, stream);
}

}  // namespace star_attention
