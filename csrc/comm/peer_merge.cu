// The protocol is explained in peer_merge.h. A thread takes one packet of a row: it stores it into
// every peer's memory, polls the slots of all peers at once, and merges what arrived.
#include <algorithm>

#include "common/dependent_launch.cuh"
#include "common/device.h"
#include "common/device_guard.h"
#include "common/numeric.cuh"
#include "star_attention/peer_merge.h"

namespace star_attention {
namespace {

constexpr int kMaxRanks = PeerMerge::kMaxRanks;
constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 4;
constexpr int kPacketBytes = 8;
constexpr int kMaxRows = 32;  // rows of a chunk: head_dim 16 in 16 bits
constexpr int kFreeSpins = 100;
constexpr unsigned kSleepNs = 250;

// What one rank sends to one peer of one chunk.
struct Slot {
  ulonglong2 packets[kThreads];
  uint64_t lse[kMaxRows];
};

struct Arguments {
  const void* o;
  const float* lse;
  void* out;
  int num_rows;
  int head_dim;
  int num_chunks;  // of this call

  int rank, size;
  int capacity;             // chunks
  Slot* slots[kMaxRanks];   // [2 parities, size - 1 sources, capacity] on each rank
  uint32_t* epochs;         // [capacity]
  int* lost_rank;           // -1: none
  volatile int* host_lost;  // the same for the host
  uint64_t timeout_ns;

  __device__ Slot& slot(int dest, int source, uint32_t epoch, int chunk) const {
    const int64_t index = (epoch & 1) * (size - 1) + source - (source > dest);
    return slots[dest][index * capacity + chunk];
  }
};

__device__ inline uint64_t make_word(uint32_t payload, uint32_t epoch) {
  return uint64_t{epoch} << 32 | payload;
}
__device__ inline uint32_t payload_of(uint64_t word) { return static_cast<uint32_t>(word); }
__device__ inline uint32_t epoch_of(uint64_t word) { return word >> 32; }

// The PTX memory model treats a vector access as accesses of its elements: each word is atomic.
__device__ inline void store_words(ulonglong2* p, ulonglong2 words) {
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(p), "l"(words.x), "l"(words.y));
}
__device__ inline void store_word(uint64_t* p, uint64_t word) {
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(p), "l"(word));
}
__device__ inline ulonglong2 load_words(const ulonglong2* p) {
  ulonglong2 words;
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(words.x), "=l"(words.y)
               : "l"(p));
  return words;
}
__device__ inline uint64_t load_word(const uint64_t* p) {
  uint64_t word;
  asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(word) : "l"(p));
  return word;
}
// What earlier kernels wrote. Relaxed, because ordinary loads would be moved behind the wait for
// another one, on which a branch depends.
__device__ inline uint32_t load_early(const void* p) {
  uint32_t value;
  asm volatile("ld.relaxed.cta.global.b32 %0, [%1];" : "=r"(value) : "l"(p));
  return value;
}
__device__ inline uint2 load_early_packet(const void* p) {
  uint2 packet;
  asm volatile("ld.relaxed.cta.global.v2.b32 {%0, %1}, [%2];"
               : "=r"(packet.x), "=r"(packet.y)
               : "l"(p));
  return packet;
}
__device__ inline int load_lost_rank(const int* p) {
  int rank;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(rank) : "l"(p));
  return rank;
}

__device__ inline uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

struct Arrival {
  ulonglong2 packet;
  uint64_t lse;

  __device__ bool complete(uint32_t epoch) const {
    return ((epoch_of(packet.x) ^ epoch) | (epoch_of(packet.y) ^ epoch) |
            (epoch_of(lse) ^ epoch)) == 0;
  }
};

// Waits for the peers' packets of one thread. False: a rank is lost.
template <int kRanks>
__device__ inline bool receive(const Arguments& a, uint32_t epoch, int chunk, int packet, int row,
                               Arrival (&arrivals)[kRanks]) {
  uint32_t missing = ((1u << a.size) - 1) & ~(1u << a.rank);  // a bit each rank
  uint64_t began = 0;
  for (int spins = 0;; ++spins) {
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      if ((missing >> r & 1) == 0) continue;
      const Slot& slot = a.slot(a.rank, r, epoch, chunk);
      arrivals[r] = {load_words(&slot.packets[packet]), load_word(&slot.lse[row])};
    }
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      if (arrivals[r].complete(epoch)) missing &= ~(1u << r);
    }
    if (missing == 0) return true;
    if (spins < kFreeSpins) continue;
    if (load_lost_rank(a.lost_rank) >= 0) return false;
    const uint64_t now = nanoseconds();
    if (began == 0) began = now;
    if (now - began > a.timeout_ns) {
      const int lost = __ffs(missing) - 1;
      if (atomicCAS(a.lost_rank, -1, lost) == -1) *a.host_lost = lost;
      return false;
    }
    __nanosleep(kSleepNs);
  }
}

