// LayerNorm or RMSNorm of tokens, and their modulation, before the transform: four lanes a unit of
// 128 neighbours (token_layout.h).
#pragma once

#include "rotate_quantize.h"
#include "token_team.cuh"
#include "token_words.cuh"

namespace lrq {

// Sums over the 128 values of a unit.
struct UnitMoments {
  float sum;
  float squares;
};

// norm(x) = x rstd + offset.
struct NormFactors {
  float rstd;
  float offset;

  __device__ __forceinline__ float operator()(float x) const { return fmaf(x, rstd, offset); }
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

// Sums of units, of exact products in fp32: a product with ones, and the diagonal of the product of
// units with themselves. Operand A of a lane is two words of its row g, operand B one of its column
// g: what a unit holds as words of one is what it holds as the other.
template <typename T>
struct UnitSums {
  // Two chains of each: an mma of one would wait for that before.
  float sums[2][4] = {};
  float squares[4][4] = {};

  __device__ __forceinline__ void add(const LaneWords& words) {
    constexpr uint32_t kOnes[4] = {Words<T>::kOnes, Words<T>::kOnes, Words<T>::kOnes,
                                   Words<T>::kOnes};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < kChunkWords; i += 2) {
        const uint32_t first = words[chunk][i];
        const uint32_t second = words[chunk][i + 1];
        Words<T>::mma(sums[i / 2], kOnes, first, second, sums[i / 2]);
        Words<T>::mma(squares[i], first, second, first);       // rows g: of the first
        Words<T>::mma(squares[i + 1], first, second, second);  // rows g + 8: of the second
      }
    }
  }

  // One of a unit's four lanes has its moments; the others have numbers that mean nothing.
  __device__ __forceinline__ static bool is_owner(int lane) {
    return lane % kUnitLanes == lane / kUnitLanes / kColumns;
  }
  __device__ __forceinline__ UnitMoments owned(int lane) const {
    const bool even = lane / kUnitLanes % kColumns == 0;
    return {even ? sums[0][0] + sums[1][0] : sums[0][1] + sums[1][1],
            even ? (squares[0][0] + squares[1][2]) + (squares[2][0] + squares[3][2])
                 : (squares[0][1] + squares[1][3]) + (squares[2][1] + squares[3][3])};
  }
};

// The sum over this lane's token of what owners have. moments: kWarpUnits for each warp of the
// team.
template <typename Team, int kTokens>
__device__ __forceinline__ UnitMoments token_sum(UnitMoments own, bool owner,
                                                 UnitMoments* moments) {
  constexpr int kUnits = TeamLayout<kTokens>::kUnits;
  constexpr int kLanes = kUnits * kUnitLanes;  // of a token in a warp
  const int lane = Team::thread() % 32;
  UnitMoments total = {owner ? own.sum : 0.0f, owner ? own.squares : 0.0f};
  if (Team::threads() > 32) {
    const int units = Team::threads() / 32 * kUnits;
    UnitMoments* const row = moments + TeamLayout<kTokens>::token(lane) * units;
    if (owner) {
      row[TeamLayout<kTokens>::unit_k(Team::thread()) / kTransform] = own;
    }
    Team::sync();
    total = {0.0f, 0.0f};
#pragma unroll 1
    for (int i = lane % kLanes; i < units; i += kLanes) {
      total.sum += row[i].sum;
      total.squares += row[i].squares;
    }
  }
  return {lanes_sum<kLanes>(total.sum), lanes_sum<kLanes>(total.squares)};
}

// Factors for this lane's token, of whose words load(words) gives those of the lane; in_token: they
// are not behind K. The variance is avg(x^2) - mean^2, unless a token of the warp has a mean so
// large that this loses digits; then deviations from the mean are squared, as PyTorch does. All
// warps of a team see the same tokens and decide alike.
template <typename T, typename Team, int kTokens, typename Load>
__device__ __forceinline__ NormFactors norm_factors(const Load& load, bool in_token,
                                                    UnitMoments* moments,
                                                    const RotateRowsArgs& args) {
  constexpr float kLargeMean = 8.0f;  // in deviations: costs 6 of 22 digits
  const int lane = Team::thread() % 32;
  const auto sum = [&](UnitMoments own, bool owner) {
    return token_sum<Team, kTokens>(in_token ? own : UnitMoments{0.0f, 0.0f}, owner, moments);
  };
  UnitSums<T> sums;
  LaneWords words;
  load(words);
  sums.add(words);
  const UnitMoments total = sum(sums.owned(lane), sums.is_owner(lane));
  const bool centred = args.norm == TokenNorm::kLayer;
  const float mean = centred ? total.sum * args.inverse_features : 0.0f;
  float variance = fmaf(-mean, mean, total.squares * args.inverse_features);
  if (__any_sync(0xffffffffu, mean * mean > kLargeMean * kLargeMean * variance)) {
    float squares = 0.0f;
    load(words);
    for_each_word(words, [&](uint32_t& word, int, int) {
      const float2 pair = Words<T>::unpack(word);
      squares = fmaf(pair.x - mean, pair.x - mean, squares);
      squares = fmaf(pair.y - mean, pair.y - mean, squares);
    });
    squares = lanes_sum<kUnitLanes>(squares);
    Team::sync();  // all have read what the next line replaces
    squares = sum({0.0f, squares}, lane % kUnitLanes == 0).squares;
    variance = squares * args.inverse_features;
  }
  const float rstd = rsqrtf(variance + args.eps);
  return {rstd, -mean * rstd};
}

// ---- modulation ---------------------------------------------------------------------------------

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

// words = norm(words), rounded to their type.
template <typename T>
__device__ __forceinline__ void normalize(LaneWords& words, const NormFactors& norm) {
  for_each_word(words, [&](uint32_t& word, int, int) {
    const float2 pair = Words<T>::unpack(word);
    word = pack<T>(norm(pair.x), norm(pair.y));
  });
}

// words = norm(words) (1 + scale) + shift, of which either may be missing, from any address. Where
// both are of the tokens' type each step is rounded to it, elsewhere the last alone. k: of the
// lane's unit.
template <typename T>
__device__ __forceinline__ void modulate(LaneWords& words, const NormFactors& norm,
                                         const RotateRowsArgs& args, int sample, int k) {
  const bool has_scale = args.scale.data != nullptr;
  const bool has_shift = args.shift.data != nullptr;
  const bool narrow =
      (!has_scale || args.scale.type == args.type) && (!has_shift || args.shift.type == args.type);
  const auto rounded = [&](float value) { return narrow ? to_float(round_to<T>(value)) : value; };
  const int64_t scale_at = sample * args.scale.sample_stride + k;
  const int64_t shift_at = sample * args.shift.sample_stride + k;
  const auto value = [&](float x, int at) {
    float y = rounded(norm(x));
    if (has_scale) {
      y = rounded(__fmul_rn(y, rounded(1.0f + sample_value(args.scale, scale_at + at))));
    }
    if (has_shift) {
      y = rounded(__fadd_rn(y, sample_value(args.shift, shift_at + at)));
    }
    return y;
  };
  for_each_word(words, [&](uint32_t& word, int chunk, int i) {
    const int at = chunk_of_unit(threadIdx.x % 32, chunk) + 2 * i;
    const float2 pair = Words<T>::unpack(word);
    word = pack<T>(value(pair.x, at), value(pair.y, at + 1));
  });
}

}  // namespace lrq
