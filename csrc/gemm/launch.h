// Launchers of the products. Each returns the error of its launch and waits for nothing.
#pragma once

#include <cuda_runtime_api.h>

#include "config.h"
#include "problem.h"

namespace lrq {

// config is an entry of kGemmConfigs that is_legal for args.problem on the current device.
cudaError_t launch_gemm(const GemmArgs& args, const GemmConfig& config, cudaStream_t stream);

// The rows of kGemmConfigs with arch 80.
cudaError_t launch_gemm_sm80(const GemmArgs& args, const GemmConfig& config, cudaStream_t stream);

// The rows of kGemmConfigs with arch 90.
cudaError_t launch_gemm_sm90(const GemmArgs& args, const GemmConfig& config, cudaStream_t stream);

// args.problem.m <= kGemvMaxTokens.
cudaError_t launch_gemv(const A16Args& args, cudaStream_t stream);

// Whether a kernel multiplies more tokens of 16 bits on this device: wgmma and TMA read them.
bool has_gemm_a16(const A16Args& args, int arch);

// Where has_gemm_a16; args.tile is a place in kA16Tiles.
cudaError_t launch_gemm_a16(const A16Args& args, cudaStream_t stream);

// The instances of one bit width, for sm_90a.
template <int kBits>
cudaError_t launch_gemm_a16_sm90(const A16Args& args, cudaStream_t stream);

}  // namespace lrq
