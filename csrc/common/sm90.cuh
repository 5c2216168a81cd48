// Thin wrappers for the Hopper (sm_90a) instructions: mbarrier, TMA, wgmma, setmaxnreg.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace star_attention::sm90 {

__device__ inline uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// mbarrier

__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)),
               "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}

__device__ inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Returns once the barrier's phase of this parity has completed.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const uint32_t address = smem_address(barrier);
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  } while (!done);
}

// Orders ordinary writes to shared memory before later reads by the tensor cores.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Thread block clusters. `rank` is that of a block in the own cluster; pointers are to the own
// shared memory and name the same place in the other block's.

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

__device__ inline uint32_t cluster_address(const void* pointer, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(smem_address(pointer)), "r"(rank));
  return address;
}

// Orders nothing that the arriving thread wrote: a wider release would flush all its writes.
__device__ inline void barrier_arrive(uint64_t* barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank))
               : "memory");
}

// Stores a value that counts as 4 bytes of the barrier's phase.
__device__ inline void store_async(int* destination, uint64_t* barrier, int rank, int value) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   cluster_address(destination, rank)),
               "r"(value), "r"(cluster_address(barrier, rank))
               : "memory");
}

// True in one lane of a converged warp.
__device__ inline bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}\n"
      : "=r"(elected));
  return elected;
}

// Named barriers: `threads` counts both those that sync and those that arrive.

__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// TMA

// `bytes` contiguous bytes, a multiple of 16, that the barrier counts.
__device__ inline void bulk_load(void* destination, const void* source, uint32_t bytes,
                                 uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem_address(destination)),
      "l"(source), "r"(bytes), "r"(smem_address(barrier))
      : "memory");
}

__device__ inline void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ inline void tma_load(void* destination, const CUtensorMap* map, uint64_t* barrier,
                                int32_t x, int32_t y, int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem_address(destination)),
      "l"(map), "r"(smem_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Loads into the blocks of the cluster whose bits `blocks` has, and signals the barrier of each.
__device__ inline void tma_load_multicast(void* destination, const CUtensorMap* map,
                                          uint64_t* barrier, uint16_t blocks, int32_t x, int32_t y,
                                          int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem_address(destination)),
      "l"(map), "r"(smem_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}

// Registers per thread of the calling warpgroup.

template <int kRegisters>
__device__ inline void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// wgmma. Operands in shared memory are tiles of 128-byte rows in the 128-byte swizzle, 1024-byte
// aligned. `panel_bytes` is the distance between tiles of 64 columns; it matters only where the
// columns are not the summed dimension.
__device__ inline uint64_t wgmma_descriptor(const void* tile, uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | uint64_t{panel_bytes >> 4} << 16 |
         ((smem_address(tile) & 0x3ffff) >> 4);
}

__device__ inline uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Before the first wgmma and after ordinary accesses to registers that a wgmma uses.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` committed groups run.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to registers of an asynchronous wgmma over this point.
template <class T, int kCount>
__device__ __forceinline__ void pin_registers(T (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

#define STAR_ATTENTION_R16(d, i)                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]),        \
      "+f"(d[i + 11]), "+f"(d[i + 12]), "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define STAR_ATTENTION_D32                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define STAR_ATTENTION_D64                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "  \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "  \
  "%56, %57, %58, %59, %60, %61, %62, %63}"

// d[64 x 128] (+)= A[64 x 16] B[128 x 16]^T, both in shared memory, summed dimension contiguous.
#define STAR_ATTENTION_WGMMA_SS_128(type)                                                 \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred accumulate;\n"                                                          \
      "setp.ne.b32 accumulate, %66, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " STAR_ATTENTION_D64 \
      ", %64, %65, accumulate, 1, 1, 0, 0;\n"                                             \
      "}\n"                                                                               \
      : STAR_ATTENTION_R16(d, 0), STAR_ATTENTION_R16(d, 16), STAR_ATTENTION_R16(d, 32),   \
        STAR_ATTENTION_R16(d, 48)                                                         \
      : "l"(a), "l"(b), "r"(int{accumulate}))

template <class Element>
__device__ __forceinline__ void wgmma_ss(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<Element, __half>) {
    STAR_ATTENTION_WGMMA_SS_128("f16");
  } else {
    STAR_ATTENTION_WGMMA_SS_128("bf16");
  }
}

// d[64 x kColumns] += A[64 x 16] B[16 x kColumns], A in registers, B in shared memory with its
// columns contiguous.
#define STAR_ATTENTION_WGMMA_RS_64(type)                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " STAR_ATTENTION_D32 \
               ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"                                       \
               : STAR_ATTENTION_R16(d, 0), STAR_ATTENTION_R16(d, 16)                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define STAR_ATTENTION_WGMMA_RS_128(type)                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " STAR_ATTENTION_D64 \
               ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"                                        \
               : STAR_ATTENTION_R16(d, 0), STAR_ATTENTION_R16(d, 16), STAR_ATTENTION_R16(d, 32),   \
                 STAR_ATTENTION_R16(d, 48)                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <class Element>
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const uint32_t* a, uint64_t b) {
  if constexpr (std::is_same_v<Element, __half>) {
    STAR_ATTENTION_WGMMA_RS_64("f16");
  } else {
    STAR_ATTENTION_WGMMA_RS_64("bf16");
  }
}

template <class Element>
__device__ __forceinline__ void wgmma_rs(float (&d)[64], const uint32_t* a, uint64_t b) {
  if constexpr (std::is_same_v<Element, __half>) {
    STAR_ATTENTION_WGMMA_RS_128("f16");
  } else {
    STAR_ATTENTION_WGMMA_RS_128("bf16");
  }
}

#undef STAR_ATTENTION_R16
#undef STAR_ATTENTION_D32
#undef STAR_ATTENTION_D64
#undef STAR_ATTENTION_WGMMA_SS_128
#undef STAR_ATTENTION_WGMMA_RS_64
#undef STAR_ATTENTION_WGMMA_RS_128

}  // namespace star_attention::sm90
