// One tile of packed rows over a run of KV tiles, with the instructions of sm_80.
//
// Pipeline: KV tiles of 64 tokens in shared memory, filled by cp.async; the next tile loads while
// the current one is multiplied, with one barrier a tile. Tokens past the end of the cache are
// filled with zeros and never read from memory.
//
// 128 rows or more are bound by the tensor cores: their warps hold 32 rows each, which halves what
// they read from shared memory per multiplication, and leave Q there. Where two blocks of 128 rows
// have to share a multiprocessor there is room for one V tile only (80 KB a block), and V loads
// behind S = Q Kᵀ and softmax. Fewer rows are bound by memory: 16 rows a warp, Q in registers. When
// the rows fill one warp only, the warps split the tokens of each tile and add up at the end.
//
// The running maximum moves, and O is rescaled, only when a score exceeds it by 2^8; the final
// division makes up for it.
#pragma once

#include "attention/rows.cuh"
#include "common/sm80_ptx.cuh"

namespace star_attention {

template <typename T_, int kHeadDim_, int kRowWarps_, int kTokenWarps_, int kMTiles_>
struct TileSm80 {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kTokenWarps = kTokenWarps_;
  static constexpr int kWarps = kRowWarps * kTokenWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 8 / kWarps;
  static constexpr int kMTiles = kMTiles_;  // 16-row tiles of a warp
  static constexpr int kRows = 16 * kMTiles * kRowWarps;
  static constexpr int kTokens = 64;  // of a KV tile
  static constexpr int kWarpTokens = kTokens / kTokenWarps;
  static constexpr bool kLarge = kMTiles > 1;
  static constexpr int kVStages = kLarge && kBlocksPerSm > 1 ? 1 : 2;
  static constexpr int kPlaneBytes = kTokens * kHeadDim * sizeof(T);  // K or V of a tile
  static constexpr int kVOffset = 2 * kPlaneBytes;
  static constexpr int kQOffset = kVOffset + kVStages * kPlaneBytes;
  static constexpr int kSmemBytes = kQOffset + (kLarge ? kRows * kHeadDim * int{sizeof(T)} : 0);

  static constexpr float kSlack = 8.f;  // log2 of how far scores may exceed the running maximum

