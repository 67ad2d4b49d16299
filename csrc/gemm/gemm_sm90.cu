// Launch of the Hopper GEMM: tensor maps, then the instances of the bit width.
#include "launch.h"

#ifdef LRQ_WITHOUT_SM90A

namespace lrq {

cudaError_t launch_gemm_sm90(const GemmArgs&, const GemmConfig&, cudaStream_t) {
  return cudaErrorNoKernelImageForDevice;
}

}  // namespace lrq

#else

#include "../current_gpu.h"
#include "epilogue_sm90.cuh"
#include "launch_sm90.h"
#include "tensor_map_sm90.h"

namespace lrq {
namespace {

cudaError_t encode_maps(TensorMaps& maps, const GemmArgs& args, TileStore store, int tile_m,
                        int cluster) {
  const int64_t m = args.problem.m;
  const int64_t n = args.problem.n;
  const int64_t k = args.problem.k;
  const TensorMapMatrix x = {args.x_q, CU_TENSOR_MAP_DATA_TYPE_UINT8, m, k,
                             row_bytes_of(m, args.x_stride, k, 1)};
  cudaError_t error = encode_map(maps.x, x, kTileInputs, tile_m / cluster);
  if (store == TileStore::kTensor) {
    // Only bits move here, so both 16-bit types are the same.
    constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const int tokens = tensor_store_tokens(tile_m);
    if (error == cudaSuccess) {
      const TensorMapMatrix y = {args.y, kType, m, n, n * 2};
      error = encode_map(maps.y, y, kHalfTileChannels, tokens);
    }
    if (error == cudaSuccess && args.residual != nullptr) {
      const TensorMapMatrix residual = {args.residual, kType, m, n,
                                        row_bytes_of(m, args.residual_stride, n, 2)};
      error = encode_map(maps.residual, residual, kHalfTileChannels, tokens);
    }
  }
  return error;
}

cudaError_t prepare(GemmSm90Launch& launch, const GemmArgs& args, const GemmConfig& config) {
  int device = 0;
  int sms = 0;
  cudaError_t error = current_gpu(device, sms);
  if (error != cudaSuccess) {
    return error;
  }
  GemmSm90Params& params = launch.params;
  params.args = args;
  params.schedule = make_schedule(config, args.problem, sms);
  params.cluster = config.cluster;
  params.split_k = config.split_k;
  params.aligned = has_aligned_octets(args);
  params.store = choose_store(args, config, params.aligned);
  error = encode_maps(launch.maps, args, params.store, config.tile_m, config.cluster);
  if (error == cudaSuccess && params.schedule.tail_tiles > 0) {
    error = encode_maps(launch.tail_maps, args, params.store, params.schedule.tail_tokens,
                        config.cluster);
  }
  return error;
}

}  // namespace

cudaError_t launch_gemm_sm90(const GemmArgs& args, const GemmConfig& config, cudaStream_t stream) {
  GemmSm90Launch launch = {};
  const cudaError_t error = prepare(launch, args, config);
  if (error != cudaSuccess) {
    return error;
  }
  switch (args.problem.weight_bits) {
    case 4:
      return launch_gemm_sm90_bits<4>(launch, config, stream);
    case 3:
      return launch_gemm_sm90_bits<3>(launch, config, stream);
    case 2:
      return launch_gemm_sm90_bits<2>(launch, config, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lrq

#endif
