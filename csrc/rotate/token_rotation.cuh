// Block Hadamard of 1024 values in the registers of a warp.
//
// The values have 8 digits (bf16) or 11 (fp16): an mma with a matrix of +-1 sums exact products in
// fp32, and four of the seven stages of a transform of 128 cost one mma for 128 values. That is why
// products with the channel scale and a norm in front are rounded to the tokens' type: what has
// more digits would go in as a sum of parts, at 7 instructions a value for three of them.
#pragma once

#include "token_words.cuh"

namespace lrq {

// A lane's results: chunk, word, 2 row + column (token_layout.h).
using LaneResults = float[kResultChunks][kChunkWords][4];

template <typename Use>
__device__ __forceinline__ void for_each_result(LaneResults& v, Use use) {
#pragma unroll
  for (int chunk = 0; chunk < kResultChunks; ++chunk) {
#pragma unroll
    for (int word = 0; word < kChunkWords; ++word) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        use(v[chunk][word][i]);
      }
    }
  }
}

__device__ __forceinline__ float other_lane(float value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// -1 in lanes that have `bit`, else 1.
__device__ __forceinline__ float lane_sign(int lane, int bit) {
  return __uint_as_float(0x3f800000u | (lane & bit ? 0x80000000u : 0u));
}

__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float difference = a - b;
  a += b;
  b = difference;
}

// ---- stages -------------------------------------------------------------------------------------

// What a lane holds of operand A, 16 x 16: H of bits 0, 4, 5 and 6 of k, in whose place stand row
// and bits 2, 3 and 4 of the lane among the rows, and half of a word, bits 0 and 1 of the lane and
// bit 1 of the chunk among the columns.
__device__ __forceinline__ void hadamard_fragment(uint32_t (&a)[4], int lane, uint32_t ones) {
  constexpr uint32_t kNegateBoth = 0x80008000u;
  constexpr uint32_t kNegateHigh = 0x80000000u;
  const int g = lane / kUnitLanes;
  const uint32_t first = ones ^ (__popc(g & lane % kUnitLanes) & 1 ? kNegateBoth : 0u);
  const uint32_t second = first ^ (g & 4 ? kNegateBoth : 0u);
  a[0] = first;
  a[1] = first ^ kNegateHigh;
  a[2] = second;
  a[3] = second ^ kNegateHigh;
}

// The stages of an mma, of words in type T.
template <typename T>
__device__ __forceinline__ void multiply_matrix(LaneResults& v, const LaneWords& words,
                                                const uint32_t (&matrix)[4]) {
  constexpr float kZero[4] = {};
#pragma unroll
  for (int chunk = 0; chunk < kResultChunks; ++chunk) {
#pragma unroll
    for (int word = 0; word < kChunkWords; ++word) {
      Words<T>::mma(v[chunk][word], matrix, words[chunk][word], words[chunk + 2][word], kZero);
    }
  }
}

// The stages after the mma, of v = H v, not normalized. Where units are rotated alone, block_size
// 128, v of chunk 1 and column 1 comes out negated.
__device__ __forceinline__ void finish_transform(LaneResults& v, int lane, int block_size) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int chunk = 0; chunk < kResultChunks; ++chunk) {
      butterfly(v[chunk][0][i], v[chunk][1][i]);
      butterfly(v[chunk][2][i], v[chunk][3][i]);
      butterfly(v[chunk][0][i], v[chunk][2][i]);
      butterfly(v[chunk][1][i], v[chunk][3][i]);
    }
#pragma unroll
    for (int word = 0; word < kChunkWords; ++word) {
      butterfly(v[0][word][i], v[1][word][i]);
    }
  }
  if (block_size > kTransform) {  // neighbour columns
#pragma unroll
    for (int word = 0; word < kChunkWords; ++word) {
#pragma unroll
      for (int i = 0; i < 4; i += kColumns) {
        butterfly(v[0][word][i], v[0][word][i + 1]);
        const float difference = v[1][word][i] + v[1][word][i + 1];  // of a negated b
        v[1][word][i] -= v[1][word][i + 1];
        v[1][word][i + 1] = difference;
      }
    }
  }
#pragma unroll
  for (int bit = 1; bit < kUnitLanes; bit *= 2) {
    if (block_size > 2 * bit * kTransform) {
      const float sign = lane_sign(lane, bit);
      for_each_result(v, [&](float& x) { x = fmaf(x, sign, other_lane(x, bit)); });
    }
  }
}

}  // namespace lrq