  // The rows [row0, row0 + kRows) of `rows` attend to KV tiles [tile_begin, tile_end).
  __device__ TileSm80(const PagedAttentionParams& p, const SequenceRows& rows, int seq, int row0,
                      int tile_begin, int tile_end, char* smem)
      : p_(p),
        rows_(rows),
        page_row_(p.page_table + int64_t{list_of(p, seq, rows.kv_head)} * p.page_table_stride),
        smem_(ptx::smem_address(smem)),
        row0_(row0 + warp() % kRowWarps * 16 * kMTiles) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max_[m][half] = kNoMax;
        sum_[m][half] = 0.f;
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o_[m][n][i] = 0.f;
      }
    }
    const int last_row = min(row0 + kRows, rows.count()) - 1;
    const int seen = max(0, rows.limit(p, last_row));
    run(tile_begin, min(tile_end, ceil_div(seen, kTokens)));
    finish(smem);
  }

  // index(row) is where a row goes.
  template <typename Index>
  __device__ void write(const RowsOut& out, Index index) const {
    if (warp() >= kRowWarps) return;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0_ + 16 * m + 8 * half + lane() / 4;
        if (row >= rows_.count()) continue;
        const int64_t to = index(row);
        const float sum = sum_[m][half];
        const bool empty = sum == 0.f;  // o may be 0 * NaN
        const float scale = 1.f / sum;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          const float* o = &o_[m][n][2 * half];
          store_pair<T>(out, to * kHeadDim + 8 * n + lane() % 4 * 2, empty ? 0.f : o[0] * scale,
                        empty ? 0.f : o[1] * scale);
        }
        if (lane() % 4 == 0) {
          out.lse[to] = empty ? -INFINITY : max_[m][half] * kLn2 + logf(sum);
        }
      }
    }
  }

 private:
  static __device__ int warp() { return threadIdx.x / 32; }
  static __device__ int lane() { return threadIdx.x % 32; }

  __device__ int page_of(int tile) const { return page_row_[tile * kTokens / p_.tokens_per_block]; }

  // Rows in shared memory are kHeadDim elements; 16-byte chunk c of row r is at chunk c ^ (r % 8).
  static __device__ uint32_t offset_of(int row, int chunk) {
    return row * kHeadDim * sizeof(T) + (chunk ^ (row % 8)) * 16;
  }

  // `kind` is 0 for K, 1 for V.
  __device__ void load(int kind, int tile, int page, uint32_t smem) const {
    constexpr int kChunks = kHeadDim / 8;
    constexpr int kRowsPerPass = kThreads / kChunks;
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const bool other = page < 0;
    const int64_t listed = other ? ~page : page;
    const int64_t plane = p_.by_head ? listed + kind * p_.num_kv_heads
                                     : (listed * 2 + kind) * p_.num_kv_heads + rows_.kv_head;
    const T* global =
        static_cast<const T*>(other ? p_.other_pool : p_.kv_pool) +
        (plane * p_.tokens_per_block + tile * kTokens % p_.tokens_per_block + row) * kHeadDim +
        chunk * 8;
    const int left = rows_.kv_len - tile * kTokens - row;
    smem += offset_of(row, chunk);
#pragma unroll
    for (int i = 0; i < kTokens; i += kRowsPerPass) {
      ptx::cp_async_16(smem + i * kHeadDim * sizeof(T), global + i * kHeadDim, i < left);
    }
  }

  // Each warp loads the rows that it holds, as fragments of the A operand or to shared memory.
  __device__ void load_q() {
    if constexpr (kLarge) {
      constexpr int kChunks = kHeadDim / 8;
#pragma unroll 4
      for (int i = lane(); i < 16 * kMTiles * kChunks; i += 32) {
        const int r = i / kChunks, chunk = i % kChunks;
        const bool valid = row0_ + r < rows_.count();
        const T* q = rows_.q<T>(p_, valid ? row0_ + r : 0) + 8 * chunk;
        ptx::cp_async_16(q_smem() + offset_of(r, chunk), q, valid);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0_ + 8 * half + lane() / 4;
        const bool valid = row < rows_.count();
        const T* q = rows_.q<T>(p_, valid ? row : 0) + lane() % 4 * 2;
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; ++k) {
          q_[k][half] = valid ? *reinterpret_cast<const uint32_t*>(q + 16 * k) : 0;
          q_[k][half + 2] = valid ? *reinterpret_cast<const uint32_t*>(q + 16 * k + 8) : 0;
        }
      }
    }
  }

  __device__ uint32_t q_smem() const {
    return smem_ + kQOffset + warp() * 16 * kMTiles * kHeadDim * sizeof(T);
  }

  __device__ void run(int tile_begin, int tile_end) {
    __syncthreads();  // the stages may still be read for the previous piece
    if (tile_begin >= tile_end) return;
    int page = page_of(tile_begin);
    load(0, tile_begin, page, smem_);
    if constexpr (kVStages > 1) load(1, tile_begin, page, smem_ + kVOffset);
    load_q();
    ptx::cp_async_commit();
    int next_page = page_of(min(tile_begin + 1, tile_end - 1));
    const int limit = rows_.limit(p_, row0_);
    const bool has_rows = kLarge || row0_ < rows_.count();
    const int first = warp() / kRowWarps * kWarpTokens;  // the warp's tokens in a tile

    for (int tile = tile_begin, stage = 0; tile < tile_end; ++tile, stage ^= 1) {
      const uint32_t k = smem_ + stage * kPlaneBytes;
      const uint32_t v = smem_ + kVOffset + (kVStages > 1 ? stage * kPlaneBytes : 0);
      ptx::cp_async_wait<0>();
      __syncthreads();
      if constexpr (kVStages == 1) {
        load(1, tile, page, v);
        ptx::cp_async_commit();
      }
      if (tile + 1 < tile_end) {
        load(0, tile + 1, next_page, smem_ + (stage ^ 1) * kPlaneBytes);
        if constexpr (kVStages > 1) {
          load(1, tile + 1, next_page, smem_ + kVOffset + (stage ^ 1) * kPlaneBytes);
        }
        page = next_page;
        next_page = page_of(min(tile + 2, tile_end - 1));
      }
      ptx::cp_async_commit();

      float s[kMTiles][kWarpTokens / 8][4];
      const int token = tile * kTokens + first;
      if (has_rows) {
        scores(k + first * kHeadDim * sizeof(T), s);
        if (token + kWarpTokens > limit) mask(token, s);
        softmax(s);
      }
      if constexpr (kVStages == 1) {
        ptx::cp_async_wait<1>();
        __syncthreads();
      }
      if (has_rows) accumulate(v + first * kHeadDim * sizeof(T), s);
    }
  }

  __device__ void scores(uint32_t k_smem, float (&s)[kMTiles][kWarpTokens / 8][4]) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kWarpTokens / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0.f;
      }
    }
    const int matrix = lane() / 8, r = lane() % 8;
    const uint32_t b_address = k_smem + offset_of(matrix / 2 * 8 + r, matrix % 2);
    const uint32_t a_address = q_smem() + offset_of(matrix % 2 * 8 + r, matrix / 2);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        if constexpr (kLarge) {
          ptx::ldmatrix_x4(a[m], (a_address + m * 16 * kHeadDim * sizeof(T)) ^ (32 * k));
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = q_[k][i];
        }
      }
