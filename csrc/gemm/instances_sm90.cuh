// The instances of the Hopper GEMM for one bit width, and their launch.
#pragma once

#include "../overlap.h"
#include "gemm_sm90.cuh"
#include "launch_sm90.h"

namespace lrq {

template <int kBits, int kTileM, int kConsumers, int kStages>
cudaError_t launch_instance_sm90(const GemmSm90Launch& what, cudaStream_t stream) {
  using Gemm = GemmSm90<kBits, kTileM, kConsumers, kStages>;
  constexpr int kSharedBytes = sizeof(typename Gemm::Shared);
  const auto kernel = gemm_sm90_kernel<kBits, kTileM, kConsumers, kStages>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) {
    return error;
  }
  const GemmSm90Params& params = what.params;
  cudaLaunchAttribute attributes[2] = {overlap_attribute(), {}};
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = params.cluster * params.split_k;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(params.schedule.clusters * params.cluster * params.split_k);
  launch.blockDim = dim3(Gemm::kThreads);
  launch.dynamicSmemBytes = kSharedBytes;
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = 2;
  return cudaLaunchKernelEx(&launch, kernel, what.maps, what.tail_maps, params);
}

// True for the first row of a tile: rows that differ in the cluster or
// in split_k share its kernel.
constexpr bool has_own_kernel(int index) {
  const GemmConfig& config = kGemmConfigs[index];
  for (int i = 0; i < index; ++i) {
    if (is_sm90(kGemmConfigs[i]) && kGemmConfigs[i].tile_m == config.tile_m &&
        kGemmConfigs[i].tile_n == config.tile_n) {
      return false;
    }
  }
  return is_sm90(config);
}

template <int kBits, int kConfigIndex = 0>
cudaError_t launch_tile_sm90(const GemmSm90Launch& launch, const GemmConfig& config,
                             cudaStream_t stream) {
  if constexpr (kConfigIndex == kGemmConfigCount) {
    return cudaErrorInvalidValue;
  } else {
    if constexpr (has_own_kernel(kConfigIndex)) {
      constexpr GemmConfig kConfig = kGemmConfigs[kConfigIndex];
      constexpr int kConsumers = sm90_consumers(kConfig);
      using Gemm = GemmSm90<kBits, kConfig.tile_m, kConsumers, kConfig.stages>;
      static_assert(sizeof(typename Gemm::Shared) == shared_bytes(kConfig, kBits) &&
                        config_threads(kConfig) == Gemm::kThreads && kConfig.tile_n == Gemm::kTileN,
                    "the planner and the kernel agree on shared memory and threads");
      static_assert(kConfig.tile_k == kTileInputs, "the packed tile");
      if (config.tile_m == kConfig.tile_m && config.tile_n == kConfig.tile_n) {
        return launch_instance_sm90<kBits, kConfig.tile_m, kConsumers, kConfig.stages>(launch,
                                                                                       stream);
      }
    }
    return launch_tile_sm90<kBits, kConfigIndex + 1>(launch, config, stream);
  }
}

template <int kBits>
cudaError_t launch_gemm_sm90_bits(const GemmSm90Launch& launch, const GemmConfig& config,
                                  cudaStream_t stream) {
  return launch_tile_sm90<kBits>(launch, config, stream);
}

}  // namespace lrq
