// What a GEMM is asked to do: sizes for the planner, pointers for the kernel. No torch, no kernels.
//
//     y[m, n] = epilogue(sum_k x_q[m, k] * levels[table_of_row[n], code[n, k]])
#pragma once

#include <cstdint>

#include "../out_type.h"

namespace lrq {

// Sizes alone, enough to choose a configuration.
struct GemmProblem {
  int64_t m;  // tokens
  int64_t n;  // out_features
  int64_t k;  // in_features
  int weight_bits;
};

enum class Activation : int { kNone, kGeluTanh };

// Device pointers and strides (in elements). Absent operands are null.
struct GemmArgs {
  GemmProblem problem;
  const int8_t* x_q;            // [M, K], rows 16-byte aligned
  int64_t x_stride;             // multiple of 16
  const float* x_scale;         // [M]
  const uint32_t* weight;       // packed, layout/packed_weight.h
  const int8_t* levels;         // canonical order [T, 2^bits], rows aligned to their size
  const uint8_t* table_of_row;  // [N], the table of each row, below T; null: T = N, its own
  const float* weight_scale;    // [N]
  const float* bias;            // [N]
  const void* residual;         // [M, N] of out_type
  int64_t residual_stride;
  const void* gate;  // [B, N] of out_type
  int64_t gate_stride;
  int64_t tokens_per_sample;  // M / B, at least 1
  Activation activation;
  OutType out_type;
  void* y;  // [M, N], contiguous
};

// Product with 16-bit activations: y = x * (levels * scale)^T + bias.
struct A16Args {
  GemmProblem problem;
  const void* x;  // [M, K] of type
  int64_t x_stride;
  const uint32_t* weight;
  const int8_t* levels;         // as in GemmArgs
  const uint8_t* table_of_row;  // as in GemmArgs
  const float* weight_scale;
  const float* bias;
  OutType type;  // of x and y: bf16 or fp16
  void* y;       // [M, N], contiguous
  int tile;      // of kA16Tiles (plan_a16.h)
};

constexpr int kGemvMaxTokens = 16;

}  // namespace lrq
