// Tensor maps of TMA, made on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../int_math.h"

namespace lrq {

struct TensorMapMatrix {
  const void* data;
  CUtensorMapDataType type;
  int64_t rows;
  int64_t columns;
  int64_t row_bytes;  // from row to row, a multiple of 16
};

// A single row has no stride of its own: the kernel never reaches a second.
inline int64_t row_bytes_of(int64_t rows, int64_t stride, int64_t columns, int bytes) {
  return rows > 1 ? stride * bytes : align_up<int64_t>(columns * bytes, 16);
}

// A map of boxes that are box_rows x 128 bytes in shared memory, in the 128-byte swizzle; zeros
// where a box leaves the matrix. The driver's function is found by the runtime: linking libcuda
// would tie the library to a driver.
inline cudaError_t encode_map(CUtensorMap& map, const TensorMapMatrix& matrix, int box_columns,
                              int box_rows) {
  using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
  static const auto encode = []() -> EncodeTiled {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    constexpr unsigned kCuda12 = 12000;  // the first that knows it
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               kCuda12, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(function)
               : nullptr;
  }();
  if (encode == nullptr) {
    return cudaErrorInsufficientDriver;
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns),
                              static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(&map, matrix.type, 2, const_cast<void*>(matrix.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace lrq
