// Launchers of the layout kernels. Every size is a number of elements; all pointers are device
// pointers. Return the error of the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../out_type.h"

namespace lrq {

struct PrepackArgs {
  const uint32_t* codes;  // canonical [N, ceil(K/32) * bits]
  uint32_t* weight;       // [ceil(N/128), ceil(K/128), 2, 256 * bits]
  int64_t n;
  int64_t k;
  int bits;
};

struct UnprepackArgs {
  const uint32_t* weight;  // [ceil(N/128), ceil(K/128), 2, 256 * bits]
  uint32_t* codes;         // canonical [N, ceil(K/32) * bits]
  int64_t n;
  int64_t k;
  int bits;
};

struct DequantizeArgs {
  const uint32_t* weight;       // [ceil(N/128), ceil(K/128), 2, 256 * bits]
  const int8_t* levels;         // canonical order [T, 2^bits]
  const uint8_t* table_of_row;  // [N], the table of each row, below T; null: T = N, its own
  const float* scale;           // [N]
  void* out;                    // [N, K] of out_type
  int64_t n;
  int64_t k;
  int bits;
  OutType out_type;  // not int32
};

cudaError_t launch_prepack(const PrepackArgs& args, cudaStream_t stream);
cudaError_t launch_unprepack(const UnprepackArgs& args, cudaStream_t stream);
cudaError_t launch_dequantize(const DequantizeArgs& args, cudaStream_t stream);

}  // namespace lrq
