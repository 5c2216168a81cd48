// Context attention for sm_90a: a persistent grid over the main loop of mainloop_sm90.cuh.
//
// A work tile is 128 query rows of one head, from the rows' diagonal to the first KV tile that one
// of them sees, so that tiles masked by it come first. Two blocks form a cluster and take two heads
// of a KV group at a time (if the group is odd, a block works alone). Work tiles come from a
// counter, heaviest first and one KV head after the other, so that the blocks in flight share K and
// V in L2. The producer takes the next one, and loads its Q, while the consumers finish theirs.

#include <algorithm>

#include "attention/kernels.h"
#include "attention/mainloop_sm90.cuh"
#include "attention/steps.h"
#include "common/check.h"
#include "common/device.h"
#include "common/numeric.cuh"

namespace star_attention {
namespace {

using namespace sm90;

struct Arguments {
  CUtensorMap q;  // [num_tokens][num_q_heads][head_dim]
  KvPool kv;
  RowsOut out;
  const int32_t* cu_seqlens_q;
  const int32_t* kv_lens;
  const int32_t* starts;
  int* counter;
  int num_seqs;
  int max_kv_len;
  int num_q_heads;
  bool causal;
  float scale;
};

// What the consumers need to know of a work tile. Row r sees the tokens before
// min(kv_len, limit + r * causal), and none before starts[token + r].
struct WorkTile {
  int seq;
  int head;
  int token;  // row of q, o and lse that the tile's first row is
  int rows;   // that exist
  int kv_len;
  int limit;
  int last_start;  // of its rows
  int kv_begin;    // the first KV tile
  int kv_tiles;    // behind the last; kv_begin: there are none; -1: no more work
};

template <int kHeadDim, int kCluster>
struct Shared : Stages<kHeadDim, kCluster> {
  uint64_t q_full[kConsumers], q_empty[kConsumers];
  uint64_t work_full[2], work_empty[2];
  WorkTile work[2];
  uint64_t index_full[2], index_empty[2];
  int index[2];

  __device__ void init_barriers() {
    Stages<kHeadDim, kCluster>::init_barriers();
    for (int c = 0; c < kConsumers; ++c) {
      barrier_init(&q_full[c], 1);
      barrier_init(&q_empty[c], 4);
    }
    for (int s = 0; s < 2; ++s) {
      barrier_init(&work_full[s], 1);
      barrier_init(&work_empty[s], kConsumerWarps);
      barrier_init(&index_full[s], 1);
      barrier_init(&index_empty[s], kCluster);
    }
  }
};

// Maps the ever growing work index of a cluster to work tiles, sequence after sequence.
template <int kCluster>
struct Scheduler {
  const Arguments& args;
  int seq = 0;
  int first_index = 0;  // of the sequence

  __device__ WorkTile find(int index) {
    for (; seq < args.num_seqs; ++seq) {
      const int token = args.cu_seqlens_q[seq];
      const int q_len = args.cu_seqlens_q[seq + 1] - token;
      const int row_tiles = ceil_div(q_len, kRows);
      const int count = row_tiles * args.num_q_heads / kCluster;
      if (index - first_index < count) {
        return locate(index - first_index, token, q_len, row_tiles);
      }
      first_index += count;
    }
    WorkTile none{};
    none.kv_tiles = -1;
    return none;
  }

  __device__ WorkTile locate(int index, int token, int q_len, int row_tiles) const {
    const int shares = args.num_q_heads / args.kv.num_kv_heads / kCluster;
    const int kv_head = index / (row_tiles * shares);
    index -= kv_head * row_tiles * shares;
    const int first_row = (row_tiles - 1 - index / shares) * kRows;

    WorkTile work;
    work.seq = seq;
    work.head = (kv_head * shares + index % shares) * kCluster + cluster_rank();
    work.token = token + first_row;
    work.rows = min(kRows, q_len - first_row);
    work.kv_len = min(args.kv_lens[args.kv.list_of(seq, kv_head)], args.max_kv_len);
    work.limit = args.causal ? work.kv_len - q_len + first_row + 1 : work.kv_len;
    const int end = args.causal ? max(0, work.limit + work.rows - 1) : work.kv_len;
    work.kv_tiles = ceil_div(end, kTokens);
    work.last_start = work.kv_begin = 0;
    if (args.starts != nullptr) {
      work.last_start = args.starts[work.token + work.rows - 1];
      work.kv_begin = min(args.starts[work.token] / kTokens, work.kv_tiles);
    }
    return work;
  }
};

template <int kHeadDim, int kCluster>
struct WorkProducer {
  const Arguments& args;
  Shared<kHeadDim, kCluster>& shared;
  Producer<kHeadDim, kCluster> producer{args.kv, shared};
  const int lane = threadIdx.x % 32;
  const int rank = cluster_rank();
  Cursor<1> q;

