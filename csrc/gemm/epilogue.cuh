// int32 accumulators -> output values, in a fixed order of float operations, and their store.
//
//     y = fma(rn(float(acc) * x_scale[m]), weight_scale[n], bias[n])
//     y = gelu_tanh(y)                                                 optional
//     y = fma(gate[sample, n], y, residual[m, n])                      optional
//     out = rn(y)
//
// Operations are spelled as intrinsics, which no compiler flag contracts or reorders, so the result
// equals the CPU reference bit for bit (GELU aside) and does not depend on the tile configuration:
// dequantize_sum, gelu_tanh and add_residual are the only place that says them.
//
// A block (or a warpgroup of it) stages its accumulators in shared memory as [token][channel],
// since an mma accumulator holds channels down its rows and memory wants a token's channels side by
// side:
//
//     written  lane (g, t):  channel c0 + g, tokens 2t and 2t + 1
//     read     16 threads a token, 8 channels each, as two 16-byte halves
//
// Rows are padded by 4 words: 2t rows apart is 8t banks apart, so the 32 lanes of a write hit 32
// banks. In the upper 32 of every 64 channels the two 16-byte halves of an octet swap places, so
// that eight threads reading the same half of eight neighbouring octets hit all banks once.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../device/numeric.cuh"
#include "config.h"
#include "problem.h"

namespace lrq {

constexpr int kOctet = 8;  // channels whose 16-bit values are 16 bytes

LRQ_HOST_DEVICE constexpr int token_channel_to_staging(int token, int channel, int tile_n) {
  return token * (tile_n + kStagingPad) + (channel ^ (channel & 32) >> 3);
}

// True where every 8 channels of every operand are whole, aligned 16-byte pieces.
inline bool has_aligned_octets(const GemmArgs& args) {
  const int bytes = out_type_bytes(args.out_type);
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  return args.problem.n % kOctet == 0 && aligned(args.y) && aligned(args.weight_scale) &&
         aligned(args.bias) && aligned(args.residual) && aligned(args.gate) &&
         (args.residual == nullptr || args.residual_stride * bytes % 16 == 0) &&
         (args.gate == nullptr || args.gate_stride * bytes % 16 == 0);
}

// A bias that changes nothing: fma(a, b, -0) is rn(a * b) in every case, sign of zero included.
constexpr float kNoBias = -0.0f;

__device__ __forceinline__ float dequantize_sum(int acc, float x_scale, float weight_scale,
                                                float bias) {
  return __fmaf_rn(__fmul_rn(__int2float_rn(acc), x_scale), weight_scale, bias);
}

// y / (1 + exp(-2u)) = y (1 + tanh u) / 2, u = sqrt(2/pi) (y + 0.044715 y^3), without the
// cancellation of 1 + tanh u for negative u. Where the result is rounded to 16 bits, the hardware's
// approximations, wrong by 2^-21 at most together, vanish in that: five instructions at full rate
// and two at an eighth. Every kernel of a device gives the same bits, as both are the hardware's
// own.
template <typename Out>
__device__ __forceinline__ float gelu_tanh(float y) {
  constexpr float kSqrt2OverPi = 0.7978845608028654f;
  constexpr float kLinear = -2.302208198f;  // -2 sqrt(2/pi) log2(e)
  constexpr float kCubic = -0.1029432397f;  // 0.044715 of it
  if constexpr (std::is_same_v<Out, float>) {
    const float u = kSqrt2OverPi * fmaf(0.044715f * y * y, y, y);
    return __fdiv_rn(y, 1.0f + expf(-2.0f * u));
  } else {
    const float exponent = __fmul_rn(y, __fmaf_rn(__fmul_rn(y, y), kCubic, kLinear));
    return __fmul_rn(y, approximate_rcp(__fadd_rn(1.0f, approximate_exp2(exponent))));
  }
}

// A gate of 1 changes nothing: fma(1, y, residual) is rn(y + residual).
__device__ __forceinline__ float add_residual(float y, float gate, float residual) {
  return __fmaf_rn(gate, y, residual);
}

// kCount neighbours, of which `count` exist; `aligned` says that all do, as one aligned piece.
template <int kCount, typename T>
__device__ __forceinline__ Pack<T, kCount> load_piece(const T* source, int count, bool aligned) {
  if (aligned) {
    return *reinterpret_cast<const Pack<T, kCount>*>(source);
  }
  Pack<T, kCount> piece = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) {
      piece.value[i] = source[i];
    }
  }
  return piece;
}

template <typename T, int kCount>
__device__ __forceinline__ void store_piece(T* target, const Pack<T, kCount>& piece, int count,
                                            bool aligned) {
  if (aligned) {
    store_pack(target, piece);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) {
      target[i] = piece.value[i];
    }
  }
}

template <int kCount>
__device__ __forceinline__ Pack<int, kCount> load_staged(const int* staging, int token, int channel,
                                                         int tile_n) {
  Pack<int, kCount> sums;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const int4 four = *reinterpret_cast<const int4*>(
        staging + token_channel_to_staging(token, channel + i, tile_n));
    sums.value[i] = four.x;
    sums.value[i + 1] = four.y;
    sums.value[i + 2] = four.z;
    sums.value[i + 3] = four.w;
  }
  return sums;
}

