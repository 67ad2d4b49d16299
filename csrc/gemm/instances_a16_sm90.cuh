// The instances of the 16-bit Hopper GEMM for one bit width, and the choice among them.
#pragma once

#include "gemm_a16_sm90.cuh"
#include "launch.h"
#include "tensor_map_sm90.h"

namespace lrq {

// Tokens of a tile, larger ones first: they win a tie, since they move fewer bytes.
constexpr int kA16TileTokens[] = {256, 192, 128, 64};

// Clocks until the last block is done, by a model and not by measurement: a step of 128 k is 8
// clocks a token of products, or what decoding takes; a tile costs an epilogue and a filling
// pipeline besides.
inline int64_t a16_clocks(const GemmProblem& problem, int tile_m, int sms) {
  constexpr int64_t kDecodeClocks = 700;
  const int64_t tiles =
      ceil_div<int64_t>(problem.m, tile_m) * ceil_div<int64_t>(problem.n, kTileChannels);
  const int64_t step = max_of<int64_t>(8 * tile_m, kDecodeClocks);
  const int64_t tile = ceil_div<int64_t>(problem.k, kTileInputs) * step + 1000 + 10 * tile_m;
  return ceil_div<int64_t>(tiles, sms) * tile;
}

inline int choose_a16_tile(const GemmProblem& problem, int sms) {
  int best = kA16TileTokens[0];
  for (const int tile_m : kA16TileTokens) {
    if (a16_clocks(problem, tile_m, sms) < a16_clocks(problem, best, sms)) {
      best = tile_m;
    }
  }
  return best;
}

template <int kBits, typename T, int kTileM>
cudaError_t launch_a16_tile(const A16Args& args, int sms, cudaStream_t stream) {
  using Gemm = GemmA16<kBits, T, kTileM>;
  constexpr int kSharedBytes = sizeof(typename Gemm::Shared);
  const auto kernel = gemm_a16_sm90_kernel<kBits, T, kTileM>;
  const GemmProblem& problem = args.problem;

  // A single row has no stride of its own: the kernel never reaches a second.
  const int64_t row_bytes =
      problem.m > 1 ? args.x_stride * 2 : align_up<int64_t>(problem.k * 2, 16);
  // Only bits move here, so both types are the same.
  const TensorMapMatrix x = {args.x, CU_TENSOR_MAP_DATA_TYPE_UINT16, problem.m, problem.k,
                             row_bytes};
  CUtensorMap x_map;
  cudaError_t error = encode_tensor_map(x_map, x, kA16BoxInputs, kTileM);
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
  params.weight_scale = args.weight_scale;
  params.bias = args.bias;
  params.y = args.y;
  params.aligned = problem.n % 8 == 0 && reinterpret_cast<uintptr_t>(args.y) % 16 == 0;
  const int64_t tiles =
      ceil_div<int64_t>(problem.m, kTileM) * ceil_div<int64_t>(problem.n, kTileChannels);
  kernel<<<static_cast<unsigned>(min_of<int64_t>(tiles, sms)), kA16Threads, kSharedBytes, stream>>>(
      x_map, params);
  return cudaGetLastError();
}

template <int kBits, typename T>
cudaError_t launch_a16_type(const A16Args& args, cudaStream_t stream) {
  int device = 0;
  int sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) {
    return error;
  }
  switch (args.tile_m > 0 ? args.tile_m : choose_a16_tile(args.problem, sms)) {
    case 64:
      return launch_a16_tile<kBits, T, 64>(args, sms, stream);
    case 128:
      return launch_a16_tile<kBits, T, 128>(args, sms, stream);
    case 192:
      return launch_a16_tile<kBits, T, 192>(args, sms, stream);
    case 256:
      return launch_a16_tile<kBits, T, 256>(args, sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <int kBits>
cudaError_t launch_gemm_a16_sm90(const A16Args& args, cudaStream_t stream) {
  return args.type == OutType::kBFloat16 ? launch_a16_type<kBits, __nv_bfloat16>(args, stream)
                                         : launch_a16_type<kBits, __half>(args, stream);
}

}  // namespace lrq
