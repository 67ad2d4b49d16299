// Instances of the portable GEMM and their launch.
#include <utility>

#include "gemm_sm80.cuh"
#include "launch.h"

namespace lrq {
namespace {

template <int kBits, int kConfigIndex>
cudaError_t launch_instance(const GemmArgs& args, cudaStream_t stream) {
  using Gemm = GemmSm80<kBits, kConfigIndex>;
  const auto kernel = gemm_sm80_kernel<kBits, kConfigIndex>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Gemm::kSharedBytes);
  if (error != cudaSuccess) {
    return error;
  }
  const auto blocks = static_cast<unsigned>(block_count(Gemm::kConfig, args.problem));
  kernel<<<blocks, Gemm::kThreads, Gemm::kSharedBytes, stream>>>(args, has_aligned_octets(args));
  return cudaGetLastError();
}

// Compares the wanted index with every row of the table that belongs to this kernel.
template <int kBits, int kConfigIndex = 0>
cudaError_t launch_config(const GemmArgs& args, int index, cudaStream_t stream) {
  if constexpr (kConfigIndex == kGemmConfigCount) {
    return cudaErrorInvalidValue;
  } else {
    if constexpr (kGemmConfigs[kConfigIndex].arch == 80) {
      if (index == kConfigIndex) {
        return launch_instance<kBits, kConfigIndex>(args, stream);
      }
    }
    return launch_config<kBits, kConfigIndex + 1>(args, index, stream);
  }
}

}  // namespace

cudaError_t launch_gemm_sm80(const GemmArgs& args, const GemmConfig& config, cudaStream_t stream) {
  const int index = config_index(config);
  switch (args.problem.weight_bits) {
    case 4:
      return launch_config<4>(args, index, stream);
    case 3:
      return launch_config<3>(args, index, stream);
    case 2:
      return launch_config<2>(args, index, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lrq
