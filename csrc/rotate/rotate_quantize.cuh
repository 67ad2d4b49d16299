// (LayerNorm or RMSNorm, modulation) -> channel scale -> block Hadamard -> int8 codes, one token in
// the registers of a group of lanes (rotate_quantize.h). Bound by memory: 3 bytes of an element, in
// whose time an H200 at full bandwidth issues 21 instructions of a lane.
//
// Every stage of the transform is fp32 additions. Tensor cores do four stages in one mma, but only
// on parts of a value: as tf32 it goes in as hi + lo, and splitting costs what the stages cost (20
// instructions an element in all, and 64 registers). bf16 x itself would be exact, but the channel
// scale comes first, so the matrix would differ from block to block. Instructions per element:
//
//     unpack   scale, bit 0   5 stages, 1 exchange   bit 4   max  fma  bytes   memory   rest
//       1          1.5                5.5              2       1    1   0.75     0.44    4.4
//
// Next to memory, the L1 cache and the shuffles, which share a unit, are the limit: about 160
// cycles for 1024 elements (8 for each load or store of a warp, for it touches 8 lines; 1 for a
// shuffle), of which 64 go to the channel scale. NOTES.md has what was tried.
#pragma once

#include <type_traits>

#include "../device/numeric.cuh"
#include "rotate_quantize.h"

namespace lrq {

// fp32 has unit spacing just above 1.5 * 2^23: adding it rounds half to even, and the low byte of
// the sum is the rounded integer in two's complement.
constexpr float kRoundingMagic = 12582912.0f;

// Of 128 values, for a norm.
struct UnitMoments {
  float mean;
  float squares;  // of deviations from the mean
};

struct RotateShared {
  float size[2]
            [kRotateMaxUnits];  // of warps, or of units where tokens share a warp; tokens in turn
  UnitMoments moments[kRotateMaxUnits];  // with a norm only
};

// ---- reductions ---------------------------------------------------------------------------------

__device__ __forceinline__ float other_lane(float value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// Over `kLanes` neighbour lanes: a warp or a unit.
template <int kLanes>
__device__ __forceinline__ float lanes_sum(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += other_lane(value, distance);
  }
  return value;
}

// Of non-negative numbers: their bits sort like they do, and NaN above infinity.
template <int kLanes>
__device__ __forceinline__ float lanes_max(float value) {
  if constexpr (kLanes == 32) {
    return __uint_as_float(reduce_max_u32(__float_as_uint(value)));
  } else {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      value = max_or_nan(value, other_lane(value, distance));
    }
    return value;
  }
}

// The lanes that reduce together before shared memory, and read it together after: a warp of one
// token, or a unit. Each group writes one value.
template <bool kShareWarps>
struct TokenLanes {
  static constexpr int kLanes = kShareWarps ? kUnitLanes : 32;
  int lane;         // in the group
  int group;        // in the thread block
  int first_group;  // of the token
  int groups;

  template <bool kMax>
  __device__ __forceinline__ static float reduce(float value) {
    return kMax ? lanes_max<kLanes>(value) : lanes_sum<kLanes>(value);
  }

  template <bool kMax>
  __device__ __forceinline__ float reduce_token(float value, float* exchange) const {
    value = reduce<kMax>(value);
    if (groups == 1) {
      return value;
    }
    if (lane == 0) {
      exchange[group] = value;
    }
    __syncthreads();
    float all = 0.0f;
    if constexpr (kShareWarps) {
#pragma unroll 1
      for (int i = lane; i < groups; i += kLanes) {
        const float one = exchange[first_group + i];
        all = kMax ? max_or_nan(all, one) : all + one;
      }
    } else {
      all = lane < groups ? exchange[lane] : 0.0f;
    }
    return reduce<kMax>(all);
  }
};

// ---- 16-bit values ------------------------------------------------------------------------------

// Low and high half of a word.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word);

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) {
  __half2 halves;
  memcpy(&halves, &word, sizeof(halves));
  return __half22float2(halves);
}

template <typename T>
__device__ __forceinline__ void unpack_chunk(float (&v)[kChunkElements], uint4 raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(words[i]);
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ void load_chunk(float (&v)[kChunkElements], const float* source) {
  const float4 low = __ldg(reinterpret_cast<const float4*>(source));
  const float4 high = __ldg(reinterpret_cast<const float4*>(source) + 1);
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// A lane's 32 values of a token, in memory and in registers.
using RawChunks = uint4[kChunks];
using LaneValues = float[kChunks][kChunkElements];

template <typename Use>
__device__ __forceinline__ void for_each_value(LaneValues& v, Use use) {
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int e = 0; e < kChunkElements; ++e) {
      use(v[chunk][e]);
    }
  }
}

