// Scales and codes of tokens of known size.
#pragma once

#include "rotate_quantize.h"
#include "token_rotation.cuh"

namespace lrq {

// fp32 has unit spacing just above 1.5 * 2^23: adding it rounds half to even, and the low byte of
// the sum is the rounded integer in two's complement.
constexpr float kRoundingMagic = 12582912.0f;

struct TokenScales {
  float x_scale;
  float to_code;  // factor of a value that is not normalized; 0: all codes are
};

// The norm of H rides on the scalars of the token instead of on every element.
__device__ __forceinline__ TokenScales token_scales(float size, bool rms,
                                                    const RotateRowsArgs& args) {
  const float scaled_size = rms ? __fsqrt_rn(size * args.inverse_features) : size;
  const float x_scale = scaled_size * args.hadamard_norm * args.step_factor;
  const float inverse = __frcp_rn(x_scale);
  const bool meaningful = inverse > 0.0f && inverse < INFINITY;
  return {x_scale, meaningful ? inverse * args.hadamard_norm : 0.0f};
}

__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return prmt(prmt(a, b, 0x0040), prmt(c, d, 0x0040), 0x5410);
}

// The 8 codes of a column's chunk.
template <bool kClamp>
__device__ __forceinline__ uint2 encode(const float (&v)[kChunkWords][4], int column, float factor,
                                        float qmax) {
  uint32_t code[kChunkWords][2];
#pragma unroll
  for (int word = 0; word < kChunkWords; ++word) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float sum = fmaf(v[word][2 * row + column], factor, kRoundingMagic);
      if (kClamp) {
        sum = fminf(fmaxf(sum, kRoundingMagic - qmax), kRoundingMagic + qmax);
      }
      code[word][row] = __float_as_uint(sum);
    }
  }
  return make_uint2(low_bytes(code[0][0], code[0][1], code[1][0], code[1][1]),
                    low_bytes(code[2][0], code[2][1], code[3][0], code[3][1]));
}

// The 16 codes of a column. negated: finish_transform has negated its second chunk.
template <bool kMayClamp>
__device__ __forceinline__ uint4 column_codes(const LaneResults& v, int column, float to_code,
                                              bool negated, const RotateRowsArgs& args) {
  if (!(to_code > 0.0f)) {
    return make_uint4(0, 0, 0, 0);
  }
  const float second_to_code = negated ? -to_code : to_code;
  uint2 first;
  uint2 second;
  if (kMayClamp && args.clamp) {
    first = encode<true>(v[0], column, to_code, args.qmax);
    second = encode<true>(v[1], column, second_to_code, args.qmax);
  } else {
    first = encode<false>(v[0], column, to_code, args.qmax);
    second = encode<false>(v[1], column, second_to_code, args.qmax);
  }
  return make_uint4(first.x, first.y, second.x, second.y);
}

}  // namespace lrq
