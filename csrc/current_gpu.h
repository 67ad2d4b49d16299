// The GPU that a launch goes to.
#pragma once

#include <cuda_runtime_api.h>

namespace lrq {

// Its number and its multiprocessors.
inline cudaError_t current_gpu(int& device, int& sms) {
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)
                              : error;
}

}  // namespace lrq
