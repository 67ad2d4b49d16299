// CUDA kernels of lrq::{prepack, unprepack, dequantize, gemm, gemm_config, gemv, gemm_a16,
// _rotate_rows}: check, fill a struct, launch.
// The only file that sees tensors. Schemas, fakes and CPU kernels are in lrq_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "gemm/config.h"
#include "gemm/launch.h"
#include "gemm/plan_a16.h"
#include "gemm/problem.h"
#include "layout/packed_weight.h"
#include "layout/prepack.h"
#include "rotate/launch.h"
#include "rotate/rotate_quantize.h"
#include "torch_utils.h"

namespace lrq {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check_weight_bits(const char* op, int64_t weight_bits) {
  LRQ_CHECK(weight_bits >= 2 && weight_bits <= 4, (Argument{op, "weight_bits"}), "one of (2, 3, 4)",
            std::to_string(weight_bits));
}

void check_size(const char* op, const char* name, int64_t size) {
  LRQ_CHECK(size >= 0 && size <= kLargestSize, (Argument{op, name}),
            "in [0, " + std::to_string(kLargestSize) + "]", std::to_string(size));
}

// The packed weight of [out_features, in_features], on the device of `first`.
void check_weight(const char* op, const Tensor& weight, int64_t out_features, int64_t in_features,
                  int64_t weight_bits, const Tensor& first) {
  check_weight_bits(op, weight_bits);
  check_size(op, "out_features", out_features);
  check_size(op, "in_features", in_features);
  check_tensor({op, "weight"}, weight, ScalarType::Int,
               {ceil_div<int64_t>(out_features, kTileChannels),
                ceil_div<int64_t>(in_features, kTileInputs), 2, 256 * weight_bits},
               first);
  check_aligned({op, "weight"}, weight, 16);
}

constexpr int64_t kMaxSharedTables = 256;  // that one byte tells apart

// What codes of a weight stand for: int8 levels [N, 2^bits], or [T, 2^bits] with the table of each
// row, uint8 [N], whose values are not looked at here; and the scale of each row, fp32 [N].
struct Codebook {
  const Tensor& levels;
  const Tensor& weight_scale;
  const std::optional<Tensor>& table_of_row;
};

void check_codebook(const char* op, const Codebook& codebook, int64_t out_features,
                    int64_t weight_bits, const Tensor& first) {
  const int64_t level_count = int64_t{1} << weight_bits;
  const Argument of_levels{op, "levels"};
  int64_t tables = out_features;
  if (codebook.table_of_row.has_value()) {
    LRQ_CHECK(codebook.levels.dim() == 2 && codebook.levels.size(0) >= 1 &&
                  codebook.levels.size(0) <= kMaxSharedTables,
              of_levels, "[T, " + std::to_string(level_count) + "] with T from 1 to 256",
              "shape " + list_text(codebook.levels.sizes()));
    tables = codebook.levels.size(0);
    check_tensor({op, "table_of_row"}, *codebook.table_of_row, ScalarType::Byte, {out_features},
                 first);
  }
  check_tensor(of_levels, codebook.levels, ScalarType::Char, {tables, level_count}, first);
  check_aligned(of_levels, codebook.levels, level_count);
  check_tensor({op, "weight_scale"}, codebook.weight_scale, ScalarType::Float, {out_features},
               first);
}

void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t out_features,
                const Tensor& first) {
  if (bias.has_value()) {
    check_tensor({op, "bias"}, *bias, ScalarType::Float, {out_features}, first);
  }
}

Tensor prepack(const Tensor& codes, int64_t in_features, int64_t weight_bits) {
  constexpr const char* kOp = "prepack";
  check_weight_bits(kOp, weight_bits);
  check_size(kOp, "in_features", in_features);
  LRQ_CHECK(codes.dim() == 2, (Argument{kOp, "codes"}), "[N, ceil(K/32)*weight_bits]",
            "shape " + list_text(codes.sizes()));
  const int64_t n = codes.size(0);
  check_size(kOp, "N", n);
  check_tensor({kOp, "codes"}, codes, ScalarType::Int,
               {n, ceil_div<int64_t>(in_features, kCanonicalRun) * weight_bits}, codes);

  const int32_t device = codes.get_device_index();
  const DeviceGuard guard(device);
  device_arch(kOp, device);
  Tensor weight = torch::stable::new_empty(
      codes, {ceil_div<int64_t>(n, kTileChannels), ceil_div<int64_t>(in_features, kTileInputs), 2,
              256 * weight_bits});
  if (weight.numel() == 0) {
    return weight;
  }
  PrepackArgs args;
  args.codes = const_pointer<uint32_t>(codes);
  args.weight = static_cast<uint32_t*>(weight.mutable_data_ptr());
  args.n = n;
  args.k = in_features;
  args.bits = static_cast<int>(weight_bits);
  check_cuda(kOp, launch_prepack(args, current_stream(device)));
  return weight;
}

