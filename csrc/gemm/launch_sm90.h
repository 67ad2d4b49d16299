// Between the launcher of the Hopper GEMM (gemm_sm90.cu) and its instances, one source for each bit
// width so that they compile side by side (gemm_sm90_w4.cu and its neighbours).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "config.h"
#include "problem.h"

namespace lrq {

// x by tile_m / cluster tokens; y and residual by tensor stores, unset where tiles leave otherwise.
struct TensorMaps {
  CUtensorMap x;
  CUtensorMap y;
  CUtensorMap residual;
};

template <int kBits>
cudaError_t launch_gemm_sm90_bits(const TensorMaps& maps, const GemmArgs& args,
                                  const GemmConfig& config, cudaStream_t stream);

}  // namespace lrq
