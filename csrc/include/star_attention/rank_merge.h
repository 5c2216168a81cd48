// The exact softmax over ranks by whatever connects them: peer memory inside a node, NCCL anywhere.
#pragma once

#include "star_attention/nccl_communicator.h"
#include "star_attention/peer_merge.h"

namespace star_attention {

// Refers to what it is made of, which has to outlive it and the CUDA graphs that captured its
// calls.
class STAR_ATTENTION_EXPORT RankMerge {
 public:
  explicit RankMerge(const PeerMerge& peers) : peers_(&peers) {}
  // `workspace`: device memory for every rank's o and lse of as many tokens as go through it at
  // once.
  RankMerge(NcclCommunicator& nccl, void* workspace, int64_t workspace_bytes)
      : nccl_(&nccl), workspace_(workspace), workspace_bytes_(workspace_bytes) {}

  // Any number of tokens, the same on all ranks, as is the order of calls; all ranks get the same
  // bits. Throws std::invalid_argument if not even one token fits.
  void merge(const PeerMergeParams& params, cudaStream_t stream) const;

  int device() const { return peers_ ? peers_->device() : nccl_->device(); }

 private:
  // The most tokens that go through it at once.
  int max_tokens(DType dtype, int num_heads, int head_dim) const;
  void merge_over_nccl(const PeerMergeParams& params, cudaStream_t stream) const;

  const PeerMerge* peers_ = nullptr;
  NcclCommunicator* nccl_ = nullptr;
  void* workspace_ = nullptr;
  int64_t workspace_bytes_ = 0;
};

// Merges what has been gathered: every rank's o, in rank order, then every rank's lse. Of `params`,
// o and lse themselves are not read.
STAR_ATTENTION_EXPORT void merge_gathered(const PeerMergeParams& params, const void* gathered,
                                          int size, cudaStream_t stream);

}  // namespace star_attention
