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

}  // namespace lrq
