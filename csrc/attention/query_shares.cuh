// How query attention splits its work: the KV tiles of all (sequence, KV head) pairs form one line,
// and each group of thread blocks takes an equal share of it. A share is a run of pieces, a piece
// being consecutive tiles of one pair. A piece that is a whole pair is final; the others, at most
// the first and the last of a share, leave normalised partials that query_merge.cu adds up.
#pragma once

#include "attention/rows.cuh"

namespace star_attention {

struct QueryPartials {
  float* o;    // [2 * num_shares, rows, head_dim]
  float* lse;  // [2 * num_shares, rows]
  int num_shares;
  int rows;  // max_q_len * group
  int tile;  // tokens of a KV tile

  // Where row `row` of a slot is, as an index into lse.
  __host__ __device__ int64_t index(int slot, int row) const { return int64_t{slot} * rows + row; }
};

__device__ inline int num_tiles_of(const PagedAttentionParams& p, int tile, int seq) {
  return num_tokens_of(p, seq) > 0 ? max(1, ceil_div(kv_len_of(p, seq), tile)) : 0;
}

// The line of tiles and its cuts. Whole warps construct it.
struct QueryLine {
  int length;
  int num_shares;
  int quotient, remainder;  // of length / num_shares: the first `remainder` shares have one more

  __device__ QueryLine(const PagedAttentionParams& p, const QueryPartials& partials) {
    length = p.num_kv_heads * sum_over_sequences(p.num_seqs, [&](int seq) {
               return num_tiles_of(p, partials.tile, seq);
             });
    num_shares = max(1, min(partials.num_shares, length));
    quotient = length / num_shares;
    remainder = length % num_shares;
  }

  __device__ int begin(int share) const { return share * quotient + min(share, remainder); }
  __device__ int share_of(int unit) const {
    const int longer = remainder * (quotient + 1);  // units of the longer shares
    return unit < longer ? unit / (quotient + 1) : remainder + (unit - longer) / quotient;
  }
};

struct QueryPiece {
  int seq;
  int kv_head;
  int tile_begin;
  int tile_end;
  int num_tiles;  // of the pair

  __device__ bool whole() const { return tile_end - tile_begin == num_tiles; }
  __device__ int slot(int share) const { return 2 * share + (tile_begin == 0 ? 1 : 0); }
};

// Walks the pieces of one share. Whole warps construct and advance it.
class QueryPieces {
 public:
  __device__ QueryPieces(const PagedAttentionParams& p, const QueryPartials& partials, int share)
      : p_(p), tile_(partials.tile) {
    const QueryLine line(p, partials);
    if (share >= line.num_shares) return;
    const int begin = line.begin(share);
    left_ = line.begin(share + 1) - begin;
    const SequencePosition at = locate(
        p.num_seqs, begin, [&](int seq) { return p.num_kv_heads * num_tiles_of(p, tile_, seq); });
    seq_ = at.seq;
    num_tiles_ = at.count / p.num_kv_heads;
    kv_head_ = at.offset / num_tiles_;
    tile_begin_ = at.offset % num_tiles_;
  }

  __device__ bool next(QueryPiece& piece) {
    if (left_ == 0) return false;
    const int tile_end = min(num_tiles_, tile_begin_ + left_);
    piece = {seq_, kv_head_, tile_begin_, tile_end, num_tiles_};
    left_ -= tile_end - tile_begin_;
    tile_begin_ = 0;
    if (left_ > 0 && ++kv_head_ == p_.num_kv_heads) {
      kv_head_ = 0;
      do {
        num_tiles_ = num_tiles_of(p_, tile_, ++seq_);
      } while (num_tiles_ == 0);
    }
    return true;
  }

 private:
  const PagedAttentionParams& p_;
  const int tile_;
  int left_ = 0;
  int seq_ = 0;
  int kv_head_ = 0;
  int tile_begin_ = 0;
  int num_tiles_ = 0;
};

// Where a piece's rows go: to the output if it is the whole pair, else to its slot of the partials.
struct PieceOut {
  RowsOut to;
  bool whole;
  int64_t first;  // row of the slot

  __device__ PieceOut(const PagedAttentionParams& p, const QueryPartials& partials,
                      const QueryPiece& piece, int share)
      : to(piece.whole() ? output_of(p) : RowsOut{partials.o, partials.lse, true}),
        whole(piece.whole()),
        first(partials.index(piece.slot(share), 0)) {}

  __device__ int64_t index(const PagedAttentionParams& p, const SequenceRows& rows, int row) const {
    return whole ? rows.out(p, row) : first + row;
  }
};

inline size_t query_partials_bytes(const PagedAttentionParams& p, int num_shares) {
  const int64_t rows = int64_t{p.max_q_len} * (p.num_q_heads / p.num_kv_heads);
  return 2 * num_shares * rows * (p.head_dim + 1) * sizeof(float);
}

inline QueryPartials query_partials(const PagedAttentionParams& p, int num_shares, int tile,
                                    void* workspace) {
  const int rows = p.max_q_len * (p.num_q_heads / p.num_kv_heads);
  float* o = static_cast<float*>(workspace);
  return {o, o + int64_t{2} * num_shares * rows * p.head_dim, num_shares, rows, tile};
}

// Adds up the partials of pairs that were split. Comes right after the query kernel on its stream.
void merge_query_partials(const PagedAttentionParams& params, const QueryPartials& partials,
                          cudaStream_t stream);

}  // namespace star_attention
