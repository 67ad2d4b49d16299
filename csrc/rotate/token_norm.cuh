// LayerNorm or RMSNorm of a token, and its modulation, before the transform: four lanes a unit of
// 128 neighbours (token_layout.h).
#pragma once

#include "token_ring.cuh"
#include "token_words.cuh"

namespace lrq {

// Of 128 values.
struct UnitMoments {
  float mean;
  float squares;  // of deviations from the mean
};

// Over `kLanes` neighbour lanes: a warp or a unit.
template <int kLanes>
__device__ __forceinline__ float lanes_sum(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// v becomes norm(v). Each unit subtracts its own mean before it squares, so that a large mean costs
// no digits and one barrier is enough: with units of 128 and their means m_u,
//     mean = avg(m_u),   K variance = sum(squares_u) + 128 sum((m_u - mean)^2).
// The unit's mean leaves v with the last step: (v - m_u) rstd + (m_u - mean) rstd.
// moments: of the units of the token.
__device__ __forceinline__ void normalize(LaneValues& v, int units, UnitMoments* moments,
                                          const RotateRowsArgs& args) {
  UnitMoments own = {0.0f, 0.0f};
  if (args.norm == TokenNorm::kLayer) {
    for_each_value(v, [&](float x) { own.mean += x; });
    own.mean = lanes_sum<kUnitLanes>(own.mean) * (1.0f / kTransform);
    for_each_value(v, [&](float& x) { x -= own.mean; });
  }
  for_each_value(v, [&](float x) { own.squares = fmaf(x, x, own.squares); });
  own.squares = lanes_sum<kUnitLanes>(own.squares);
  if (Team::thread() % kUnitLanes == 0) {
    moments[Team::thread() / kUnitLanes] = own;
  }
  Team::sync();
  float mean = 0.0f;
  if (args.norm == TokenNorm::kLayer) {
#pragma unroll 1
    for (int i = Team::thread() % 32; i < units; i += 32) {
      mean += moments[i].mean;
    }
    mean = lanes_sum<32>(mean) * (kTransform * args.inverse_features);
  }
  float squares = 0.0f;
#pragma unroll 1
  for (int i = Team::thread() % 32; i < units; i += 32) {
    const UnitMoments one = moments[i];
    const float deviation = one.mean - mean;
    squares += fmaf(deviation * kTransform, deviation, one.squares);
  }
  squares = lanes_sum<32>(squares);
  const float rstd = rsqrtf(squares * args.inverse_features + args.eps);
  const float offset = (own.mean - mean) * rstd;
  for_each_value(v, [&](float& x) { x = fmaf(x, rstd, offset); });
}

// ---- modulation ---------------------------------------------------------------------------------

// v in the type of the tokens.
template <typename T>
__device__ __forceinline__ void pack_values(LaneWords& words, const LaneValues& v) {
  for_each_word(words, [&](uint32_t& word, int chunk, int i) {
    word = pack<T>(v[chunk][2 * i], v[chunk][2 * i + 1]);
  });
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

// words = v (1 + scale) + shift, of which either may be missing, from any address. Where both are
// of the tokens' type each step is rounded to it, elsewhere the last alone. k: of the lane's unit.
template <typename T>
__device__ __forceinline__ void modulate(LaneWords& words, const LaneValues& v,
                                         const RotateRowsArgs& args, int sample, int k) {
  const bool has_scale = args.scale.data != nullptr;
  const bool has_shift = args.shift.data != nullptr;
  const bool narrow =
      (!has_scale || args.scale.type == args.type) && (!has_shift || args.shift.type == args.type);
  const auto rounded = [&](float value) { return narrow ? to_float(round_to<T>(value)) : value; };
  const int64_t scale_at = sample * args.scale.sample_stride + k;
  const int64_t shift_at = sample * args.shift.sample_stride + k;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int of_chunk = chunk_of_unit(threadIdx.x % 32, chunk);
    float y[kChunkElements];
#pragma unroll
    for (int e = 0; e < kChunkElements; ++e) {
      y[e] = rounded(v[chunk][e]);
      if (has_scale) {
        const float factor = rounded(1.0f + sample_value(args.scale, scale_at + of_chunk + e));
        y[e] = rounded(__fmul_rn(y[e], factor));
      }
      if (has_shift) {
        y[e] = rounded(__fadd_rn(y[e], sample_value(args.shift, shift_at + of_chunk + e)));
      }
    }
#pragma unroll
    for (int i = 0; i < kChunkWords; ++i) {
      words[chunk][i] = pack<T>(y[2 * i], y[2 * i + 1]);
    }
  }
}

}  // namespace lrq
