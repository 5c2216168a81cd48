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
// Of 8-bit pages, tiles are in shared memory as they are in the page, in twice as many stages; a
// warp widens codes to float16 when it takes them as operands. What ldmatrix gives a thread of them
// are neighbours: four dimensions of a key, two of two tokens' values. So dimensions of Q, and of
// O's accumulators, are in another order. A tile lies in one page: its scale of K is a factor of
// the softmax scale, and its sum over V, which begins at 0, is added to O times its scale of V. All
// products fit: probabilities are below 2^15.
//
// The running maximum moves, and O is rescaled, only when a score exceeds it by 2^8; the final
// division makes up for it.
#pragma once

#include <type_traits>

#include "attention/rows.cuh"
#include "common/eight_bits.cuh"
#include "common/sm80_ptx.cuh"

namespace star_attention {

// `Kv` is what pages hold: T, Float8 or Int8.
template <typename T_, int kHeadDim_, int kRowWarps_, int kTokenWarps_, int kMTiles_,
          typename Kv = T_>
struct TileSm80 {
  using T = T_;
  static constexpr bool k8Bit = !std::is_same_v<Kv, T>;
  using Operand = std::conditional_t<k8Bit, half_t, T>;
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
  static constexpr int kStages = k8Bit && !kLarge ? 4 : 2;
  static constexpr int kVStages = !k8Bit && kLarge && kBlocksPerSm > 1 ? 1 : kStages;
  static constexpr int kQRowBytes = kHeadDim * sizeof(T);
  static constexpr int kRowBytes = kHeadDim * (k8Bit ? 1 : sizeof(T));
  static constexpr int kPlaneBytes = kTokens * kRowBytes;  // K or V of a tile
  static constexpr int kVOffset = kStages * kPlaneBytes;
  static constexpr int kQOffset = kVOffset + kVStages * kPlaneBytes;
  static constexpr int kScaleOffset = kQOffset + (kLarge ? kRows * kQRowBytes : 0);
  static constexpr int kSmemBytes = kScaleOffset + (k8Bit ? kStages * 2 * int{sizeof(float)} : 0);

  static constexpr float kSlack = 8.f;  // log2 of how far scores may exceed the running maximum
  // log2 of the probability of the running maximum: float16 has less room below 1 than above.
  static constexpr float kTopLog2 = k8Bit ? 7.f : 0.f;

