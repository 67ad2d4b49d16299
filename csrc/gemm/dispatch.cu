// The one switch over architectures: a configuration's row names the kernel family that runs it.
#include "launch.h"

namespace lrq {

cudaError_t launch_gemm(const GemmArgs& args, const GemmConfig& config, cudaStream_t stream) {
  switch (config.arch) {
    case 80:
      return launch_gemm_sm80(args, config, stream);
    case 90:
      return launch_gemm_sm90(args, config, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

bool has_gemm_a16(const A16Args& args, int arch) {
  // TMA wants rows at multiples of 16 bytes.
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                       (args.problem.m == 1 || args.x_stride % 8 == 0);
  return kSm90Compiled && arch == 90 && aligned && args.problem.k >= 1 &&
         is_weight_bits(args.problem.weight_bits);
}

cudaError_t launch_gemm_a16(const A16Args& args, cudaStream_t stream) {
#ifdef LRQ_WITHOUT_SM90A
  return cudaErrorNoKernelImageForDevice;
#else
  switch (args.problem.weight_bits) {
    case 4:
      return launch_gemm_a16_sm90<4>(args, stream);
    case 3:
      return launch_gemm_a16_sm90<3>(args, stream);
    case 2:
      return launch_gemm_a16_sm90<2>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
#endif
}

}  // namespace lrq