Tensor unprepack(const Tensor& weight, int64_t out_features, int64_t in_features,
                 int64_t weight_bits) {
  constexpr const char* kOp = "unprepack";
  check_weight(kOp, weight, out_features, in_features, weight_bits, weight);

  const int32_t device = weight.get_device_index();
  const DeviceGuard guard(device);
  device_arch(kOp, device);
  Tensor codes = torch::stable::new_empty(
      weight, {out_features, ceil_div<int64_t>(in_features, kCanonicalRun) * weight_bits});
  if (codes.numel() == 0) {
    return codes;
  }
  UnprepackArgs args;
  args.weight = const_pointer<uint32_t>(weight);
  args.codes = static_cast<uint32_t*>(codes.mutable_data_ptr());
  args.n = out_features;
  args.k = in_features;
  args.bits = static_cast<int>(weight_bits);
  check_cuda(kOp, launch_unprepack(args, current_stream(device)));
  return codes;
}

Tensor dequantize(const Tensor& weight, const Tensor& levels, const Tensor& weight_scale,
                  int64_t out_features, int64_t in_features, int64_t weight_bits,
                  ScalarType out_dtype, const std::optional<Tensor>& table_of_row) {
  constexpr const char* kOp = "dequantize";
  const std::optional<OutType> out_type = out_type_of(out_dtype);
  LRQ_CHECK(out_type.has_value() && *out_type != OutType::kInt32, (Argument{kOp, "out_dtype"}),
            "one of (torch.bfloat16, torch.float16, torch.float32)", dtype_text(out_dtype));
  check_weight(kOp, weight, out_features, in_features, weight_bits, weight);
  check_codebook(kOp, {levels, weight_scale, table_of_row}, out_features, weight_bits, weight);

  const int32_t device = weight.get_device_index();
  const DeviceGuard guard(device);
  device_arch(kOp, device);
  Tensor out = torch::stable::new_empty(weight, {out_features, in_features}, out_dtype);
  if (out.numel() == 0) {
    return out;
  }
  DequantizeArgs args;
  args.weight = const_pointer<uint32_t>(weight);
  args.levels = const_pointer<int8_t>(levels);
  args.table_of_row = const_pointer<uint8_t>(table_of_row);
  args.scale = const_pointer<float>(weight_scale);
  args.out = out.mutable_data_ptr();
  args.n = out_features;
  args.k = in_features;
  args.bits = static_cast<int>(weight_bits);
  args.out_type = *out_type;
  check_cuda(kOp, launch_dequantize(args, current_stream(device)));
  return out;
}

// int8 [M, K] whose rows cp.async can read in 16-byte pieces.
void check_x_q(const char* op, const Tensor& x_q) {
  const Argument argument{op, "x_q"};
  LRQ_CHECK(x_q.scalar_type() == ScalarType::Char && x_q.dim() == 2, argument, "torch.int8 [M, K]",
            tensor_text(x_q));
  check_size(op, "M", x_q.size(0));
  if (x_q.numel() > 0) {
    const bool unit = x_q.size(1) == 1 || x_q.stride(1) == 1;
    const bool steps = x_q.size(0) == 1 || x_q.stride(0) % 16 == 0;
    LRQ_CHECK(unit && steps, argument, "of strides [multiple of 16, 1]", strides_text(x_q));
    LRQ_CHECK(x_q.size(0) == 1 || x_q.stride(0) <= kLargestRowStride, argument,
              "of a row stride of at most " + std::to_string(kLargestRowStride), strides_text(x_q));
    check_aligned(argument, x_q, 16);
  }
}

