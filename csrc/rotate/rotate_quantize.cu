// Instances of the rotation of token rows, and their launch.
#include "launch.h"
#include "rotate_quantize.cuh"

namespace lrq {
namespace {

cudaError_t query_device(RotateDevice& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.sms, cudaDevAttrMultiProcessorCount, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.shared_bytes_per_sm,
                                   cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.shared_bytes_per_block,
                                   cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  return error;
}

template <typename T, bool kNorm>
cudaError_t launch_instance(const RotateRowsArgs& args, cudaStream_t stream) {
  RotateDevice device = {};
  cudaError_t error = query_device(device);
  if (error != cudaSuccess) {
    return error;
  }
  const RotateRowsPlan plan =
      plan_rotate_rows(args.features, kNorm, args.samples, args.tokens, device);
  const auto kernel = rotate_rows_kernel<T, kNorm>;
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) {
    return error;
  }
  const auto blocks = static_cast<unsigned>(args.samples * plan.blocks_per_sample);
  kernel<<<blocks, plan.threads(), plan.shared_bytes, stream>>>(args, plan);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_type(const RotateRowsArgs& args, cudaStream_t stream) {
  return args.norm == TokenNorm::kNone ? launch_instance<T, false>(args, stream)
                                       : launch_instance<T, true>(args, stream);
}

}  // namespace

cudaError_t launch_rotate_rows(const RotateRowsArgs& args, cudaStream_t stream) {
  switch (args.type) {
    case OutType::kBFloat16:
      return launch_type<__nv_bfloat16>(args, stream);
    case OutType::kFloat16:
      return launch_type<__half>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lrq