  __device__ void load_q(const WorkTile& work) {
    constexpr int kBytes = Stages<kHeadDim, kCluster>::kQueryBytes;
    for (int c = 0; c < kConsumers; ++c) {
      barrier_wait(&shared.q_empty[c], q.phase ^ 1);
      if (lane == 0) {
        barrier_arrive_expect(&shared.q_full[c], kBytes);
        for (int d = 0; d < kHeadDim; d += kPanel) {
          tma_load(shared.q[c] + d * kRowsPerConsumer * 2, &args.q, &shared.q_full[c], d, work.head,
                   work.token + c * kRowsPerConsumer);
        }
      }
    }
    q.advance();
  }

  // Gives the first block's index to the whole cluster.
  __device__ int share_index(int index, const Cursor<2>& slot) const {
    if constexpr (kCluster == 1) return __shfl_sync(~0u, index, 0);
    if (lane == 0) {
      barrier_arrive_expect(&shared.index_full[slot.stage], sizeof(int));
      if (rank == 0) {
        barrier_wait(&shared.index_empty[slot.stage], slot.phase ^ 1);
        for (int r = 0; r < kCluster; ++r) {
          store_async(&shared.index[slot.stage], &shared.index_full[slot.stage], r, index);
        }
      }
    }
    __syncwarp();
    barrier_wait(&shared.index_full[slot.stage], slot.phase);
    index = __shfl_sync(~0u, shared.index[slot.stage], 0);
    if (lane == 0) barrier_arrive(&shared.index_empty[slot.stage], 0);
    return index;
  }

  __device__ void run() {
    Scheduler<kCluster> scheduler{args};
    Cursor<2> slot;
    int index = blockIdx.x / kCluster;
    while (true) {
      const WorkTile work = scheduler.find(index);
      barrier_wait(&shared.work_empty[slot.stage], slot.phase ^ 1);
      if (lane == 0) {
        shared.work[slot.stage] = work;
        barrier_arrive(&shared.work_full[slot.stage]);
      }
      if (work.kv_tiles < 0) return;

      int next = 0;
      if (rank == 0 && lane == 0) next = gridDim.x / kCluster + atomicAdd(args.counter, 1);
      if (work.kv_tiles > work.kv_begin) {
        const int kv_head = work.head / (args.num_q_heads / args.kv.num_kv_heads);
        producer.load(work.seq, kv_head, work.kv_len, work.kv_begin, work.kv_tiles,
                      [&] { load_q(work); });
      }
      index = share_index(next, slot);
      slot.advance();
    }
  }
};

template <class Element, int kHeadDim, int kCluster>
struct WorkConsumer {
  const Arguments& args;
  Shared<kHeadDim, kCluster>& shared;
  const int id;
  Consumer<Element, kHeadDim, kCluster> consumer{shared, id};
  Cursor<1> q;

  struct Rows {
    const WorkConsumer& self;
    const WorkTile& work;

    __device__ void await_q() const { barrier_wait(&self.shared.q_full[self.id], self.q.phase); }
    __device__ void release_q() const { warp_arrive(&self.shared.q_empty[self.id]); }
    __device__ int limit(int row) const {
      return min(work.kv_len, work.limit + (self.args.causal ? row : 0));
    }
    __device__ int warp_limit() const { return limit(self.consumer.warp_row); }
    __device__ int start(int row) const {
      return self.args.starts[work.token + min(row, work.rows - 1)];
    }
    __device__ int last_start() const { return work.last_start; }
  };

