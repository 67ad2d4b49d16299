// Instances of the rotation of token rows, and their launch.
#include "../current_gpu.h"
#include "../overlap.h"
#include "launch.h"
#include "rotate_quantize.cuh"

namespace lrq {
namespace {

constexpr int64_t kMaxGridRows = 65535;
static_assert(sizeof(RotateShared) + 1024 <= kRotateStaticShared, "what plans leave room for");

// Of a lane: no spills on any architecture, and not slower than others on an H200.
template <RotateForm kForm, bool kUsual>
constexpr int kRegisters = kForm == RotateForm::kPlain  ? (kUsual ? 72 : 80)
                           : kForm == RotateForm::kNorm ? 128
                           : kUsual                     ? 80
                                                        : 96;

struct Gpu {
  int device;
  int sms;
  int shared_limit;  // bytes of a thread block
};

template <typename T, RotateForm kForm, bool kUsual>
cudaError_t launch_instance(const RotateRowsArgs& args, const Gpu& gpu, cudaStream_t stream) {
  constexpr int kMaxRegisters = kRegisters<kForm, kUsual>;
  const RotateRowsPlan plan =
      plan_rotate_rows(args.features, args.samples, args.tokens, gpu.sms, kMaxRegisters,
                       kForm == RotateForm::kModulated, gpu.shared_limit);
  if constexpr (kForm == RotateForm::kModulated) {
    if (!plan.fits(gpu.shared_limit)) {
      return launch_instance<T, RotateForm::kNorm, false>(args, gpu, stream);
    }
  }
  const auto kernel = rotate_rows_kernel<T, kForm, kUsual, kMaxRegisters>;
  bool can_overlap = false;
  cudaError_t error = query_overlap(kernel, gpu.device, &can_overlap);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 plan.shared_bytes);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t rows = min_of(args.samples, kMaxGridRows);
  cudaLaunchAttribute overlap = overlap_attribute();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.blocks_per_sample, static_cast<unsigned>(rows),
                        static_cast<unsigned>(ceil_div(args.samples, rows)));
  config.blockDim = dim3(plan.team_threads, plan.teams);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = can_overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args, plan);
}

template <typename T, RotateForm kForm>
cudaError_t launch_form(const RotateRowsArgs& args, const Gpu& gpu, cudaStream_t stream) {
  const bool usual = args.block_size == kTransform && !args.rms && !args.clamp;
  return usual ? launch_instance<T, kForm, true>(args, gpu, stream)
               : launch_instance<T, kForm, false>(args, gpu, stream);
}

bool is_aligned(const SampleVectors& vectors, OutType type) {
  return vectors.data != nullptr && vectors.type == type &&
         (reinterpret_cast<uintptr_t>(vectors.data) | 2 * vectors.sample_stride) % 16 == 0;
}

template <typename T>
cudaError_t launch_type(const RotateRowsArgs& args, const Gpu& gpu, cudaStream_t stream) {
  if (args.norm == TokenNorm::kNone) {
    return launch_form<T, RotateForm::kPlain>(args, gpu, stream);
  }
  return is_aligned(args.scale, args.type) && is_aligned(args.shift, args.type)
             ? launch_form<T, RotateForm::kModulated>(args, gpu, stream)
             : launch_instance<T, RotateForm::kNorm, false>(args, gpu, stream);
}

}  // namespace

cudaError_t launch_rotate_rows(const RotateRowsArgs& args, cudaStream_t stream) {
  Gpu gpu = {};
  cudaError_t error = current_gpu(gpu.device, gpu.sms);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&gpu.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   gpu.device);
  }
  if (error != cudaSuccess) {
    return error;
  }
  switch (args.type) {
    case OutType::kBFloat16:
      return launch_type<__nv_bfloat16>(args, gpu, stream);
    case OutType::kFloat16:
      return launch_type<__half>(args, gpu, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lrq
