// int32 accumulators -> output values, in a fixed order of float operations, and their store.
//
//     y = fma(rn(float(acc) * x_scale[m]), weight_scale[n], bias[n])
//     y = gelu_tanh(y)                                                 optional
//     y = fma(gate[sample, n], y, residual[m, n])                      optional
//     out = rn(y)
//
// Operations are spelled as intrinsics, which no compiler flag contracts or reorders, so the result
// equals the CPU reference bit for bit (GELU aside) and does not depend on the tile configuration.
//
// A block stages its accumulators in shared memory as [token][channel], since an mma accumulator
// holds channels down its rows and memory wants a token's channels side by side:
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

constexpr int kOctet = 8;  // channels of one thread

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

// y / (1 + exp(-2u)) = y (1 + tanh u) / 2, u = sqrt(2/pi) (y + 0.044715 y^3), without the
// cancellation of 1 + tanh u for negative u.
__device__ __forceinline__ float gelu_tanh(float y) {
  constexpr float kSqrt2OverPi = 0.7978845608028654f;
  const float u = kSqrt2OverPi * fmaf(0.044715f * y * y, y, y);
  return __fdiv_rn(y, 1.0f + expf(-2.0f * u));
}

// Eight neighbours, of which `count` exist; `aligned` says that they are 8 and a 16-byte access.
template <typename T>
__device__ __forceinline__ Pack<T, kOctet> load_octet(const T* source, int count, bool aligned) {
  if (aligned) {
    return *reinterpret_cast<const Pack<T, kOctet>*>(source);
  }
  Pack<T, kOctet> octet = {};
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (i < count) {
      octet.value[i] = source[i];
    }
  }
  return octet;
}

template <typename T>
__device__ __forceinline__ void store_octet(T* target, const Pack<T, kOctet>& octet, int count,
                                            bool aligned) {
  if (aligned) {
    store_pack(target, octet);
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (i < count) {
      target[i] = octet.value[i];
    }
  }
}

__device__ __forceinline__ Pack<int, kOctet> load_staged(const int* staging, int token, int channel,
                                                         int tile_n) {
  const int4 low =
      *reinterpret_cast<const int4*>(staging + token_channel_to_staging(token, channel, tile_n));
  const int4 high = *reinterpret_cast<const int4*>(
      staging + token_channel_to_staging(token, channel + 4, tile_n));
  return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
}

// Writes a staged tile of kTileM tokens x kTileN channels whose first element is y[m0, n0]. Called
// by all kThreads threads of a block after the staging is complete.
template <typename Out, int kTileM, int kTileN, int kThreads>
__device__ __forceinline__ void store_tile(const int* staging, const GemmArgs& args, int64_t m0,
                                           int64_t n0, bool aligned) {
  constexpr int kOctetsPerToken = kTileN / kOctet;
  constexpr int kTokensPerPass = kThreads / kOctetsPerToken;
  const int channel = threadIdx.x % kOctetsPerToken * kOctet;
  const int64_t n = n0 + channel;
  if (n >= args.problem.n) {
    return;
  }
  const int count = static_cast<int>(min_of<int64_t>(kOctet, args.problem.n - n));
  const int tokens = static_cast<int>(min_of<int64_t>(kTileM, args.problem.m - m0));
  Out* const y = static_cast<Out*>(args.y) + m0 * args.problem.n + n;

  Pack<float, kOctet> weight_scale = {};
  Pack<float, kOctet> bias = {};
  if constexpr (!std::is_same_v<Out, int>) {
    weight_scale = load_octet(args.weight_scale + n, count, aligned);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      bias.value[i] = -0.0f;  // fma(a, b, -0) is rn(a * b) in every case, sign of zero included
    }
    if (args.bias != nullptr) {
      bias = load_octet(args.bias + n, count, aligned);
    }
  }

#pragma unroll 1
  for (int token = threadIdx.x / kOctetsPerToken; token < tokens; token += kTokensPerPass) {
    const Pack<int, kOctet> acc = load_staged(staging, token, channel, kTileN);
    Out* const target = y + token * args.problem.n;
    if constexpr (std::is_same_v<Out, int>) {
      store_octet(target, acc, count, aligned);
    } else {
      const int64_t m = m0 + token;
      const float x_scale = args.x_scale[m];
      float value[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const float scaled = __fmul_rn(__int2float_rn(acc.value[i]), x_scale);
        value[i] = __fmaf_rn(scaled, weight_scale.value[i], bias.value[i]);
      }
      if (args.activation == Activation::kGeluTanh) {
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
          value[i] = gelu_tanh(value[i]);
        }
      }
      if (args.residual != nullptr) {
        const Out* source = static_cast<const Out*>(args.residual) + m * args.residual_stride + n;
        const Pack<Out, kOctet> residual = load_octet(source, count, aligned);
        Pack<Out, kOctet> gate;
        if (args.gate != nullptr) {
          const int64_t sample =
              static_cast<uint32_t>(m) / static_cast<uint32_t>(args.tokens_per_sample);
          gate = load_octet(static_cast<const Out*>(args.gate) + sample * args.gate_stride + n,
                            count, aligned);
        } else {
#pragma unroll
          for (int i = 0; i < kOctet; ++i) {
            gate.value[i] = round_to<Out>(1.0f);  // fma(1, y, residual) is rn(y + residual)
          }
        }
#pragma unroll
        for (int i = 0; i < kOctet; ++i) {
          value[i] = __fmaf_rn(to_float(gate.value[i]), value[i], to_float(residual.value[i]));
        }
      }
      Pack<Out, kOctet> rounded;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        rounded.value[i] = round_to<Out>(value[i]);
      }
      store_octet(target, rounded, count, aligned);
    }
  }
}

// store_tile for the output type that the arguments name.
template <int kTileM, int kTileN, int kThreads>
__device__ __forceinline__ void store_tile_as(const int* staging, const GemmArgs& args, int64_t m0,
                                              int64_t n0, bool aligned) {
  switch (args.out_type) {
    case OutType::kBFloat16:
      store_tile<__nv_bfloat16, kTileM, kTileN, kThreads>(staging, args, m0, n0, aligned);
      break;
    case OutType::kFloat16:
      store_tile<__half, kTileM, kTileN, kThreads>(staging, args, m0, n0, aligned);
      break;
    case OutType::kFloat32:
      store_tile<float, kTileM, kTileN, kThreads>(staging, args, m0, n0, aligned);
      break;
    case OutType::kInt32:
      store_tile<int, kTileM, kTileN, kThreads>(staging, args, m0, n0, aligned);
      break;
  }
}

}  // namespace lrq