  // The rows [row0, row0 + kRows) of `rows` attend to KV tiles [tile_begin, tile_end).
  __device__ TileSm80(const PagedAttentionParams& p, const SequenceRows& rows, int seq, int row0,
                      int tile_begin, int tile_end, char* smem)
      : p_(p),
        rows_(rows),
        page_row_(p.page_table + int64_t{list_of(p, seq, rows.kv_head)} * p.page_table_stride),
        shared_(smem),
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
    const int first = k8Bit ? 0 : max(0, rows.start(p, row0)) / kTokens;
    run(max(tile_begin, first), min(tile_end, ceil_div(seen, kTokens)));
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
        const auto store = [&](int dim, float x, float y) {
          store_pair<T>(out, to * kHeadDim + dim, empty ? 0.f : x * scale, empty ? 0.f : y * scale);
        };
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; n += 2) {
          const float *first = &o_[m][n][2 * half], *second = &o_[m][n + 1][2 * half];
          if constexpr (k8Bit) {
            store(8 * n + lane() % 4 * 4, first[0], second[0]);
            store(8 * n + lane() % 4 * 4 + 2, first[1], second[1]);
          } else {
            store(8 * n + lane() % 4 * 2, first[0], first[1]);
            store(8 * n + 8 + lane() % 4 * 2, second[0], second[1]);
          }
        }
        if (lane() % 4 == 0) {
          out.lse[to] = empty ? -INFINITY : max_[m][half] * kLn2 + logf(sum);
        }
      }
    }
  }

 private:
  static constexpr int kOperandBytes = 16 * kRowBytes / kHeadDim;  // of 16 dimensions of a row

  static __device__ int warp() { return threadIdx.x / 32; }
  static __device__ int lane() { return threadIdx.x % 32; }

  __device__ int page_of(int tile) const { return page_row_[tile * kTokens / p_.tokens_per_block]; }

  // 16-byte chunk c of row r is at chunk c ^ (r % 8), or of rows of 64 bytes at c ^ (r / 2 % 4).
  template <int kBytes>
  static __device__ uint32_t offset_of(int row, int chunk) {
    return row * kBytes + (chunk ^ (kBytes < 128 ? row / 2 % 4 : row % 8)) * 16;
  }

  // `kind` is 0 for K, 1 for V.
  __device__ void load(int kind, int tile, int page, int stage) const {
    constexpr int kChunks = kRowBytes / 16;
    constexpr int kRowsPerPass = kThreads / kChunks;
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const bool other = page < 0;
    const int64_t listed = other ? ~page : page;
    const int64_t plane = p_.by_head ? listed + kind * p_.num_kv_heads
                                     : (listed * 2 + kind) * p_.num_kv_heads + rows_.kv_head;
    const char* global =
        static_cast<const char*>(other ? p_.other_pool : p_.kv_pool) +
        (plane * p_.tokens_per_block + tile * kTokens % p_.tokens_per_block + row) * kRowBytes +
        chunk * 16;
    const int left = rows_.kv_len - tile * kTokens - row;
    const uint32_t smem = plane_of(kind, stage) + offset_of<kRowBytes>(row, chunk);
#pragma unroll
    for (int i = 0; i < kTokens; i += kRowsPerPass) {
      ptx::cp_async_16(smem + i * kRowBytes, global + i * kRowBytes, i < left);
    }
    if constexpr (k8Bit) {
      if (threadIdx.x == 0) {
        ptx::cp_async_4(smem_ + kScaleOffset + (2 * stage + kind) * sizeof(float),
                        p_.kv_scales + plane);
      }
    }
  }

  __device__ uint32_t plane_of(int kind, int stage) const {
    return smem_ + (kind == 0 ? 0 : kVOffset) +
           (kind == 0 || kVStages > 1 ? stage : 0) * kPlaneBytes;
  }

  __device__ float scale_of(int kind, int stage) const {
    return reinterpret_cast<const float*>(shared_ + kScaleOffset)[2 * stage + kind];
  }

  // Each warp loads the rows that it holds, as fragments of the A operand or to shared memory.
  __device__ void load_q() {
    if constexpr (k8Bit) {
      load_q_widened();
    } else if constexpr (kLarge) {
      constexpr int kChunks = kHeadDim / 8;
#pragma unroll 4
      for (int i = lane(); i < 16 * kMTiles * kChunks; i += 32) {
        const int r = i / kChunks, chunk = i % kChunks;
        const bool valid = row0_ + r < rows_.count();
        const T* q = rows_.q<T>(p_, valid ? row0_ + r : 0) + 8 * chunk;
        ptx::cp_async_16(q_smem() + offset_of<kQRowBytes>(r, chunk), q, valid);
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

  // As float16, in the order of 8-bit keys: where a fragment has dimensions 2c, 2c + 1, 2c + 8 and
  // 2c + 9 of 16, they are 4c to 4c + 3.
  __device__ void load_q_widened() {
    if constexpr (kLarge) {
      constexpr int kGroups = kHeadDim / 16;
#pragma unroll 2
      for (int i = lane(); i < 16 * kMTiles * kGroups; i += 32) {
        const int r = i / kGroups, group = i % kGroups;
        const bool valid = row0_ + r < rows_.count();
        uint32_t pairs[8] = {};
        if (valid) {
          const T* q = rows_.q<T>(p_, row0_ + r) + 16 * group;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Pack<T, 8> x = load_pack<T, 8>(q + 8 * half);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              pairs[4 * half + j] = pack2<half_t>(to_float(x.v[2 * j]), to_float(x.v[2 * j + 1]));
            }
          }
        }
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          char* to = shared_ + (q_smem() - smem_) + offset_of<kQRowBytes>(r, 2 * group + chunk);
          *reinterpret_cast<uint4*>(to) =
              make_uint4(pairs[chunk], pairs[2 + chunk], pairs[4 + chunk], pairs[6 + chunk]);
        }
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0_ + 8 * half + lane() / 4;
        const bool valid = row < rows_.count();
        const T* q = rows_.q<T>(p_, valid ? row : 0) + lane() % 4 * 4;
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; ++k) {
          const Pack<T, 4> x = load_pack<T, 4>(q + 16 * k);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint32_t pair = pack2<half_t>(to_float(x.v[2 * j]), to_float(x.v[2 * j + 1]));
            q_[k][half + 2 * j] = valid ? pair : 0;
          }
        }
      }
    }
  }

  __device__ uint32_t q_smem() const {
    return smem_ + kQOffset + warp() * 16 * kMTiles * kQRowBytes;
  }

  __device__ void run(int tile_begin, int tile_end) {
    constexpr int kAhead = kStages - 1;  // tiles that load while one is multiplied
    __syncthreads();                     // the stages may still be read for the previous piece
    if (tile_begin >= tile_end) return;
    int page = page_of(tile_begin);
    load(0, tile_begin, page, 0);
    if constexpr (kVStages > 1) load(1, tile_begin, page, 0);
    load_q();
    ptx::cp_async_commit();
#pragma unroll
    for (int i = 1; i < kAhead; ++i) {
      if (tile_begin + i < tile_end) {
        page = page_of(tile_begin + i);
        load(0, tile_begin + i, page, i);
        load(1, tile_begin + i, page, i);
      }
      ptx::cp_async_commit();
    }
    int next_page = page_of(min(tile_begin + kAhead, tile_end - 1));
    const int limit = rows_.limit(p_, row0_);
    const bool has_rows = kLarge || row0_ < rows_.count();
    const int first = warp() / kRowWarps * kWarpTokens;  // the warp's tokens in a tile
    const int last_start = k8Bit ? 0 : rows_.start(p_, last_row());

    for (int tile = tile_begin, stage = 0; tile < tile_end; ++tile, stage = (stage + 1) % kStages) {
      ptx::cp_async_wait<kAhead - 1>();
      __syncthreads();
      if constexpr (kVStages == 1) {
        load(1, tile, page, stage);
        ptx::cp_async_commit();
      }
      if (tile + kAhead < tile_end) {
        const int next_stage = (stage + kAhead) % kStages;
        load(0, tile + kAhead, next_page, next_stage);
        if constexpr (kVStages > 1) load(1, tile + kAhead, next_page, next_stage);
        page = next_page;
        next_page = page_of(min(tile + kAhead + 1, tile_end - 1));
      }
      ptx::cp_async_commit();

      float s[kMTiles][kWarpTokens / 8][4];
      const int token = tile * kTokens + first;
      if (has_rows) {
        scores(plane_of(0, stage) + first * kRowBytes, s);
        if (token + kWarpTokens > limit) mask(token, s);
        if (!k8Bit && token < last_start) mask_before(token, s);
        const float scale = p_.scale * kLog2e;
        if constexpr (k8Bit) {
          softmax(s, scale * scale_of(0, stage));
        } else {
          softmax(s, scale);
        }
      }
      if constexpr (kVStages == 1) {
        ptx::cp_async_wait<1>();
        __syncthreads();
      }
      if (!has_rows) continue;
      const uint32_t v = plane_of(1, stage) + first * kRowBytes;
      if constexpr (k8Bit) {
        accumulate_scaled(v, scale_of(1, stage), s);
      } else {
        accumulate(v, s);
      }
    }
  }

  // The K operands of 16 tokens and 16 dimensions, for two products; of the V operands likewise.
  static __device__ void load_operands(uint32_t (&b)[4], uint32_t address, bool is_v) {
    if constexpr (k8Bit) {
      uint32_t codes[2];
      if (is_v) {
        ptx::ldmatrix_x2_trans(codes, address);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // Two dimensions of a token, then of the next, become two tokens of each dimension.
          Kv::to_half(__byte_perm(codes[i], 0, 0x3120), b[i], b[2 + i]);
        }
      } else {
        ptx::ldmatrix_x2(codes, address);
        Kv::to_half(codes[0], b[0], b[1]);
        Kv::to_half(codes[1], b[2], b[3]);
      }
    } else {
      is_v ? ptx::ldmatrix_x4_trans(b, address) : ptx::ldmatrix_x4(b, address);
    }
  }

  // Where in a run of rows the lane's row of `load_operands` is.
  static __device__ uint32_t operand_offset(bool is_v) {
    const int matrix = lane() / 8, r = lane() % 8;
    if constexpr (k8Bit) return offset_of<kRowBytes>(matrix % 2 * 8 + r, 0);
    return is_v ? offset_of<kRowBytes>(matrix % 2 * 8 + r, matrix / 2)
                : offset_of<kRowBytes>(matrix / 2 * 8 + r, matrix % 2);
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
    const uint32_t b_address = k_smem + operand_offset(false);
    const uint32_t a_address = q_smem() + offset_of<kQRowBytes>(matrix % 2 * 8 + r, matrix / 2);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        if constexpr (kLarge) {
          ptx::ldmatrix_x4(a[m], (a_address + m * 16 * kQRowBytes) ^ (32 * k));
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = q_[k][i];
        }
      }
