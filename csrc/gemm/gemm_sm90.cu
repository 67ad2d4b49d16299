// Launch of the Hopper GEMM: tensor maps, then the instances of the bit width.
#include "launch.h"

#ifdef LRQ_WITHOUT_SM90A

namespace lrq {

cudaError_t launch_gemm_sm90(const GemmArgs&, const GemmConfig&, cudaStream_t) {
  return cudaErrorNoKernelImageForDevice;
}

}  // namespace lrq

#else

#include "epilogue_sm90.cuh"
#include "launch_sm90.h"

namespace lrq {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, which the runtime finds: linking libcuda would tie the library to a
// driver.
EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr unsigned kCuda12 = 12000;  // the first that knows it
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             kCuda12, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<EncodeTiled>(function)
             : nullptr;
}

struct Matrix {
  const void* data;
  CUtensorMapDataType type;
  int64_t rows;
  int64_t columns;
  int64_t row_bytes;  // from row to row, a multiple of 16
};

// A map of boxes that are box_rows x 128 bytes in shared memory, in the 128-byte swizzle.
cudaError_t encode_map(CUtensorMap& map, const Matrix& matrix, int box_columns, int box_rows) {
  static const EncodeTiled encode = find_encode_tiled();
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

// A single row has no stride of its own: the kernel never reaches a second.
int64_t row_bytes_of(int64_t rows, int64_t stride, int64_t columns, int bytes) {
  return rows > 1 ? stride * bytes : align_up<int64_t>(columns * bytes, 16);
}

cudaError_t encode_maps(TensorMaps& maps, const GemmArgs& args, const GemmConfig& config) {
  const int64_t m = args.problem.m;
  const int64_t n = args.problem.n;
  const int64_t k = args.problem.k;
  const Matrix x = {args.x_q, CU_TENSOR_MAP_DATA_TYPE_UINT8, m, k,
                    row_bytes_of(m, args.x_stride, k, 1)};
  cudaError_t error = encode_map(maps.x, x, kTileInputs, config.tile_m / config.cluster);
  if (choose_store(args, config, has_aligned_octets(args)) == TileStore::kTensor) {
    // Only bits move here, so both 16-bit types are the same.
    constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const int tokens = tensor_store_tokens(config.tile_m);
    if (error == cudaSuccess) {
      const Matrix y = {args.y, kType, m, n, n * 2};
      error = encode_map(maps.y, y, kHalfTileChannels, tokens);
    }
    if (error == cudaSuccess && args.residual != nullptr) {
      const Matrix residual = {args.residual, kType, m, n,
                               row_bytes_of(m, args.residual_stride, n, 2)};
      error = encode_map(maps.residual, residual, kHalfTileChannels, tokens);
    }
  }
  return error;
}

}  // namespace

cudaError_t launch_gemm_sm90(const GemmArgs& args, const GemmConfig& config, cudaStream_t stream) {
  TensorMaps maps = {};
  const cudaError_t error = encode_maps(maps, args, config);
  if (error != cudaSuccess) {
    return error;
  }
  switch (args.problem.weight_bits) {
    case 4:
      return launch_gemm_sm90_bits<4>(maps, args, config, stream);
    case 3:
      return launch_gemm_sm90_bits<3>(maps, args, config, stream);
    case 2:
      return launch_gemm_sm90_bits<2>(maps, args, config, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lrq

#endif
