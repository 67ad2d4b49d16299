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

// Whether a portable kernel may overlap on `device`, the current one: where the code that runs
// there was made for 9.0 or newer. What the driver translates from the PTX of an older one (10.0
// with the default build) has no wait in it, and before 9.0 the attribute is refused. Asked once:
// all portable kernels are compiled for the same architectures.
template <typename Kernel>
cudaError_t query_overlap(Kernel* kernel, int device, bool* can_overlap) {
  enum : char { kUnknown, kNo, kYes };
  constexpr int kRemembered = 64;
  static std::array<std::atomic<char>, kRemembered> known{};
  const char before = device < kRemembered ? known[device].load(std::memory_order_relaxed)
                                           : static_cast<char>(kUnknown);
  if (before != kUnknown) {
    *can_overlap = before == kYes;
    return cudaSuccess;
  }
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *can_overlap = error == cudaSuccess && attributes.ptxVersion >= 90;
  if (error == cudaSuccess && device < kRemembered) {
    known[device].store(*can_overlap ? kYes : kNo, std::memory_order_relaxed);
  }
  return error;
}

}  // namespace lrq
