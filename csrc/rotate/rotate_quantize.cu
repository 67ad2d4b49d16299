// Instances of the rotation of token rows, and their launch.
#include "../current_gpu.h"
#include "../overlap.h"
#include "launch.h"
#include "rotate_groups.cuh"
#include "rotate_rows.cuh"

namespace lrq {
namespace {

constexpr int64_t kMaxGridRows = 65535;
static_assert(sizeof(RotateShared) + 1024 <= kRotateStaticShared, "what plans leave room for");

struct Gpu {
  int device;
  int sms;
  int shared_limit;  // bytes of a thread block
};

struct Shape {
  int64_t blocks;  // of a sample
  dim3 threads;
  int shared_bytes;  // dynamic
};

template <typename... Args>
cudaError_t launch_kernel(void (*kernel)(Args...), int code_arch, const Shape& shape,
                          int64_t samples, cudaStream_t stream, const Args&... args) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t rows = min_of(samples, kMaxGridRows);
  cudaLaunchAttribute overlap = overlap_attribute();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(rows),
                        static_cast<unsigned>(ceil_div(samples, rows)));
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = can_overlap(code_arch) ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename T, RotateForm kForm, bool kUsual>
cudaError_t launch_rows(const RotateRowsArgs& args, const Gpu& gpu, cudaStream_t stream) {
  const auto kernel = rotate_rows_kernel<T, kForm, kUsual>;
  int code_arch = 0;
  const cudaError_t error = query_code_arch(kernel, gpu.device, &code_arch);
  if (error != cudaSuccess) {
    return error;
  }
  const int registers = row_registers(kForm, kUsual) + more_registers(code_arch);
  const RotateRowsPlan plan =
      plan_rotate_rows(args.features, args.samples, args.tokens, gpu.sms, registers,
                       kForm == RotateForm::kModulated, gpu.shared_limit);
  if constexpr (kForm == RotateForm::kModulated) {
    if (!plan.fits(gpu.shared_limit)) {
      return launch_rows<T, RotateForm::kNorm, false>(args, gpu, stream);
    }
  }
  const Shape shape = {plan.blocks_per_sample, dim3(plan.team_threads, plan.teams),
                       plan.shared_bytes};
  return launch_kernel(kernel, code_arch, shape, args.samples, stream, args, plan);
}

template <typename T, RotateForm kForm, bool kUsual, int kTokens>
cudaError_t launch_groups(const RotateRowsArgs& args, const Gpu& gpu, cudaStream_t stream) {
  const auto kernel = rotate_groups_kernel<T, kForm, kUsual, kTokens>;
  int code_arch = 0;
  const cudaError_t error = query_code_arch(kernel, gpu.device, &code_arch);
  if (error != cudaSuccess) {
    return error;
  }
  const Shape shape = {ceil_div<int64_t>(args.tokens, kTokens),
                       dim3(32 * group_warps(kTokens, args.features)),
                       kForm == RotateForm::kModulated ? 2 * 2 * args.features : 0};
  return launch_kernel(kernel, code_arch, shape, args.samples, stream, args);
}

template <typename T, RotateForm kForm, bool kUsual>
cudaError_t launch_instance(const RotateRowsArgs& args, const Gpu& gpu, cudaStream_t stream) {
  const int group_tokens =
      args.block_size == kTransform
          ? choose_group_tokens(args.features, args.samples, args.tokens, gpu.sms, kForm)
          : 0;
  if constexpr (kForm != RotateForm::kNorm) {
    if (group_tokens == 8) {
      return launch_groups<T, kForm, kUsual, 8>(args, gpu, stream);
    }
  }
  if constexpr (kForm == RotateForm::kPlain) {
    switch (group_tokens) {
      case 1:
        return launch_groups<T, kForm, kUsual, 1>(args, gpu, stream);
      case 2:
        return launch_groups<T, kForm, kUsual, 2>(args, gpu, stream);
      case 4:
        return launch_groups<T, kForm, kUsual, 4>(args, gpu, stream);
      default:
        break;
    }
  }
  return launch_rows<T, kForm, kUsual>(args, gpu, stream);
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
