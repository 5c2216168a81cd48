// The exact softmax over the ranks of one node in one kernel: each rank's attention partials go
// straight into its peers' memory (CUDA IPC, over NVLink), and each rank merges all of them.
//
// Protocol. A rank's memory has a slot for every peer and parity. A row (one head of one token) is
// cut into packets of 8 bytes of o; rows form chunks of 128 packets. Every packet travels as two
// 8-byte words {4 bytes of payload, epoch}, every row's lse as one. A word is one atomic store: a
// receiver that reads the epoch it waits for has the payload too. So no word is ordered against any
// other, there are no fences, and the data is there after one trip. It doubles the bytes, which
// matters only for many tokens: 512 of them (32 heads of 128, float32) are 17 MiB to each peer.
// There is no second protocol for these: they come once per question, and one token per step.
//
// Epochs. Each chunk counts its own calls, in device memory, so graphs can be replayed; all ranks
// make the same calls, so their counts agree. Memory starts as zeros, the first epoch is 1, and a
// slot of epoch e holds e - 2 of its parity until e arrives: equality of epochs is enough, and
// wrapping around after 2^32 calls does no harm.
//
// Two parities suffice. When a rank stores epoch e + 2 of a chunk, its kernel of e + 1 is over, so
// it has received this chunk of e + 1 from every peer; a peer sends e + 1 only after its kernel of
// e is over, stream order, and with it the peer's reads of the slot that is now overwritten.
//
// Deadlock. A block sends all its chunks before it waits, and the grid fits on the GPU at once: on
// every rank each block starts sooner or later, whatever the order, and then nobody waits for a
// block that has not started.
//
// A lost rank. A wait longer than the timeout notes which rank is missing, in mapped host memory
// for check(), and in device memory, upon which all waits, of this and later calls, end at once.
// Outputs are then NaN.
#pragma once

#include <memory>

#include "star_attention/attention.h"
#include "star_attention/peer_memory.h"

namespace star_attention {

struct PeerMergeParams {
  DType dtype;      // of o: any
  DType out_dtype;  // of out: any
  int num_tokens;   // the same on all ranks, as are num_heads, head_dim and dtype
  int num_heads;
  int head_dim;  // a multiple of 8, from 16 to 256

  const void* o;     // [num_tokens, num_heads, head_dim], contiguous
  const float* lse;  // [num_tokens, num_heads]; -inf: o counts for nothing; NaN surfaces
  void* out;         // [num_tokens, num_heads, head_dim]; 0 where every rank's lse is -inf
};

// Throws std::invalid_argument if the call would not be valid; the call itself checks too.
STAR_ATTENTION_EXPORT void check(const PeerMergeParams& params);

class STAR_ATTENTION_EXPORT PeerMerge {
 public:
  static constexpr int kMaxRanks = PeerMemory::kMaxRanks;

  // `capacity`: bytes of o in the largest call; takes 4.5 (size - 1) times as much of `device`.
  PeerMerge(int rank, int size, int64_t capacity, double timeout_seconds, int device);

  // Has to be open on all ranks before the first call.
  PeerMemory& peers() { return *peers_; }

  // The most tokens that a call can have.
  int max_tokens(DType dtype, int num_heads, int head_dim) const;

  // One kernel on `stream`; calls follow one another, in the same order on all ranks. Ranks merge
  // in rank order, whatever arrives first: all of them get the same bits.
  void merge(const PeerMergeParams& params, cudaStream_t stream) const;

  // Throws std::runtime_error that names the rank which the last wait was for, if it was in vain.
  void check() const;

  int size() const { return size_; }
  int device() const { return device_; }

 private:
  struct Free {
    void operator()(char* memory) const { cudaFree(memory); }
  };
  struct FreeHost {
    void operator()(int* memory) const { cudaFreeHost(memory); }
  };

  int rank_, size_, device_, num_chunks_;
  double timeout_seconds_;
  std::unique_ptr<char, Free> memory_;        // slots, epochs, lost rank
  std::unique_ptr<int, FreeHost> lost_rank_;  // -1: none
  std::unique_ptr<PeerMemory> peers_;         // memory_ of each rank
};

}  // namespace star_attention
