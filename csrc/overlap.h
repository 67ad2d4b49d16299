// Launches of kernels that start under the end of the kernel in front (CUDA programming guide,
// programmatic dependent launch). Such a kernel calls grid_dependency_wait() before it touches what
// any other may write or still read, and grid_dependency_trigger() after that, so that two overlap
// at most.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

namespace lrq {

inline cudaLaunchAttribute overlap_attribute() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// __CUDA_ARCH__ / 10 of the code of a portable kernel that runs on `device`, the current one: not
// of the device where the driver translates PTX. Asked once: all portable kernels are compiled for
// the same architectures.
template <typename Kernel>
cudaError_t query_code_arch(Kernel* kernel, int device, int* arch) {
  constexpr int kRemembered = 64;
  static std::array<std::atomic<int>, kRemembered> known{};
  *arch = device < kRemembered ? known[device].load(std::memory_order_relaxed) : 0;
  if (*arch != 0) {
    return cudaSuccess;
  }
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *arch = error == cudaSuccess ? attributes.ptxVersion : 0;
  if (error == cudaSuccess && device < kRemembered) {
    known[device].store(*arch, std::memory_order_relaxed);
  }
  return error;
}

// Whether code of that architecture may overlap: what the driver translates from the PTX of one
// before 9.0 (10.0 with the default build) has no wait in it, and there the attribute is refused.
inline bool can_overlap(int code_arch) { return code_arch >= 90; }

}  // namespace lrq