// ---- norm ---------------------------------------------------------------------------------------

// v becomes norm(v). Each unit subtracts its own mean before it squares, so that a large mean costs
// no digits and one barrier is enough: with units of 128 and their means m_u,
//     mean = avg(m_u),   K variance = sum(squares_u) + 128 sum((m_u - mean)^2).
// The unit's mean leaves v with the last step: (v - m_u) rstd + (m_u - mean) rstd.
template <bool kShareWarps>
__device__ __forceinline__ void normalize(LaneValues& v, int unit, int units,
                                          TokenLanes<kShareWarps> token, UnitMoments* moments,
                                          const RotateRowsArgs& args) {
  using Lanes = TokenLanes<kShareWarps>;
  UnitMoments own = {0.0f, 0.0f};
  if (args.norm == TokenNorm::kLayer) {
    for_each_value(v, [&](float x) { own.mean += x; });
    own.mean = lanes_sum<kUnitLanes>(own.mean) * (1.0f / kTransform);
    for_each_value(v, [&](float& x) { x -= own.mean; });
  }
  for_each_value(v, [&](float x) { own.squares = fmaf(x, x, own.squares); });
  own.squares = lanes_sum<kUnitLanes>(own.squares);
  if (threadIdx.x % kUnitLanes == 0) {
    moments[unit] = own;
  }
  __syncthreads();
  const UnitMoments* const of_token = moments + (kShareWarps ? token.first_group : 0);
  float mean = 0.0f;
  if (args.norm == TokenNorm::kLayer) {
#pragma unroll 1
    for (int i = token.lane; i < units; i += Lanes::kLanes) {
      mean += of_token[i].mean;
    }
    mean = lanes_sum<Lanes::kLanes>(mean) * (kTransform * args.inverse_features);
  }
  float squares = 0.0f;
#pragma unroll 1
  for (int i = token.lane; i < units; i += Lanes::kLanes) {
    const UnitMoments one = of_token[i];
    const float deviation = one.mean - mean;
    squares += fmaf(deviation * kTransform, deviation, one.squares);
  }
  squares = lanes_sum<Lanes::kLanes>(squares);
  const float rstd = rsqrtf(squares * args.inverse_features + args.eps);
  const float offset = (own.mean - mean) * rstd;
  for_each_value(v, [&](float& x) { x = fmaf(x, rstd, offset); });
}

__device__ __forceinline__ float sample_value(const SampleVectors& vectors, int64_t at) {
  switch (vectors.type) {
    case OutType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(vectors.data)[at]);
    case OutType::kFloat16:
      return to_float(static_cast<const __half*>(vectors.data)[at]);
    default:
      return static_cast<const float*>(vectors.data)[at];
  }
}

// 8 values of each vector of a sample, which lie on 16 bytes: the channel scale c, which may be
// null, becomes c (1 + scale), and shift becomes c shift, so that c (v (1 + scale) + shift) is one
// fma.
template <typename T>
__device__ __forceinline__ void fold_modulation(float (&factor)[kChunkElements],
                                                float (&summand)[kChunkElements], const T* scales,
                                                const T* shifts, const float* channel_scale) {
  float scale[kChunkElements];
  unpack_chunk<T>(scale, __ldg(reinterpret_cast<const uint4*>(scales)));
  unpack_chunk<T>(summand, __ldg(reinterpret_cast<const uint4*>(shifts)));
#pragma unroll
  for (int e = 0; e < kChunkElements; ++e) {
    factor[e] = 1.0f;
  }
  if (channel_scale != nullptr) {
    load_chunk(factor, channel_scale);
  }
#pragma unroll
  for (int e = 0; e < kChunkElements; ++e) {
    summand[e] *= factor[e];
    factor[e] = fmaf(factor[e], scale[e], factor[e]);
  }
}