// residual [M, N] and gate [B, N] of the output's dtype, rows contiguous; B divides M.
void check_residual_and_gate(const char* op, const std::optional<Tensor>& residual,
                             const std::optional<Tensor>& gate, ScalarType out_dtype, int64_t m,
                             int64_t n, const Tensor& first) {
  LRQ_CHECK(residual.has_value() || !gate.has_value(), (Argument{op, "gate"}),
            "given together with residual", "gate without residual");
  if (!residual.has_value()) {
    return;
  }
  const Argument of_residual{op, "residual"};
  check_type_and_shape(of_residual, *residual, out_dtype, {m, n});
  check_same_device(of_residual, *residual, first);
  check_rows(of_residual, *residual);
  if (!gate.has_value()) {
    return;
  }
  const Argument of_gate{op, "gate"};
  LRQ_CHECK(gate->dim() == 2 && gate->size(0) > 0 && m % gate->size(0) == 0, of_gate,
            "[B, N] with B a divisor of M = " + std::to_string(m),
            "shape " + list_text(gate->sizes()));
  check_type_and_shape(of_gate, *gate, out_dtype, {gate->size(0), n});
  check_same_device(of_gate, *gate, first);
  check_rows(of_gate, *gate);
}

// lrq::gemm, and lrq::gemm_config where `config` is a row of kGemmConfigs.
Tensor run_gemm(const char* op, const Tensor& x_q, const Tensor& x_scale, const Tensor& weight,
                const Codebook& codebook, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& residual, const std::optional<Tensor>& gate,
                int64_t weight_bits, int64_t out_features, const std::string& activation,
                ScalarType out_dtype, std::optional<int64_t> config) {
  LRQ_CHECK(!config.has_value() || (*config >= 0 && *config < kGemmConfigCount),
            (Argument{op, "config"}), "in [0, " + std::to_string(kGemmConfigCount - 1) + "]",
            std::to_string(*config));
  check_x_q(op, x_q);
  const int64_t m = x_q.size(0);
  const int64_t k = x_q.size(1);
  LRQ_CHECK(activation == "none" || activation == "gelu_tanh", (Argument{op, "activation"}),
            "one of ('none', 'gelu_tanh')", "'" + activation + "'");
  const std::optional<OutType> out_type = out_type_of(out_dtype);
  LRQ_CHECK(out_type.has_value(), (Argument{op, "out_dtype"}),
            "one of (torch.bfloat16, torch.float16, torch.float32, torch.int32)",
            dtype_text(out_dtype));
  check_weight(op, weight, out_features, k, weight_bits, x_q);
  check_codebook(op, codebook, out_features, weight_bits, x_q);
  check_tensor({op, "x_scale"}, x_scale, ScalarType::Float, {m}, x_q);
  check_bias(op, bias, out_features, x_q);
  if (*out_type == OutType::kInt32) {
    LRQ_CHECK(activation == "none" && !bias.has_value(), (Argument{op, "out_dtype int32"}),
              "used without bias and activation", "one of them");
    LRQ_CHECK(!residual.has_value(), (Argument{op, "out_dtype int32"}), "used without residual",
              "a residual");
  }
  check_residual_and_gate(op, residual, gate, out_dtype, m, out_features, x_q);

  const int32_t device = x_q.get_device_index();
  const DeviceGuard guard(device);
  const int arch = device_arch(op, device);
  Tensor y = torch::stable::new_empty(x_q, {m, out_features}, out_dtype);
  if (y.numel() == 0) {
    return y;
  }
  GemmArgs args;
  args.problem = {m, out_features, k, static_cast<int>(weight_bits)};
  args.x_q = const_pointer<int8_t>(x_q);
  args.x_stride = m == 1 ? 0 : x_q.stride(0);
  args.x_scale = const_pointer<float>(x_scale);
  args.weight = const_pointer<uint32_t>(weight);
  args.levels = const_pointer<int8_t>(codebook.levels);
  args.table_of_row = const_pointer<uint8_t>(codebook.table_of_row);
  args.weight_scale = const_pointer<float>(codebook.weight_scale);
  args.bias = const_pointer<float>(bias);
  args.residual = const_pointer<void>(residual);
  args.residual_stride = residual.has_value() ? residual->stride(0) : 0;
  args.gate = const_pointer<void>(gate);
  args.gate_stride = gate.has_value() ? gate->stride(0) : 0;
  args.tokens_per_sample = gate.has_value() ? m / gate->size(0) : m;
  args.activation = activation == "none" ? Activation::kNone : Activation::kGeluTanh;
  args.out_type = *out_type;
  args.y = y.mutable_data_ptr();
  const GemmConfig& row =
      config.has_value() ? kGemmConfigs[*config] : select_gemm_config(args.problem, arch);
  LRQ_CHECK(is_legal(row, args.problem, arch), (Argument{op, "config"}),
            "legal for the problem on compute capability " + arch_name(arch), row.name);
  check_cuda(op, launch_gemm(args, row, current_stream(device)));
  return y;
}

