// The instances of the 16-bit Hopper GEMM for one bit width.
#pragma once

#include "../current_gpu.h"
#include "gemm_a16_sm90.cuh"
#include "launch.h"
#include "plan_a16.h"
#include "tensor_map_sm90.h"

namespace lrq {

template <int kBits, typename T, int kTileM, int kConsumers>
cudaError_t launch_a16_instance(const A16Args& args, int sms, cudaStream_t stream) {
  using Gemm = GemmA16<kBits, T, kTileM, kConsumers>;
  constexpr int kSharedBytes = sizeof(typename Gemm::Shared);
  const auto kernel = gemm_a16_sm90_kernel<kBits, T, kTileM, kConsumers>;
  const GemmProblem& problem = args.problem;

  // Only bits move here, so both types are the same.
  const TensorMapMatrix x = {args.x, CU_TENSOR_MAP_DATA_TYPE_UINT16, problem.m, problem.k,
                             row_bytes_of(problem.m, args.x_stride, problem.k, 2)};
  CUtensorMap x_map;
  cudaError_t error = encode_map(x_map, x, kA16BoxInputs, kTileM);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  }
  if (error != cudaSuccess) {
    return error;
  }
  GemmA16Params params;
  params.problem = problem;
  params.weight = args.weight;
  params.levels = args.levels;
  params.table_of_row = args.table_of_row;
  params.weight_scale = args.weight_scale;
  params.bias = args.bias;
  params.y = args.y;
  params.aligned = problem.n % 8 == 0 && reinterpret_cast<uintptr_t>(args.y) % 16 == 0;
  const int64_t tiles =
      ceil_div<int64_t>(problem.m, kTileM) * ceil_div<int64_t>(problem.n, Gemm::kTileN);
  const auto blocks = static_cast<unsigned>(min_of<int64_t>(tiles, sms));
  kernel<<<blocks, Gemm::kThreads, kSharedBytes, stream>>>(x_map, params);
  return cudaGetLastError();
}

// Compares the wanted tile with every one of the table.
template <int kBits, typename T, int kTile = 0>
cudaError_t launch_a16_tile(const A16Args& args, int sms, cudaStream_t stream) {
  if constexpr (kTile == kA16TileCount) {
    return cudaErrorInvalidValue;
  } else {
    if (args.tile == kTile) {
      constexpr A16TileSize kSize = kA16Tiles[kTile];
      constexpr int kConsumers = kSize.channels / kHalfTileChannels;
      return launch_a16_instance<kBits, T, kSize.tokens, kConsumers>(args, sms, stream);
    }
    return launch_a16_tile<kBits, T, kTile + 1>(args, sms, stream);
  }
}

template <int kBits, typename T>
cudaError_t launch_a16_type(const A16Args& args, cudaStream_t stream) {
  int device = 0;
  int sms = 0;
  const cudaError_t error = current_gpu(device, sms);
  return error == cudaSuccess ? launch_a16_tile<kBits, T>(args, sms, stream) : error;
}

template <int kBits>
cudaError_t launch_gemm_a16_sm90(const A16Args& args, cudaStream_t stream) {
  return args.type == OutType::kBFloat16 ? launch_a16_type<kBits, __nv_bfloat16>(args, stream)
                                         : launch_a16_type<kBits, __half>(args, stream);
}

}  // namespace lrq