// v = v (1 + scale) + shift, of which either may be missing.
__device__ __forceinline__ void modulate(LaneValues& v, const RotateRowsArgs& args, int sample,
                                         int k) {
  const int64_t scale_at = sample * args.scale.sample_stride + k;
  const int64_t shift_at = sample * args.shift.sample_stride + k;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int offset = lane_chunk_to_k(0, chunk);
#pragma unroll
    for (int e = 0; e < kChunkElements; ++e) {
      float scale = 0.0f;
      float shift = 0.0f;
      if (args.scale.data != nullptr) {
        scale = sample_value(args.scale, scale_at + offset + e);
      }
      if (args.shift.data != nullptr) {
        shift = sample_value(args.shift, shift_at + offset + e);
      }
      v[chunk][e] = fmaf(v[chunk][e], scale, v[chunk][e] + shift);
    }
  }
}

// ---- transform ----------------------------------------------------------------------------------

// a, b = a + b, a - b, where `sign` is 1; exchanged where it is -1.
__device__ __forceinline__ void butterfly(float& a, float& b, float sign) {
  const float difference = fmaf(-sign, b, a);
  a = fmaf(sign, b, a);
  b = difference;
}

__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float difference = a - b;
  a += b;
  b = difference;
}

// Stage of bit 0, and the channel scale in front of it: a c0 +- b c1. Without one, kScale false.
template <bool kScale>
__device__ __forceinline__ void scale_chunk(float (&v)[kChunkElements],
                                            const float (&scale)[kChunkElements]) {
#pragma unroll
  for (int e = 0; e < kChunkElements; e += 2) {
    if constexpr (kScale) {
      const float even = v[e];
      const float odd = v[e + 1] * scale[e + 1];
      v[e] = fmaf(even, scale[e], odd);
      v[e + 1] = fmaf(even, scale[e], -odd);
    } else {
      butterfly(v[e], v[e + 1]);
    }
  }
}

// -1 in lanes that have `bit`, else 1.
__device__ __forceinline__ float lane_sign(int lane, int bit) {
  return __uint_as_float(0x3f800000u | (lane & bit ? 0x80000000u : 0u));
}

// The other stages of v = H v, not normalized. v goes in by lane_chunk_to_k and comes out by
// lane_result_to_k; the values of odd chunks come out with the sign lane_sign(lane, 1).
__device__ __forceinline__ void rotate_lane(LaneValues& v, int lane, int block_size) {
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int bit = 2; bit <= 4; bit *= 2) {
#pragma unroll
      for (int e = 0; e < kChunkElements; ++e) {
        if ((e & bit) == 0) {
          butterfly(v[chunk][e], v[chunk][e | bit]);
        }
      }
    }
  }
  const float sign = lane_sign(lane, 1);
  const float sign_of_4 = lane_sign(lane, 2);
#pragma unroll
  for (int e = 0; e < kChunkElements; ++e) {
    butterfly(v[0][e], v[2][e]);
    butterfly(v[1][e], v[3][e]);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      // Bit 5. Even lanes keep its sum and odd ones its difference, which then is the even chunk.
      butterfly(v[chunk][e], v[chunk + 1][e], sign);
      v[chunk + 1][e] = other_lane(v[chunk + 1][e], 1);
      // Bit 3. In odd lanes the even chunk is that of bit 3 set: the difference changes its sign.
      butterfly(v[chunk][e], v[chunk + 1][e]);
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      v[chunk][e] = fmaf(v[chunk][e], sign_of_4, other_lane(v[chunk][e], 2));
    }
  }
  // Units within a rotation of 256, 512 and 1024.
#pragma unroll
  for (int bit = kUnitLanes; bit < 32; bit *= 2) {
    if (block_size > bit / kUnitLanes * kTransform) {
      const float sign_of_unit = lane_sign(lane, bit);
      for_each_value(v, [&](float& x) { x = fmaf(x, sign_of_unit, other_lane(x, bit)); });
    }
  }
}

// ---- quantization -------------------------------------------------------------------------------

// sqrt(mean v^2) or max|v| of the token; NaN when any value is. Lanes that are not active have no
// part in it.
template <bool kShareWarps>
__device__ __forceinline__ float token_size(const LaneValues& v, bool active,
                                            TokenLanes<kShareWarps> token, float* exchange,
                                            const RotateRowsArgs& args) {
  // Four chains: one of 32 steps would wait for itself.
  float size[kChunks] = {};
  if (args.rms) {
#pragma unroll
    for (int e = 0; e < kChunkElements; ++e) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        size[chunk] = fmaf(v[chunk][e], v[chunk][e], size[chunk]);
      }
    }
    const float square = active ? (size[0] + size[1]) + (size[2] + size[3]) : 0.0f;
    return __fsqrt_rn(token.template reduce_token<false>(square, exchange) * args.inverse_features);
  }