// Sums of a tile as they are staged in this block's shared memory. What store_tile reads sums from
// loads `channel` and its neighbours of kBatch tokens, all of them before the first is used.
template <int kTileN>
struct StagedSums {
  static constexpr int kBatch = 1;
  const int* staging;

  template <int kCount>
  __device__ __forceinline__ void load(Pack<int, kCount> (&sums)[kBatch],
                                       const int (&token)[kBatch], int channel) const {
    sums[0] = load_staged<kCount>(staging, token[0], channel, kTileN);
  }
};

// Writes `tokens` tokens x kTileN channels whose first element is y[m0, n0], without what lies past
// M and N. Called by kThreads threads, numbered by `thread`, after the sums are complete. A thread
// handles kPiece channels at a time: 8, or 4 where registers are short.
template <typename Out, int kTileN, int kThreads, int kPiece, typename Sums>
__device__ __forceinline__ void store_tile(const Sums& sums, const GemmArgs& args, int64_t m0,
                                           int64_t n0, int tokens_of_tile, int thread,
                                           bool aligned) {
  constexpr int kPiecesPerToken = kTileN / kPiece;
  constexpr int kTokensPerPass = kThreads / kPiecesPerToken;
  const int channel = thread % kPiecesPerToken * kPiece;
  const int64_t n = n0 + channel;
  if (n >= args.problem.n) {
    return;
  }
  const int count = static_cast<int>(min_of<int64_t>(kPiece, args.problem.n - n));
  const int tokens = static_cast<int>(min_of<int64_t>(tokens_of_tile, args.problem.m - m0));
  Out* const y = static_cast<Out*>(args.y) + m0 * args.problem.n + n;

  Pack<float, kPiece> weight_scale = {};
  Pack<float, kPiece> bias = {};
  if constexpr (!std::is_same_v<Out, int>) {
    weight_scale = load_piece<kPiece>(args.weight_scale + n, count, aligned);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      bias.value[i] = kNoBias;
    }
    if (args.bias != nullptr) {
      bias = load_piece<kPiece>(args.bias + n, count, aligned);
    }
  }

  const auto write_token = [&](int token, const Pack<int, kPiece>& acc, float x_scale) {
    Out* const target = y + token * args.problem.n;
    if constexpr (std::is_same_v<Out, int>) {
      store_piece(target, acc, count, aligned);
    } else {
      const int64_t m = m0 + token;
      float value[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        value[i] = dequantize_sum(acc.value[i], x_scale, weight_scale.value[i], bias.value[i]);
      }
      if (args.activation == Activation::kGeluTanh) {
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          value[i] = gelu_tanh<Out>(value[i]);
        }
      }
      if (args.residual != nullptr) {
        const Out* source = static_cast<const Out*>(args.residual) + m * args.residual_stride + n;
        const Pack<Out, kPiece> residual = load_piece<kPiece>(source, count, aligned);
        Pack<Out, kPiece> gate;
        if (args.gate != nullptr) {
          const int64_t sample =
              static_cast<uint32_t>(m) / static_cast<uint32_t>(args.tokens_per_sample);
          gate = load_piece<kPiece>(
              static_cast<const Out*>(args.gate) + sample * args.gate_stride + n, count, aligned);
        } else {
#pragma unroll
          for (int i = 0; i < kPiece; ++i) {
            gate.value[i] = round_to<Out>(1.0f);
          }
        }
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          value[i] = add_residual(value[i], to_float(gate.value[i]), to_float(residual.value[i]));
        }
      }
      Pack<Out, kPiece> rounded;
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        rounded.value[i] = round_to<Out>(value[i]);
      }
      store_piece(target, rounded, count, aligned);
    }
  };

  constexpr int kBatch = Sums::kBatch;
#pragma unroll 1
  for (int first = thread / kPiecesPerToken; first < tokens; first += kBatch * kTokensPerPass) {
    Pack<int, kPiece> acc[kBatch];
    int token[kBatch];
    float x_scale[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      token[i] = min_of(first + i * kTokensPerPass, tokens - 1);  // the last, again, past the end
      if constexpr (!std::is_same_v<Out, int>) {
        x_scale[i] = args.x_scale[m0 + token[i]];
      }
    }
    sums.load(acc, token, channel);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (kBatch == 1 || first + i * kTokensPerPass < tokens) {
        write_token(token[i], acc[i], x_scale[i]);
      }
    }
  }
}

// store_tile for the output type that the arguments name.
template <int kTileN, int kThreads, int kPiece = kOctet, typename Sums>
__device__ __forceinline__ void store_tile_as(const Sums& sums, const GemmArgs& args, int64_t m0,
                                              int64_t n0, int tokens, int thread, bool aligned) {
  const auto store = [&](auto out) {
    store_tile<decltype(out), kTileN, kThreads, kPiece>(sums, args, m0, n0, tokens, thread,
                                                        aligned);
  };
  switch (args.out_type) {
    case OutType::kBFloat16:
      store(__nv_bfloat16{});
      break;
    case OutType::kFloat16:
      store(__half{});
      break;
    case OutType::kFloat32:
      store(float{});
      break;
    case OutType::kInt32:
      store(int{});
      break;
  }
}

}  // namespace lrq