  __device__ void run() {
    Cursor<2> slot;
    consumer.open_turns();
    while (true) {
      barrier_wait(&shared.work_full[slot.stage], slot.phase);
      WorkTile work = shared.work[slot.stage];
      // Lets the compiler keep stages and descriptors in uniform registers.
      work.kv_begin = __shfl_sync(~0u, work.kv_begin, 0);
      work.kv_tiles = __shfl_sync(~0u, work.kv_tiles, 0);
      warp_arrive(&shared.work_empty[slot.stage]);
      slot.advance();
      if (work.kv_tiles < 0) return;

      Softmax softmax{args.scale};
      float o[kHeadDim / 2];
#pragma unroll
      for (float& x : o) x = 0.f;
      if (work.kv_tiles > work.kv_begin) {
        consumer.attend(Rows{*this, work}, work.kv_begin, work.kv_tiles, softmax, o);
        q.advance();
      }
      consumer.store(softmax, o, args.out, work.rows, [&](int row) {
        return int64_t{work.token + row} * args.num_q_heads + work.head;
      });
    }
  }
};

template <class Element, int kHeadDim, int kCluster>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    context_attention_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim, kCluster>*>(raw_shared);

  if (threadIdx.x == 0) {
    tma_prefetch(&args.q);
    tma_prefetch(&args.kv.map);
    shared.init_barriers();
    barrier_init_fence();
  }
  cluster_sync();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int warpgroup = warp / 4;
  if (warpgroup == 0) {
    registers_decrease<40>();
    if (warp == 0) WorkProducer<kHeadDim, kCluster>{args, shared}.run();
  } else {
    registers_increase<232>();
    WorkConsumer<Element, kHeadDim, kCluster>{args, shared, warpgroup - 1}.run();
  }
  cluster_sync();  // the other block may still signal barriers of this one
}

// Host

template <class Element, int kHeadDim, int kCluster>
void launch(const Arguments& args, int64_t work_tiles, cudaStream_t stream) {
  const auto kernel = context_attention_kernel<Element, kHeadDim, kCluster>;
  const int64_t most_blocks = current_device().num_sms / kCluster * kCluster;
  const int blocks = static_cast<int>(std::min(most_blocks, work_tiles));
  constexpr int kSharedBytes = sizeof(Shared<kHeadDim, kCluster>);
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
      "context_attention_sm90 shared memory");
  kernel<<<blocks, kThreads, kSharedBytes, stream>>>(args);
  check_launch("context_attention_sm90");
}

}  // namespace

size_t context_attention_sm90_workspace() { return sizeof(int); }

double context_attention_sm90_steps(const PagedAttentionParams& p) {
  return context_steps(p, kRows, 1, p.num_q_heads, 1);
}

void context_attention_sm90(const PagedAttentionParams& params, void* workspace,
                            cudaStream_t stream) {
  const cuuint64_t head_dim = params.head_dim;
  Arguments args;
  args.q = make_tensor_map(
      params.dtype, params.q,
      {head_dim, cuuint64_t(params.num_q_heads), cuuint64_t(params.num_tokens)},
      {head_dim * 2, cuuint64_t(params.q_stride) * 2}, {kPanel, 1, kRowsPerConsumer}, "q");
  args.kv = make_kv_pool(params);
  args.out = output_of(params);
  args.cu_seqlens_q = params.cu_seqlens_q;
  args.kv_lens = params.kv_lens;
  args.starts = params.starts;
  args.counter = static_cast<int*>(workspace);
  args.num_seqs = params.num_seqs;
  args.max_kv_len = params.max_kv_len;
  args.num_q_heads = params.num_q_heads;
  args.causal = params.causal;
  args.scale = params.scale;

  check_cuda(cudaMemsetAsync(workspace, 0, sizeof(int), stream), "context_attention_sm90 counter");
  const int64_t most_work_tiles =
      (params.num_tokens / kRows + int64_t{params.num_seqs}) * params.num_q_heads;
  const bool pairs = params.num_q_heads / params.num_kv_heads % 2 == 0;
  dispatch_16bit(params.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto run = params.head_dim == 64
                         ? (pairs ? launch<Element, 64, 2> : launch<Element, 64, 1>)
                         : (pairs ? launch<Element, 128, 2> : launch<Element, 128, 1>);
    run(args, most_work_tiles, stream);
  });
}

}  // namespace star_attention