#pragma unroll
  for (int e = 0; e < kChunkElements; ++e) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      size[chunk] = e == 0 ? fabsf(v[chunk][e]) : max_or_nan(size[chunk], fabsf(v[chunk][e]));
    }
  }
  const float largest = max_or_nan(max_or_nan(size[0], size[1]), max_or_nan(size[2], size[3]));
  return token.template reduce_token<true>(active ? largest : 0.0f, exchange);
}

__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return prmt(prmt(a, b, 0x0040), prmt(c, d, 0x0040), 0x5410);
}

// Codes of two chunks, 16 neighbours; `factor` of each.
template <bool kClamp>
__device__ __forceinline__ uint4 encode(const float (&even)[kChunkElements],
                                        const float (&odd)[kChunkElements],
                                        const float (&factor)[2], float qmax) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t code[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float value = i < 2 ? even[4 * i + j] : odd[4 * i - 8 + j];
      float sum = fmaf(value, factor[i / 2], kRoundingMagic);
      if (kClamp) {
        sum = fminf(fmaxf(sum, kRoundingMagic - qmax), kRoundingMagic + qmax);
      }
      code[j] = __float_as_uint(sum);
    }
    word[i] = low_bytes(code[0], code[1], code[2], code[3]);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// ---- kernel -------------------------------------------------------------------------------------

// kStays: a thread block stays for lot after lot of tokens, plan.blocks_per_sample lots apart. It
// loads the next one under the arithmetic of the one at hand and keeps the channel scale in
// registers, with the modulation in it.
template <typename T, RotateForm kForm, bool kShareWarps, bool kStays, int kRegisters>
__global__ void __maxnreg__(kRegisters)
    rotate_rows_kernel(const __grid_constant__ RotateRowsArgs args,
                       const __grid_constant__ RotateRowsPlan plan) {
  constexpr bool kNorm = kForm != RotateForm::kPlain;
  __shared__ RotateShared shared;
  const int tokens = static_cast<int>(args.tokens);
  const int sample = blockIdx.y + gridDim.y * blockIdx.z;
  if (sample >= static_cast<int>(args.samples)) {
    return;
  }
  const int lane = threadIdx.x % 32;
  const int unit = threadIdx.x / kUnitLanes;
  int unit_of_token = unit;
  int token = blockIdx.x;
  int step = plan.blocks_per_sample;
  int lot_left = tokens - token;  // from the first token of the lot on
  TokenLanes<kShareWarps> lanes = {lane, unit / kWarpUnits, 0, plan.threads / 32};
  if constexpr (kShareWarps) {
    const int slot = unit * plan.units_reciprocal >> 16;
    unit_of_token = unit - slot * plan.units;
    step *= plan.tokens_per_block;
    token *= plan.tokens_per_block;
    lot_left = tokens - token;
    token += slot;
    lanes = {lane % kUnitLanes, unit, slot * plan.units, plan.units};
  }
  // Lanes past the lot, and those of a token past the last, are idle. Nothing leads from lane to
  // lane but within a token, so what they compute need not be defined.
  const bool in_token = unit < plan.units * plan.tokens_per_block;
  const auto is_active = [&](int of) { return in_token && (!kShareWarps || of < tokens); };
  const int k = kTransform * unit_of_token + kChunkElements * (lane % kUnitLanes);
  const bool in_first = k < args.first.features;
  const RowSource& source = in_first ? args.first : args.second;
  const T* x = static_cast<const T*>(source.data) + sample * source.sample_stride +
               int64_t{token} * source.token_stride + (in_first ? k : k - args.first.features);
  const int vector_k = in_token ? k : 0;
  const float* const channel_scale = args.channel_scale + vector_k;

  grid_dependency_wait();
  grid_dependency_trigger();

  // Of a thread block that stays: the chunks of the next token, of a thread for itself.
  extern __shared__ __align__(16) uint4 dynamic_shared[];
  uint4* const next = dynamic_shared + threadIdx.x;
  constexpr int kChunkFeatures = lane_chunk_to_k(0, 1);
  const auto request = [&](bool wanted) {
#pragma unroll
    for (int chunk = 0; wanted && chunk < kChunks; ++chunk) {
      cp_async_16(shared_address(next + chunk * plan.threads), x + chunk * kChunkFeatures, 16);
    }
    cp_async_commit();
  };
  if constexpr (kStays) {
    request(is_active(token));
  }
  float scale[kChunks][kChunkElements];
  [[maybe_unused]] float summand[kChunks][kChunkElements];
  const auto load_scale = [&] {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      load_chunk(scale[chunk], channel_scale + lane_chunk_to_k(0, chunk));
    }
  };
  if constexpr (kStays && kNorm) {
    const int64_t scale_at = sample * args.scale.sample_stride + vector_k;
    const int64_t shift_at = sample * args.shift.sample_stride + vector_k;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int offset = lane_chunk_to_k(0, chunk);
      fold_modulation<T>(scale[chunk], summand[chunk],
                         static_cast<const T*>(args.scale.data) + scale_at + offset,
                         static_cast<const T*>(args.shift.data) + shift_at + offset,
                         args.channel_scale == nullptr ? nullptr : channel_scale + offset);
    }
  } else if constexpr (kStays) {
    if (args.channel_scale != nullptr) {
      load_scale();
    } else {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
        for (int e = 0; e < kChunkElements; ++e) {
          scale[chunk][e] = 1.0f;
        }
      }
    }
  }
  int turn = 0;
