// Launches of kernels that start under the end of the kernel in front (CUDA programming guide,
// programmatic dependent launch). Such a kernel calls grid_dependency_wait() before it touches what
// any other may write or still read, and grid_dependency_trigger() after that, so that two overlap
// at most.
#pragma once

#include <cuda_runtime_api.h>

namespace lrq {

inline cudaLaunchAttribute overlap_attribute() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// Devices before 9.0 refuse the attribute.
inline cudaError_t query_overlap(int device, bool* can_overlap) {
  int major = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  *can_overlap = major >= 9;
  return error;
}

}  // namespace lrq