Tensor gemm(const Tensor& x_q, const Tensor& x_scale, const Tensor& weight, const Tensor& levels,
            const Tensor& weight_scale, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& residual, const std::optional<Tensor>& gate,
            int64_t weight_bits, int64_t out_features, const std::string& activation,
            ScalarType out_dtype, const std::optional<Tensor>& table_of_row) {
  return run_gemm("gemm", x_q, x_scale, weight, {levels, weight_scale, table_of_row}, bias,
                  residual, gate, weight_bits, out_features, activation, out_dtype, std::nullopt);
}

Tensor gemm_config(const Tensor& x_q, const Tensor& x_scale, const Tensor& weight,
                   const Tensor& levels, const Tensor& weight_scale,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                   const std::optional<Tensor>& gate, int64_t weight_bits, int64_t out_features,
                   const std::string& activation, ScalarType out_dtype, int64_t config,
                   const std::optional<Tensor>& table_of_row) {
  return run_gemm("gemm_config", x_q, x_scale, weight, {levels, weight_scale, table_of_row}, bias,
                  residual, gate, weight_bits, out_features, activation, out_dtype, config);
}

// x [M, K] in 16 bits and its weight, as gemv and gemm_a16 take them.
void check_a16(const char* op, const Tensor& x, const Tensor& weight, const Codebook& codebook,
               const std::optional<Tensor>& bias, int64_t weight_bits, int64_t out_features) {
  check_rows({op, "x"}, x);
  check_size(op, "M", x.size(0));
  check_weight(op, weight, out_features, x.size(1), weight_bits, x);
  check_codebook(op, codebook, out_features, weight_bits, x);
  check_bias(op, bias, out_features, x);
}

A16Args a16_args(const Tensor& x, const Tensor& weight, const Codebook& codebook,
                 const std::optional<Tensor>& bias, int64_t weight_bits, int64_t out_features) {
  A16Args args;
  args.problem = {x.size(0), out_features, x.size(1), static_cast<int>(weight_bits)};
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.weight = const_pointer<uint32_t>(weight);
  args.levels = const_pointer<int8_t>(codebook.levels);
  args.table_of_row = const_pointer<uint8_t>(codebook.table_of_row);
  args.weight_scale = const_pointer<float>(codebook.weight_scale);
  args.bias = const_pointer<float>(bias);
  args.type = *out_type_of(x.scalar_type());
  args.y = nullptr;
  args.tile = 0;
  return args;
}

Tensor gemv(const Tensor& x, const Tensor& weight, const Tensor& levels, const Tensor& weight_scale,
            const std::optional<Tensor>& bias, int64_t weight_bits, int64_t out_features,
            const std::optional<Tensor>& table_of_row) {
  constexpr const char* kOp = "gemv";
  const ScalarType dtype = x.scalar_type();
  LRQ_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
            (Argument{kOp, "dtype of x on CUDA"}), "one of (torch.bfloat16, torch.float16)",
            dtype_text(dtype));
  LRQ_CHECK(x.dim() == 2 && x.size(0) <= kGemvMaxTokens, (Argument{kOp, "x"}),
            "[M, K] with M at most " + std::to_string(kGemvMaxTokens),
            "shape " + list_text(x.sizes()));
  const Codebook codebook = {levels, weight_scale, table_of_row};
  check_a16(kOp, x, weight, codebook, bias, weight_bits, out_features);

  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  device_arch(kOp, device);
  Tensor y = torch::stable::new_empty(x, {x.size(0), out_features});
  if (y.numel() == 0) {
    return y;
  }
  A16Args args = a16_args(x, weight, codebook, bias, weight_bits, out_features);
  args.y = y.mutable_data_ptr();
  check_cuda(kOp, launch_gemv(args, current_stream(device)));
  return y;
}