#pragma unroll 1
  do {
    const bool active = is_active(token);
    RawChunks raw;
    if constexpr (kStays) {
      cp_async_wait<0>();
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        raw[chunk] = next[chunk * plan.threads];
      }
      x += int64_t{step} * source.token_stride;
      request(lot_left > step && is_active(token + step));
    } else if (active) {
      raw[0] = load_global_once_16<0>(x);
      raw[1] = load_global_once_16<2 * kChunkFeatures>(x);
      raw[2] = load_global_once_16<4 * kChunkFeatures>(x);
      raw[3] = load_global_once_16<6 * kChunkFeatures>(x);
    }
    LaneValues v;
    const auto unpack_all = [&] {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        unpack_chunk<T>(v[chunk], raw[chunk]);
      }
    };
    if constexpr (kNorm) {
      unpack_all();
      normalize(v, unit, plan.units, lanes, shared.moments, args);
      if constexpr (kStays) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
          for (int e = 0; e < kChunkElements; ++e) {
            v[chunk][e] = fmaf(v[chunk][e], scale[chunk][e], summand[chunk][e]);
          }
        }
      } else if (args.scale.data != nullptr || args.shift.data != nullptr) {
        modulate(v, args, sample, vector_k);
      }
    }
    const auto scale_all = [&](auto with_scale) {
      constexpr bool kScale = decltype(with_scale)::value;
      if constexpr (kScale && !kStays) {
        load_scale();
      }
      if constexpr (!kNorm) {  // here, so that the loads of scale need not wait for those of x
        unpack_all();
      }
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        scale_chunk<kScale>(v[chunk], scale[chunk]);
      }
    };
    if (kStays ? !kNorm : args.channel_scale != nullptr) {
      scale_all(std::true_type());
    } else {
      scale_all(std::false_type());
    }
    rotate_lane(v, lane, args.block_size);

    // The norm of H rides on the scalars of the token instead of on every element.
    const float x_scale = token_size(v, active, lanes, shared.size[turn], args) *
                          args.hadamard_norm * args.step_factor;
    const float inverse = __frcp_rn(x_scale);
    const bool meaningful = inverse > 0.0f && inverse < INFINITY;
    const float factor = inverse * args.hadamard_norm;
    const float factors[2] = {factor, factor * lane_sign(lane, 1)};
    uint4 codes[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    const auto encode_all = [&](auto with_clamp) {
      constexpr bool kClamp = decltype(with_clamp)::value;
      codes[0] = encode<kClamp>(v[0], v[1], factors, args.qmax);
      codes[1] = encode<kClamp>(v[2], v[3], factors, args.qmax);
    };
    if (meaningful && args.clamp) {
      encode_all(std::true_type());
    } else if (meaningful) {
      encode_all(std::false_type());
    }
    if (active) {
      const int row = sample * tokens + token;
      int8_t* const x_q = args.x_q + int64_t{row} * args.features + kTransform * unit_of_token +
                          lane_result_to_k(lane % kUnitLanes, 0);
      store_global_16(x_q, codes[0]);
      store_global_16(x_q + lane_result_to_k(0, 2), codes[1]);
      if (unit_of_token == 0 && lane % kUnitLanes == 0) {
        args.x_scale[row] = x_scale;
      }
    }
    token += step;
    lot_left -= step;
    turn ^= 1;
  } while (kStays && lot_left > 0);
}

}  // namespace lrq
