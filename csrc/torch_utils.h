// What ops.cpp needs of torch beyond its stable ABI: the current stream, what kernels take of a
// tensor, and checks whose messages name the op, the argument, what was expected and what came. The
// wording is that of lrq_kernels/ops.py, so an error reads the same on every device.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "gemm/config.h"
#include "out_type.h"

namespace lrq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- text of messages -------------------------------------------------------------------------

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    default:
      return torch::headeronly::toString(dtype);
  }
}

template <typename Range>
std::string list_text(const Range& values) {
  std::string text = "[";
  for (const int64_t value : values) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(value);
  }
  return text + "]";
}

// Strides the way Python prints them.
inline std::string strides_text(const Tensor& tensor) {
  const std::string list = list_text(tensor.strides());
  return "strides (" + list.substr(1, list.size() - 2) + (tensor.dim() == 1 ? ",)" : ")");
}

inline std::string tensor_text(const Tensor& tensor) {
  return dtype_text(tensor.scalar_type()) + " " + list_text(tensor.sizes());
}

inline std::string device_text(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index())
                          : "a device that is not CUDA";
}

// ---- checks -----------------------------------------------------------------------------------

struct Argument {
  const char* op;
  const char* name;
};

// std::invalid_argument, which Python sees as ValueError.
[[noreturn]] inline void fail(Argument argument, const std::string& expected,
                              const std::string& got) {
  throw std::invalid_argument(std::string("lrq::") + argument.op + ": " + argument.name +
                              " must be " + expected + ", got " + got);
}

// `expected` and `got` are evaluated only on failure: the checks are on the path of every call.
#define LRQ_CHECK(condition, argument, expected, got) \
  do {                                                \
    if (!(condition)) [[unlikely]] {                  \
      ::lrq::fail((argument), (expected), (got));     \
    }                                                 \
  } while (false)

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) {
    return false;
  }
  int64_t dim = 0;
  for (const int64_t size : shape) {
    if (tensor.size(dim++) != size) {
      return false;
    }
  }
  return true;
}

inline void check_type_and_shape(Argument argument, const Tensor& tensor, ScalarType dtype,
                                 std::initializer_list<int64_t> shape) {
  LRQ_CHECK(tensor.scalar_type() == dtype && has_shape(tensor, shape), argument,
            dtype_text(dtype) + " " + list_text(shape), tensor_text(tensor));
}

inline void check_same_device(Argument argument, const Tensor& tensor, const Tensor& first) {
  LRQ_CHECK(tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(), argument,
            "on " + device_text(first), "a tensor on " + device_text(tensor));
}

inline void check_contiguous(Argument argument, const Tensor& tensor) {
  LRQ_CHECK(tensor.is_contiguous(), argument, "contiguous", strides_text(tensor));
}

// Rows of one piece: last stride 1. A stride that no element is reached by is not looked at.
inline void check_rows(Argument argument, const Tensor& tensor) {
  const bool single = tensor.numel() == 0 || tensor.size(1) == 1;
  LRQ_CHECK(single || tensor.stride(1) == 1, argument, "of last stride 1", strides_text(tensor));
}

inline void check_aligned(Argument argument, const Tensor& tensor, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  LRQ_CHECK(tensor.numel() == 0 || address % bytes == 0, argument,
            "aligned to " + std::to_string(bytes) + " bytes",
            "an address " + std::to_string(address % bytes) + " bytes past that");
}

// One contiguous tensor of known dtype, shape and device.
inline void check_tensor(Argument argument, const Tensor& tensor, ScalarType dtype,
                         std::initializer_list<int64_t> shape, const Tensor& first) {
  check_type_and_shape(argument, tensor, dtype, shape);
  check_same_device(argument, tensor, first);
  check_contiguous(argument, tensor);
}

// ---- what kernels take of a tensor --------------------------------------------------------------

template <typename T>
inline const T* const_pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
inline const T* const_pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? const_pointer<T>(*tensor) : nullptr;
}

inline std::optional<OutType> out_type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return OutType::kBFloat16;
    case ScalarType::Half:
      return OutType::kFloat16;
    case ScalarType::Float:
      return OutType::kFloat32;
    case ScalarType::Int:
      return OutType::kInt32;
    default:
      return std::nullopt;
  }
}

// torch's own product with a weight [N, K] of x's dtype.
inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack = {from(x), from(weight), from(bias)};
  // Not STABLE_TORCH_ERROR_CODE_CHECK: torch 2.10 and 2.11 do not have it.
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// ---- device and stream ------------------------------------------------------------------------

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // else the next launch would find it and report it as its own
    throw std::runtime_error(std::string("lrq::") + op + ": " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
  }
}

inline int multiprocessors(const char* op, int32_t device) {
  int count = 0;
  check_cuda(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// 10 * major + minor of a device, asked once; the error of every op below the oldest supported.
inline int device_arch(const char* op, int32_t device) {
  constexpr int32_t kRemembered = 64;
  static std::array<std::atomic<int>, kRemembered> known{};
  int arch = device < kRemembered ? known[device].load(std::memory_order_relaxed) : 0;
  if (arch == 0) {
    int major = 0;
    int minor = 0;
    check_cuda(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check_cuda(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    arch = 10 * major + minor;
    if (device < kRemembered) {
      known[device].store(arch, std::memory_order_relaxed);
    }
  }
  LRQ_CHECK(arch >= kOldestArch, (Argument{op, "the GPU"}),
            "of compute capability " + arch_name(kOldestArch) + " or newer", arch_name(arch));
  return arch;
}

// torch's current stream. The symbol lives in libtorch_cuda.so, which a CPU build of torch lacks,
// so linking against it would keep this library from loading there.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return reinterpret_cast<Function>(
        torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (function == nullptr || function(device, &stream) != 0) {
    throw std::runtime_error("lrq: torch does not tell its current CUDA stream");
  }
  return static_cast<cudaStream_t>(stream);
}

}  // namespace lrq
