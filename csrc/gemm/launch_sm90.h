// Between the launcher of the Hopper GEMM (gemm_sm90.cu) and its instances, one source for each bit
// width so that they compile side by side (gemm_sm90_w4.cu and its neighbours).
#pragma once

#include <cuda_runtime_api.h>

#include "config.h"
#include "pipeline_sm90.cuh"

namespace lrq {

// Beside the tensor maps a launch has those of its tail (schedule_sm90.h), unset where it has none.
struct GemmSm90Launch {
  TensorMaps maps;
  TensorMaps tail_maps;
  GemmSm90Params params;
};

template <int kBits>
cudaError_t launch_gemm_sm90_bits(const GemmSm90Launch& launch, const GemmConfig& config,
                                  cudaStream_t stream);

}  // namespace lrq