// blockDim: packets of a row, rows of a chunk. For up to kRanks ranks.
template <typename In, typename Out, int kRanks>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    peer_merge_kernel(const __grid_constant__ Arguments a) {
  allow_next_kernel();
  wait_for_previous_kernel();
  constexpr int kElements = kPacketBytes / sizeof(In);
  using Packet = Pack<In, kElements>;
  const int row_of_chunk = threadIdx.y;
  const int packet = threadIdx.y * blockDim.x + threadIdx.x;
  const auto row_of = [&](int chunk) { return chunk * blockDim.y + row_of_chunk; };
  const auto offset_of = [&](int row) {
    return int64_t{row} * a.head_dim + threadIdx.x * kElements;
  };
  const auto load_own = [&](int row) {
    return load_early_packet(static_cast<const In*>(a.o) + offset_of(row));
  };

  for (int chunk = blockIdx.x; chunk < a.num_chunks; chunk += gridDim.x) {
    const int row = row_of(chunk);
    if (row >= a.num_rows) break;
    const uint32_t epoch = load_early(&a.epochs[chunk]) + 1;
    const uint32_t lse = load_early(&a.lse[row]);
    const uint2 own = load_own(row);
    if (load_lost_rank(a.lost_rank) >= 0) break;
#pragma unroll
    for (int i = 1; i < kRanks; ++i) {
      if (i >= a.size) break;
      const int dest = a.rank + i < a.size ? a.rank + i : a.rank + i - a.size;
      Slot& slot = a.slot(dest, a.rank, epoch, chunk);
      store_words(&slot.packets[packet], {make_word(own.x, epoch), make_word(own.y, epoch)});
      if (threadIdx.x == 0) store_word(&slot.lse[row_of_chunk], make_word(lse, epoch));
    }
  }

  bool lost = false;
  for (int chunk = blockIdx.x; chunk < a.num_chunks; chunk += gridDim.x) {
    const int row = row_of(chunk);
    if (row >= a.num_rows) break;
    const uint32_t epoch = load_early(&a.epochs[chunk]) + 1;
    const uint32_t own_lse = load_early(&a.lse[row]);
    const uint2 own = load_own(row);
    Arrival arrivals[kRanks];
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      const uint32_t lse = r == a.rank ? own_lse : __float_as_uint(-INFINITY);
      arrivals[r] = {{make_word(own.x, epoch), make_word(own.y, epoch)}, make_word(lse, epoch)};
    }
    if (!lost) lost = !receive(a, epoch, chunk, packet, row_of_chunk, arrivals);

    const auto lse_of = [&](int r) { return __uint_as_float(payload_of(arrivals[r].lse)); };
    float max = -INFINITY;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) max = fmaxf(max, lse_of(r));
    float sum = 0.f;
    float acc[kElements] = {};
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      if (lse_of(r) == -INFINITY) continue;
      const float weight = expf(lse_of(r) - max);
      const uint2 raw = {payload_of(arrivals[r].packet.x), payload_of(arrivals[r].packet.y)};
      const Packet& shard = reinterpret_cast<const Packet&>(raw);
      sum += weight;
#pragma unroll
      for (int i = 0; i < kElements; ++i) acc[i] += weight * to_float(shard.v[i]);
    }
    const float scale = lost ? NAN : sum == 0.f ? 0.f : 1.f / sum;
    Pack<Out, kElements> out;
#pragma unroll
    for (int i = 0; i < kElements; ++i) out.v[i] = from_float<Out>(acc[i] * scale);
    store_pack(static_cast<Out*>(a.out) + offset_of(row), out);
  }

  __syncthreads();  // no thread reads the epochs any more
  if (packet == 0) {
    for (int chunk = blockIdx.x; chunk < a.num_chunks; chunk += gridDim.x) ++a.epochs[chunk];
  }
}

template <typename In, typename Out>
void launch(const Arguments& a, dim3 grid, dim3 block, cudaStream_t stream) {
  const auto kernel = a.size <= 2   ? peer_merge_kernel<In, Out, 2>
                      : a.size <= 4 ? peer_merge_kernel<In, Out, 4>
                                    : peer_merge_kernel<In, Out, kMaxRanks>;
  launch_dependent(kernel, grid, block, 0, stream, "peer_merge", a);
}

template <typename F>
void dispatch(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) {
    f(float{});
  } else {
    dispatch_16bit(dtype, f);
  }
}

int packets_of_row(DType dtype, int head_dim) { return head_dim * size_of(dtype) / kPacketBytes; }

size_t bytes_of_slots(int size, int num_chunks) {
  return 2 * sizeof(Slot) * (size - 1) * num_chunks;
}

}  // namespace