// gemv for few rows; for more a kernel of its own where there is one and it is the quicker way,
// dequantize and torch elsewhere.
Tensor gemm_a16(const Tensor& x, const Tensor& weight, const Tensor& levels,
                const Tensor& weight_scale, const std::optional<Tensor>& bias, int64_t weight_bits,
                int64_t out_features, int64_t tile, const std::optional<Tensor>& table_of_row) {
  constexpr const char* kOp = "gemm_a16";
  const ScalarType dtype = x.scalar_type();
  const bool wide = dtype == ScalarType::Float;
  LRQ_CHECK(wide || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
            (Argument{kOp, "dtype of x on CUDA"}),
            "one of (torch.bfloat16, torch.float16, torch.float32)", dtype_text(dtype));
  LRQ_CHECK(x.dim() == 2, (Argument{kOp, "x"}), "[M, K]", "shape " + list_text(x.sizes()));
  LRQ_CHECK(tile >= -1 && tile < kA16TileCount, (Argument{kOp, "tile"}),
            "in [-1, " + std::to_string(kA16TileCount - 1) + "]", std::to_string(tile));
  const Codebook codebook = {levels, weight_scale, table_of_row};
  check_a16(kOp, x, weight, codebook, bias, weight_bits, out_features);
  if (tile == -1 && !wide && x.size(0) <= kGemvMaxTokens) {
    return gemv(x, weight, levels, weight_scale, bias, weight_bits, out_features, table_of_row);
  }

  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const int arch = device_arch(kOp, device);
  A16Args args = a16_args(x, weight, codebook, bias, weight_bits, out_features);
  const bool has_kernel = !wide && has_gemm_a16(args, arch);
  LRQ_CHECK(has_kernel || tile == -1, (Argument{kOp, "tile"}),
            "-1 where dtype, alignment or GPU leave no kernel", std::to_string(tile));
  args.tile = static_cast<int>(tile);
  if (has_kernel && tile == -1) {
    args.tile = choose_a16_tile(args.problem, multiprocessors(kOp, device));
  }
  if (!has_kernel || args.tile == kA16Dequantize) {
    const Tensor dense = dequantize(weight, levels, weight_scale, out_features, x.size(1),
                                    weight_bits, dtype, table_of_row);
    std::optional<Tensor> narrow_bias;
    if (bias.has_value()) {
      narrow_bias = torch::stable::to(*bias, dtype);
    }
    return linear(x, dense, narrow_bias);
  }
  Tensor y = torch::stable::new_empty(x, {x.size(0), out_features});
  if (y.numel() == 0) {
    return y;
  }
  args.y = y.mutable_data_ptr();
  check_cuda(kOp, launch_gemm_a16(args, current_stream(device)));
  return y;
}

// ---- _rotate_rows -------------------------------------------------------------------------------

// x [M, K] or [B, T, K] as samples of evenly spaced tokens.
struct TokenRows {
  int64_t outer;  // 1, or B
  int64_t inner;  // M, or T
  int64_t outer_stride;
  int64_t inner_stride;

  explicit TokenRows(const Tensor& x)
      : outer(x.dim() == 3 ? x.size(0) : 1),
        inner(x.size(x.dim() - 2)),
        outer_stride(outer > 1 ? x.stride(0) : 0),
        inner_stride(inner > 1 ? x.stride(x.dim() - 2) : 0) {
    if (inner == 1 && outer > 1) {  // [B, 1, K]: the tokens are the samples
      inner = outer;
      inner_stride = outer_stride;
      outer = 1;
      outer_stride = 0;
    }
  }

  int64_t tokens() const { return outer * inner; }
  bool are_even() const { return outer == 1 || outer_stride == inner * inner_stride; }
};

void check_rotate_source(Argument argument, const Tensor& x, ScalarType dtype) {
  LRQ_CHECK(x.scalar_type() == dtype && (x.dim() == 2 || x.dim() == 3), argument,
            dtype_text(dtype) + " [M, K] or [B, T, K]", tensor_text(x));
  LRQ_CHECK(x.numel() == 0 || x.stride(x.dim() - 1) == 1, argument, "of last stride 1",
            strides_text(x));
}

// scale or shift [B, K], of x's dtype or fp32, B a divisor of the number of tokens.
void check_modulation(Argument argument, const std::optional<Tensor>& vectors, ScalarType dtype,
                      int64_t features, int64_t tokens, const Tensor& first) {
  if (!vectors.has_value()) {
    return;
  }
  const ScalarType own = vectors->scalar_type();
  LRQ_CHECK(own == dtype || own == ScalarType::Float, argument,
            "of dtype " + dtype_text(dtype) + " or torch.float32", dtype_text(own));
  LRQ_CHECK(
      vectors->dim() == 2 && vectors->size(0) > 0 && vectors->size(1) == features &&
          tokens % vectors->size(0) == 0,
      argument,
      "[B, " + std::to_string(features) + "] with B a divisor of M = " + std::to_string(tokens),
      "shape " + list_text(vectors->sizes()));
  check_same_device(argument, *vectors, first);
  check_rows(argument, *vectors);
}

