// Instances of the rotation of token rows, and their launch.
#include "../current_gpu.h"
#include "../overlap.h"
#include "launch.h"
#include "rotate_quantize.cuh"

namespace lrq {
namespace {

constexpr int64_t kMaxGridRows = 65535;

// Of thread blocks that do not stay. Plain: 48 and 56 are slower on an H100. Norm: with fewer the
// compiler spills for one GPU or another.
template <bool kNorm, bool kShareWarps>
constexpr int kRegisters = !kNorm        ? 64
                           : kShareWarps ? 80
                                         : 72;

template <typename T, RotateForm kForm, bool kShareWarps, bool kStays, int kMaxRegisters>
cudaError_t launch_instance(const RotateRowsArgs& args, const RotateRowsPlan& plan, int device,
                            cudaStream_t stream) {
  const auto kernel = rotate_rows_kernel<T, kForm, kShareWarps, kStays, kMaxRegisters>;
  const int64_t rows = min_of(args.samples, kMaxGridRows);
  const dim3 grid(plan.blocks_per_sample, static_cast<unsigned>(rows),
                  static_cast<unsigned>(ceil_div(args.samples, rows)));
  bool can_overlap = false;
  const cudaError_t error = query_overlap(kernel, device, &can_overlap);
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute overlap = overlap_attribute();
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = can_overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args, plan);
}

template <typename T, RotateForm kForm>
cudaError_t launch_form(const RotateRowsArgs& args, cudaStream_t stream) {
  constexpr bool kNorm = kForm == RotateForm::kNorm;
  int device = 0;
  int sms = 0;
  const cudaError_t error = current_gpu(device, sms);
  if (error != cudaSuccess) {
    return error;
  }
  const RotateRowsPlan plan =
      plan_rotate_rows(args.features, kForm, args.samples, args.tokens, sms);
  const bool shares = plan.tokens_per_block > 1;
  if constexpr (!kNorm) {
    constexpr int kStay =
        kForm == RotateForm::kPlain ? kRotateStayRegisters : kRotateStayModulatedRegisters;
    if (kForm == RotateForm::kModulated || plan.stay) {
      return shares ? launch_instance<T, kForm, true, true, kStay>(args, plan, device, stream)
                    : launch_instance<T, kForm, false, true, kStay>(args, plan, device, stream);
    }
  }
  if constexpr (kNorm) {
    if (shares) {
      return launch_instance<T, kForm, true, false, kRegisters<true, true>>(args, plan, device,
                                                                            stream);
    }
  }
  if constexpr (kForm != RotateForm::kModulated) {
    return launch_instance<T, kForm, false, false, kRegisters<kNorm, false>>(args, plan, device,
                                                                             stream);
  }
}

bool is_aligned(const SampleVectors& vectors, OutType type) {
  return vectors.data != nullptr && vectors.type == type &&
         (reinterpret_cast<uintptr_t>(vectors.data) | 2 * vectors.sample_stride) % 16 == 0;
}

template <typename T>
cudaError_t launch_type(const RotateRowsArgs& args, cudaStream_t stream) {
  if (args.norm == TokenNorm::kNone) {
    return launch_form<T, RotateForm::kPlain>(args, stream);
  }
  return is_aligned(args.scale, args.type) && is_aligned(args.shift, args.type)
             ? launch_form<T, RotateForm::kModulated>(args, stream)
             : launch_form<T, RotateForm::kNorm>(args, stream);
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