void check(const PeerMergeParams& p) {
  require(p.num_tokens >= 0, "num_tokens", p.num_tokens, "at least 0");
  require(p.num_heads > 0, "num_heads", p.num_heads, "at least 1");
  require(p.head_dim % 8 == 0 && p.head_dim >= 16 && p.head_dim <= 256, "head_dim", p.head_dim,
          "a multiple of 8 from 16 to 256");
  if (p.num_tokens == 0) return;
  require_pointer(p.o, "o", kPacketBytes);
  require_pointer(p.lse, "lse");
  const size_t elements = kPacketBytes / size_of(p.dtype);
  require_pointer(p.out, "out", elements * size_of(p.out_dtype));
}

PeerMerge::PeerMerge(int rank, int size, int64_t capacity, double timeout_seconds, int device)
    : rank_(rank), size_(size), device_(device), timeout_seconds_(timeout_seconds) {
  require(size >= 1 && size <= kMaxRanks, "size", size, "1 to 8");
  require(rank >= 0 && rank < size, "rank", rank, "0 to " + std::to_string(size - 1));
  require(capacity > 0 && capacity <= int64_t{1} << 32, "capacity", capacity, "1 to 2^32 bytes");
  require(timeout_seconds > 0 && timeout_seconds <= 1e6, "timeout", timeout_seconds,
          "more than 0 and at most 1e6 seconds");
  constexpr int kChunkBytes = kThreads * kPacketBytes;
  num_chunks_ = static_cast<int>((capacity + kChunkBytes - 1) / kChunkBytes);

  const DeviceGuard guard(device);
  const size_t slots = bytes_of_slots(size, num_chunks_);
  const size_t epochs = num_chunks_ * sizeof(uint32_t);
  char* memory = nullptr;
  check_peer_setup(cudaMalloc(&memory, slots + epochs + sizeof(int)), "memory of the merge");
  memory_.reset(memory);
  check_cuda(cudaMemset(memory, 0, slots + epochs), "cudaMemset");
  check_cuda(cudaMemset(memory + slots + epochs, 0xff, sizeof(int)), "cudaMemset");
  int* lost_rank = nullptr;
  check_peer_setup(cudaHostAlloc(&lost_rank, sizeof(int), cudaHostAllocMapped), "cudaHostAlloc");
  lost_rank_.reset(lost_rank);
  *lost_rank = -1;
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  peers_ = std::make_unique<PeerMemory>(rank, size, memory, device);
}

int PeerMerge::max_tokens(DType dtype, int num_heads, int head_dim) const {
  PeerMergeParams form{};
  form.dtype = dtype;
  form.num_heads = num_heads;
  form.head_dim = head_dim;
  star_attention::check(form);
  const int64_t rows = int64_t{num_chunks_} * (kThreads / packets_of_row(dtype, head_dim));
  return static_cast<int>(rows / num_heads);
}

void PeerMerge::merge(const PeerMergeParams& p, cudaStream_t stream) const {
  star_attention::check(p);
  const int max_tokens = this->max_tokens(p.dtype, p.num_heads, p.head_dim);
  require(p.num_tokens <= max_tokens, "num_tokens", p.num_tokens,
          "at most " + std::to_string(max_tokens) + ", this PeerMerge's capacity");
  for (int r = 0; r < size_; ++r) {
    require(peers_->at(r) != nullptr, "rank", r, "memory that open() has mapped");
  }
  if (p.num_tokens == 0) return;

  const int packets = packets_of_row(p.dtype, p.head_dim), rows_of_chunk = kThreads / packets;
  Arguments a{};
  a.o = p.o;
  a.lse = p.lse;
  a.out = p.out;
  a.num_rows = p.num_tokens * p.num_heads;
  a.head_dim = p.head_dim;
  a.num_chunks = (a.num_rows + rows_of_chunk - 1) / rows_of_chunk;
  a.rank = rank_;
  a.size = size_;
  a.capacity = num_chunks_;
  for (int r = 0; r < size_; ++r) a.slots[r] = static_cast<Slot*>(peers_->at(r));
  char* epochs = memory_.get() + bytes_of_slots(size_, num_chunks_);
  a.epochs = reinterpret_cast<uint32_t*>(epochs);
  a.lost_rank = reinterpret_cast<int*>(a.epochs + num_chunks_);
  a.host_lost = lost_rank_.get();
  a.timeout_ns = static_cast<uint64_t>(timeout_seconds_ * 1e9);

  const DeviceGuard guard(device_);
  const dim3 block(packets, rows_of_chunk);
  const dim3 grid(std::min(a.num_chunks, kBlocksPerSm * current_device().num_sms));
  dispatch(p.dtype, [&](auto in) {
    dispatch(p.out_dtype,
             [&](auto out) { launch<decltype(in), decltype(out)>(a, grid, block, stream); });
  });
}

void PeerMerge::check() const {
  const int lost = *static_cast<const volatile int*>(lost_rank_.get());
  if (lost < 0) return;
  throw std::runtime_error("rank " + std::to_string(lost) +
                           " is lost: it took no part in a merge for " + to_text(timeout_seconds_) +
                           " s");
}

}  // namespace star_attention