SampleVectors sample_vectors(const std::optional<Tensor>& vectors) {
  if (!vectors.has_value()) {
    return {nullptr, 0, OutType::kFloat32};
  }
  return {vectors->const_data_ptr(), vectors->size(0) > 1 ? vectors->stride(0) : 0,
          *out_type_of(vectors->scalar_type())};
}

std::tuple<Tensor, Tensor> rotate_rows(const Tensor& x, const std::optional<Tensor>& second,
                                       const std::optional<Tensor>& scale,
                                       const std::optional<Tensor>& shift, const std::string& norm,
                                       double eps, const std::optional<Tensor>& channel_scale,
                                       int64_t block_size, int64_t act_bits,
                                       const std::string& scale_mode, double scale_factor) {
  constexpr const char* kOp = "_rotate_rows";
  const ScalarType dtype = x.scalar_type();
  LRQ_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
            (Argument{kOp, "dtype of x on CUDA"}), "one of (torch.bfloat16, torch.float16)",
            dtype_text(dtype));
  check_rotate_source({kOp, "x"}, x, dtype);
  LRQ_CHECK(norm == "none" || norm == "layer" || norm == "rms", (Argument{kOp, "norm"}),
            "one of ('none', 'layer', 'rms')", "'" + norm + "'");
  const bool with_norm = norm != "none";
  LRQ_CHECK(act_bits == 4 || act_bits == 8, (Argument{kOp, "act_bits"}), "one of (4, 8)",
            std::to_string(act_bits));
  LRQ_CHECK(scale_mode == "absmax" || scale_mode == "rms", (Argument{kOp, "scale_mode"}),
            "one of ('absmax', 'rms')", "'" + scale_mode + "'");
  LRQ_CHECK(scale_factor > 0 && std::isfinite(scale_factor), (Argument{kOp, "scale_factor"}),
            "positive and finite", std::to_string(scale_factor));
  const int64_t first_features = x.size(x.dim() - 1);
  int64_t features = first_features;
  if (second.has_value()) {
    check_rotate_source({kOp, "second"}, *second, dtype);
    bool same_rows = second->dim() == x.dim();
    for (int64_t dim = 0; same_rows && dim < x.dim() - 1; ++dim) {
      same_rows = second->size(dim) == x.size(dim);
    }
    LRQ_CHECK(same_rows, (Argument{kOp, "second"}), "of as many rows as x, " + list_text(x.sizes()),
              "shape " + list_text(second->sizes()));
    check_same_device({kOp, "second"}, *second, x);
    features += second->size(x.dim() - 1);
  }
  LRQ_CHECK(block_size >= 32 && block_size <= 1024 && (block_size & (block_size - 1)) == 0,
            (Argument{kOp, "block_size"}), "one of (32, 64, 128, 256, 512, 1024)",
            std::to_string(block_size));
  LRQ_CHECK(features % block_size == 0, (Argument{kOp, "K"}),
            "a multiple of block_size " + std::to_string(block_size), std::to_string(features));
  LRQ_CHECK(with_norm || (!scale.has_value() && !shift.has_value()),
            (Argument{kOp, "scale and shift"}), "given with a norm only", "norm 'none'");
  const TokenRows rows(x);
  const TokenRows second_rows(second.value_or(x));
  const int64_t tokens = rows.tokens();
  LRQ_CHECK(tokens <= kRotateMaxTokens, (Argument{kOp, "x"}),
            "of at most " + std::to_string(kRotateMaxTokens) + " rows", std::to_string(tokens));
  check_modulation({kOp, "scale"}, scale, dtype, features, tokens, x);
  check_modulation({kOp, "shift"}, shift, dtype, features, tokens, x);
  const int64_t scale_rows = scale.has_value() ? scale->size(0) : 1;
  const int64_t shift_rows = shift.has_value() ? shift->size(0) : 1;
  LRQ_CHECK(scale_rows == shift_rows || scale_rows == 1 || shift_rows == 1,
            (Argument{kOp, "shift"}), "of as many rows as scale, " + std::to_string(scale_rows),
            std::to_string(shift_rows));
  int64_t samples = max_of(scale_rows, shift_rows);
  if (channel_scale.has_value()) {
    check_tensor({kOp, "channel_scale"}, *channel_scale, ScalarType::BFloat16, {features}, x);
  }

  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  device_arch(kOp, device);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = features;
  Tensor x_q = torch::stable::new_empty(x, shape, ScalarType::Char);
  shape.pop_back();
  if (x_q.numel() == 0) {
    return {x_q, torch::stable::new_zeros(x, shape, ScalarType::Float)};
  }
  Tensor x_scale = torch::stable::new_empty(x, shape, ScalarType::Float);

  // Rows that are not evenly spaced from sample to sample are so within one.
  const bool even = rows.are_even() && second_rows.are_even();
  if (!even && samples == 1) {
    samples = rows.outer;
  }
  LRQ_CHECK(even || samples == rows.outer, (Argument{kOp, "x"}),
            "evenly spaced, or of as many samples as scale and shift", strides_text(x));

  RotateRowsArgs args = {};
  args.samples = samples;
  args.tokens = tokens / samples;
  uint64_t addresses = 0;
  int64_t row_stride = 0;
  const auto row_source = [&](const Tensor& source, const TokenRows& of) {
    const int64_t token_stride = of.inner_stride;
    const int64_t sample_stride = even ? args.tokens * token_stride : of.outer_stride;
    addresses |= reinterpret_cast<uintptr_t>(source.const_data_ptr()) |
                 static_cast<uint64_t>(2 * token_stride) | static_cast<uint64_t>(2 * sample_stride);
    row_stride = max_of(row_stride, token_stride);
    return RowSource{source.const_data_ptr(), sample_stride, static_cast<int>(token_stride),
                     static_cast<int>(source.size(source.dim() - 1))};
  };
  args.first = row_source(x, rows);
  if (second.has_value()) {
    args.second = row_source(*second, second_rows);
  }
  args.channel_scale = const_pointer<uint16_t>(channel_scale);
  addresses |= reinterpret_cast<uintptr_t>(args.channel_scale);
  LRQ_CHECK(supports_rotate_rows(first_features, features - first_features, block_size, row_stride,
                                 addresses),
            (Argument{kOp, "the problem"}), "one that _planner.supports_rotate_rows allows",
            tensor_text(x) + " with " + strides_text(x) + ", block_size " +
                std::to_string(block_size) + " and " + std::to_string(features) + " features");
  args.features = static_cast<int>(features);
  args.type = *out_type_of(dtype);
  args.norm = norm == "none"    ? TokenNorm::kNone
              : norm == "layer" ? TokenNorm::kLayer
                                : TokenNorm::kRms;
  args.eps = static_cast<float>(eps);
  args.scale = sample_vectors(scale);
  args.shift = sample_vectors(shift);
  args.block_size = static_cast<int>(block_size);
  args.hadamard_norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block_size)));
  args.inverse_features = static_cast<float>(1.0 / static_cast<double>(features));
  const double qmax = act_bits == 8 ? 127 : 7;
  args.qmax = static_cast<float>(qmax);
  args.rms = scale_mode == "rms";
  args.clamp = args.rms || scale_factor < 1;
  args.step_factor = static_cast<float>(args.rms ? scale_factor : scale_factor / qmax);
  args.x_q = static_cast<int8_t*>(x_q.mutable_data_ptr());
  args.x_scale = static_cast<float*>(x_scale.mutable_data_ptr());
  check_cuda(kOp, launch_rotate_rows(args, current_stream(device)));
  return {x_q, x_scale};
}

}  // namespace
}  // namespace lrq

STABLE_TORCH_LIBRARY_IMPL(lrq, CUDA, m) {
  m.impl("prepack", TORCH_BOX(&lrq::prepack));
  m.impl("unprepack", TORCH_BOX(&lrq::unprepack));
  m.impl("dequantize", TORCH_BOX(&lrq::dequantize));
  m.impl("gemm", TORCH_BOX(&lrq::gemm));
  m.impl("gemm_config", TORCH_BOX(&lrq::gemm_config));
  m.impl("gemv", TORCH_BOX(&lrq::gemv));
  m.impl("gemm_a16", TORCH_BOX(&lrq::gemm_a16));
  m.impl("_rotate_rows", TORCH_BOX(&lrq::rotate_rows));
}
