// One PTX instruction per function, for sm_90a: mbarrier, TMA, clusters, warpgroups. wgmma itself,
// one function per width, is in wgmma_s8.cuh.
//
// Addresses of shared memory are 32-bit offsets (shared_address of sm80.cuh). In a cluster the same
// offset names a thread block's own memory; cluster_address turns it into that of another block.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "sm80.cuh"

namespace lrq {

// ---- mbarrier -----------------------------------------------------------------------------------

// A phase completes after `arrivals` arrivals and as many bytes as were announced (PTX ISA
// 9.7.13.15.9, mbarrier.init).
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the cluster and to TMA (PTX ISA 9.7.13.4, fence).
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces bytes that asynchronous copies will bring in this phase (PTX ISA
// 9.7.13.15.13, mbarrier.arrive).
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives at a barrier of any block of the cluster. Not .release.cluster, for which the compiler
// adds a MEMBAR: what is released is that reads are over, of data that only asynchronous copies
// write (PTX ISA 9.7.13.15.13, mbarrier.arrive).
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t cluster_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_barrier) : "memory");
}

// Whether the phase of this parity is complete; waits a while before it says no (PTX ISA
// 9.7.13.15.16, mbarrier.try_wait).
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(complete)
      : "r"(barrier), "r"(parity)
      : "memory");
  return complete != 0;
}

// Waits until the phase of this parity is complete. Parity 1 of a fresh barrier is.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// ---- clusters -----------------------------------------------------------------------------------

// This block's number in its cluster (PTX ISA 10.11, %cluster_ctarank).
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The address in block `rank` of what `shared` is here (PTX ISA 9.7.9.23, mapa).
__device__ __forceinline__ uint32_t cluster_address(uint32_t shared, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// Every thread of the cluster arrives, all memory before it is visible after cluster_wait (PTX ISA
// 9.7.13.3, barrier.cluster).
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
}

// The same, but orders no memory: no MEMBAR, about a microsecond at the start of a kernel.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Loads 16 bytes of another block's shared memory (PTX ISA 9.7.9.8, ld).
__device__ __forceinline__ int4 load_cluster_16(uint32_t cluster_shared) {
  int4 value;
  asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(cluster_shared)
               : "memory");
  return value;
}

// Waits for every thread's cluster_arrive (PTX ISA 9.7.13.3, barrier.cluster).
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// ---- bulk copies --------------------------------------------------------------------------------

// Copies `bytes` (a multiple of 16, both ends 16-byte aligned) to shared memory; they count at the
// barrier (PTX ISA 9.7.9.25.4.1, cp.async.bulk).
__device__ __forceinline__ void bulk_load(uint32_t shared, const void* global, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// Copies the box at column x, row y of a tensor to shared memory, zeros where it leaves the tensor;
// all its bytes count at the barrier (PTX ISA 9.7.9.25.5.2, cp.async.bulk.tensor).
__device__ __forceinline__ void tensor_load(uint32_t shared, const CUtensorMap* map, int x, int y,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// tensor_load into the same offset of every block whose bit is set in `blocks`, counted at each
// one's own barrier of that offset (PTX ISA 9.7.9.25.5.2, cp.async.bulk.tensor, .multicast).
__device__ __forceinline__ void tensor_load_multicast(uint32_t shared, const CUtensorMap* map,
                                                      int x, int y, uint32_t barrier,
                                                      uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
      : "memory");
}

// Copies a box from shared memory to the tensor, without what leaves it; part of the thread's open
// bulk group (PTX ISA 9.7.9.25.5.2, cp.async.bulk.tensor).
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, int x, int y,
                                             uint32_t shared) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(x), "r"(y), "r"(shared)
      : "memory");
}

// Closes the group of this thread's bulk stores (PTX ISA 9.7.9.25.6.1, cp.async.bulk.commit_group).
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all bulk stores of this thread have read shared memory (PTX ISA 9.7.9.25.6.2,
// cp.async.bulk.wait_group.read).
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until all bulk stores of this thread are complete (PTX ISA 9.7.9.25.6.2,
// cp.async.bulk.wait_group).
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Orders this thread's ordinary accesses to shared memory before later bulk copies (PTX ISA
// 9.7.13.4, fence.proxy.async).
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- warpgroups ---------------------------------------------------------------------------------

// Gives registers of every warp of the warpgroup back, down to kRegisters a thread (PTX ISA
// 9.7.19.5, setmaxnreg).
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Waits for and takes registers, up to kRegisters a thread (PTX ISA 9.7.19.5, setmaxnreg).
template <int kRegisters>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barrier `id` (1..15) of `threads` threads, whole warps (PTX ISA 9.7.13.1, barrier).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Orders register writes before the wgmma that follow (PTX ISA 9.7.15.7.1, wgmma.fence).
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of this warp's wgmma (PTX ISA 9.7.15.7.2, wgmma.commit_group).
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups are in flight (PTX ISA 9.7.15.7.3, wgmma.wait_group).
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: tells the compiler that the register is used and changed here, so that it neither
// moves accesses across nor gives it to others before.
template <typename T>
__device__ __forceinline__ void pin_register(T& value) {
  asm volatile("" : "+r"(value)::"memory");
}

template <typename T, int kCount>
__device__ __forceinline__ void pin_registers(T (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    pin_register(registers[i]);
  }
}

// Operand B of wgmma: rows (columns of B) of 128 bytes in the 128-byte swizzle, groups of eight
// rows 1024 bytes apart, the tile 1024-byte aligned. Four k32 slices lie kSliceDescriptorStep apart
// (PTX ISA 9.7.15.5.1.2.2, matrix descriptor).
//
//     bits  0-13  address / 16          bits 32-45  1024 / 16, stride of eight rows
//     bits 16-29  1, ignored            bits 62-63  1, 128-byte swizzle
constexpr uint64_t kSliceDescriptorStep = 32 / 16;

__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t shared) {
  constexpr uint64_t kLayout = uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16;
  return kLayout | (shared & 0x3ffffu) >> 4;
}

// ---- transposed 8 x 8 matrices of 16-bit values -------------------------------------------------

// Stores four matrices, row addresses from lanes 8i..8i+7 for matrix i; register i of lane l holds
// rows 2(l%4), +1 of column l/4 (PTX ISA 9.7.14.5.16, stmatrix).
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row_address,
                                                  const uint32_t (&matrix)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
      "r"(matrix[0]), "r"(matrix[1]), "r"(matrix[2]), "r"(matrix[3])
      : "memory");
}

// The inverse of stmatrix_x4_trans (PTX ISA 9.7.14.5.15, ldmatrix).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&matrix)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(row_address)
               : "memory");
}

}  // namespace lrq