#pragma unroll
      for (int n = 0; n < kWarpTokens / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, (b_address + n * 16 * kHeadDim * sizeof(T)) ^ (32 * k));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          ptx::mma_16816<T>(s[m][2 * n], a[m], b[0], b[1]);
          ptx::mma_16816<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  __device__ void mask(int token, float (&s)[kMTiles][kWarpTokens / 8][4]) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0_ + 16 * m + 8 * half + lane() / 4;
        const int limit = rows_.limit(p_, row) - token;
#pragma unroll
        for (int n = 0; n < kWarpTokens / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (8 * n + lane() % 4 * 2 + i >= limit) s[m][n][2 * half + i] = -INFINITY;
          }
        }
      }
    }
  }

  // Scores to probabilities, relative to the running maximum.
  __device__ void softmax(float (&s)[kMTiles][kWarpTokens / 8][4]) {
    update_max(s);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kWarpTokens / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[m][n][i] = ptx::exp2_approx(s[m][n][i] * (p_.scale * kLog2e) - max_[m][i / 2]);
          sum_[m][i / 2] += s[m][n][i];
        }
      }
    }
  }

  __device__ void update_max(const float (&s)[kMTiles][kWarpTokens / 8][4]) {
    float max[kMTiles][2];
    bool moved = false;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = s[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kWarpTokens / 8; ++n) {
          x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        max[m][half] = x * (p_.scale * kLog2e);
        moved |= max[m][half] > max_[m][half] + kSlack;
      }
    }
    if (!__any_sync(~0u, moved)) return;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) rescale(m, half, max[m][half]);
    }
  }

  __device__ void rescale(int m, int half, float max) {
    max = fmaxf(max, max_[m][half]);
    const float scale = ptx::exp2_approx(max_[m][half] - max);
    max_[m][half] = max;
    sum_[m][half] *= scale;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      o_[m][n][2 * half] *= scale;
      o_[m][n][2 * half + 1] *= scale;
    }
  }

  __device__ void accumulate(uint32_t v_smem, const float (&s)[kMTiles][kWarpTokens / 8][4]) {
    const int matrix = lane() / 8, r = lane() % 8;
    const uint32_t b_address = v_smem + offset_of(matrix % 2 * 8 + r, matrix / 2);
#pragma unroll
    for (int k = 0; k < kWarpTokens / 16; ++k) {
      uint32_t a[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &s[m][2 * k + i / 2][i % 2 * 2];
          a[m][i] = pack2<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, (b_address + k * 16 * kHeadDim * sizeof(T)) ^ (32 * n));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          ptx::mma_16816<T>(o_[m][2 * n], a[m], b[0], b[1]);
          ptx::mma_16816<T>(o_[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Completes the row sums, then adds the warps that split the tokens into warp 0.
  __device__ void finish(char* smem) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum_[m][half] += __shfl_xor_sync(~0u, sum_[m][half], 1);
        sum_[m][half] += __shfl_xor_sync(~0u, sum_[m][half], 2);
      }
    }
    if constexpr (kTokenWarps > 1) {
      static_assert(kMTiles == 1 && kRowWarps == 1);
      constexpr int kValues = kHeadDim / 2;  // of o_ in a thread
      float (*o)[kValues][32] = reinterpret_cast<float (*)[kValues][32]>(smem);
      float (*stats)[4][32] = reinterpret_cast<float (*)[4][32]>(o + kWarps - 1);
      __syncthreads();
      if (warp() > 0) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) o[warp() - 1][i][lane()] = o_[0][i / 4][i % 4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          stats[warp() - 1][half][lane()] = max_[0][half];
          stats[warp() - 1][2 + half][lane()] = sum_[0][half];
        }
      }
      __syncthreads();
      if (warp() > 0) return;
      for (int w = 0; w < kWarps - 1; ++w) {
        float scale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float max = stats[w][half][lane()];
          rescale(0, half, max);
          scale[half] = ptx::exp2_approx(max - max_[0][half]);
          sum_[0][half] += scale[half] * stats[w][2 + half][lane()];
        }
#pragma unroll
        for (int i = 0; i < kValues; ++i) o_[0][i / 4][i % 4] += scale[i % 4 / 2] * o[w][i][lane()];
      }
    }
  }

  const PagedAttentionParams& p_;
  const SequenceRows& rows_;
  const int32_t* page_row_;
  const uint32_t smem_;
  const int row0_;  // of the warp

  uint32_t q_[kHeadDim / 16][4];  // unless kLarge
  float o_[kMTiles][kHeadDim / 8][4];
  float max_[kMTiles][2];  // running maximum of the scores, times scale * log2(e)
  float sum_[kMTiles][2];
};

}  // namespace star_attention