#pragma unroll
      for (int n = 0; n < kWarpTokens / 16; ++n) {
        uint32_t b[4];
        load_operands(b, (b_address + n * 16 * kRowBytes) ^ (kOperandBytes * k), false);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          ptx::mma_16816<Operand>(s[m][2 * n], a[m], b[0], b[1]);
          ptx::mma_16816<Operand>(s[m][2 * n + 1], a[m], b[2], b[3]);
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

  __device__ void mask_before(int token, float (&s)[kMTiles][kWarpTokens / 8][4]) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(row0_ + 16 * m + 8 * half + lane() / 4, last_row());
        const int start = rows_.start(p_, row) - token;
#pragma unroll
        for (int n = 0; n < kWarpTokens / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (8 * n + lane() % 4 * 2 + i < start) s[m][n][2 * half + i] = -INFINITY;
          }
        }
      }
    }
  }

  // Of the warp's rows, or of the sequence's if it has none.
  __device__ int last_row() const { return min(row0_ + 16 * kMTiles, rows_.count()) - 1; }

  // Scores to probabilities, relative to the running maximum. `scale` has a factor log2(e).
  __device__ void softmax(float (&s)[kMTiles][kWarpTokens / 8][4], float scale) {
    update_max(s, scale);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kWarpTokens / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[m][n][i] = ptx::exp2_approx(s[m][n][i] * scale - max_[m][i / 2]);
          sum_[m][i / 2] += s[m][n][i];
        }
      }
    }
  }

  __device__ void update_max(const float (&s)[kMTiles][kWarpTokens / 8][4], float scale) {
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
        max[m][half] = x * scale - kTopLog2;
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

  // The probabilities of 16 tokens as an operand.
  static __device__ void pack_probabilities(uint32_t (&a)[4], const float (&s)[kWarpTokens / 8][4],
                                            int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &s[2 * k + i / 2][i % 2 * 2];
      a[i] = pack2<Operand>(pair[0], pair[1]);
    }
  }

  __device__ void accumulate(uint32_t v_smem, const float (&s)[kMTiles][kWarpTokens / 8][4]) {
    const uint32_t b_address = v_smem + operand_offset(true);
#pragma unroll
    for (int k = 0; k < kWarpTokens / 16; ++k) {
      uint32_t a[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) pack_probabilities(a[m], s[m], k);
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t b[4];
        load_operands(b, (b_address + k * 16 * kRowBytes) ^ (kOperandBytes * n), true);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          ptx::mma_16816<T>(o_[m][2 * n], a[m], b[0], b[1]);
          ptx::mma_16816<T>(o_[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // `accumulate` of codes, whose scale is `scale`.
  __device__ void accumulate_scaled(uint32_t v_smem, float scale,
                                    const float (&s)[kMTiles][kWarpTokens / 8][4]) {
    const uint32_t b_address = v_smem + operand_offset(true);
    uint32_t a[kWarpTokens / 16][kMTiles][4];
#pragma unroll
    for (int k = 0; k < kWarpTokens / 16; ++k) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) pack_probabilities(a[k][m], s[m], k);
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      float sum[kMTiles][2][4] = {};
#pragma unroll
      for (int k = 0; k < kWarpTokens / 16; ++k) {
        uint32_t b[4];
        load_operands(b, (b_address + k * 16 * kRowBytes) ^ (kOperandBytes * n), true);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          ptx::mma_16816<Operand>(sum[m][0], a[k][m], b[0], b[1]);
          ptx::mma_16816<Operand>(sum[m][1], a[k][m], b[2], b[3]);
        }
      }
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& o = o_[m][2 * n + i / 4][i % 4];
          o = fmaf(sum[m][i / 4][i % 4], scale, o);
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
  char* const shared_;
  const uint32_t smem_;  // its address there
  const int row0_;       // of the warp

  uint32_t q_[kHeadDim / 16][4];  // unless kLarge
  float o_[kMTiles][kHeadDim / 8][4];
  float max_[kMTiles][2];  // running maximum of the scores, times scale * log2(e), - kTopLog2
  float sum_[kMTiles][2];
};

}  // namespace star_attention
