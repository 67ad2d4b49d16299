// The warps that work on the same tokens at a time. They wait for each other, teams never do.
#pragma once

#include "../device/sm90.cuh"

namespace lrq {

#ifdef __CUDA_ARCH__
constexpr int kCodeArch = __CUDA_ARCH__ / 10;
#else
constexpr int kCodeArch = 0;
#endif

// Rows and layers of thread blocks are samples; those past the last have none.
__device__ __forceinline__ int sample_of_block() { return blockIdx.y + gridDim.y * blockIdx.z; }

// One of several in a thread block, which is [thread of a team, team].
struct TeamOfBlock {
  __device__ __forceinline__ static int index() { return threadIdx.y; }
  __device__ __forceinline__ static int thread() { return threadIdx.x; }
  __device__ __forceinline__ static int threads() { return blockDim.x; }

  __device__ __forceinline__ static void sync() {
    if (threads() == 32) {
      __syncwarp();
    } else {
      barrier_sync(1 + index(), threads());
    }
  }
};

// The only one of a thread block.
struct WholeBlock {
  __device__ __forceinline__ static int thread() { return threadIdx.x; }
  __device__ __forceinline__ static int threads() { return blockDim.x; }
  __device__ __forceinline__ static void sync() { __syncthreads(); }
};

}  // namespace lrq
