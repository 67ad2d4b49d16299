// Pairs of 16-bit values in a word: arithmetic in their own type, one rounding each.
#pragma once

#include "../device/numeric.cuh"
#include "token_layout.h"

namespace lrq {

// A lane's 32 values of a token, as they lie in memory.
using LaneWords = uint32_t[kChunks][kChunkWords];

template <typename T>
struct Words;

template <>
struct Words<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr uint32_t kOnes = 0x3f803f80u;

  __device__ __forceinline__ static float2 unpack(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
  __device__ __forceinline__ static Pair pack(float low, float high) {
    return __floats2bfloat162_rn(low, high);
  }
  __device__ __forceinline__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, const float (&c)[4]) {
    mma_m16n8k16_bf16(d, a, b0, b1, c);
  }
  __device__ __forceinline__ static void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    mma_m16n8k8_bf16(d, a0, a1, b);
  }
};

template <>
struct Words<__half> {
  using Pair = __half2;
  static constexpr uint32_t kOnes = 0x3c003c00u;

  __device__ __forceinline__ static float2 unpack(uint32_t word) {
    __half2 halves;
    memcpy(&halves, &word, sizeof(halves));
    return __half22float2(halves);
  }
  __device__ __forceinline__ static Pair pack(float low, float high) {
    return __floats2half2_rn(low, high);
  }
  __device__ __forceinline__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, const float (&c)[4]) {
    mma_m16n8k16_f16(d, a, b0, b1, c);
  }
  __device__ __forceinline__ static void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    mma_m16n8k8_f16(d, a0, a1, b);
  }
};

template <typename Pair>
__device__ __forceinline__ uint32_t bits_of(Pair pair) {
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return bits_of(Words<T>::pack(low, high));
}

// The _rn forms are never contracted to one fma.
template <typename T>
__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
  typename Words<T>::Pair pairs[2];
  memcpy(&pairs[0], &a, sizeof(a));
  memcpy(&pairs[1], &b, sizeof(b));
  return bits_of(__hmul2_rn(pairs[0], pairs[1]));
}

template <typename T>
__device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
  typename Words<T>::Pair pairs[2];
  memcpy(&pairs[0], &a, sizeof(a));
  memcpy(&pairs[1], &b, sizeof(b));
  return bits_of(__hadd2_rn(pairs[0], pairs[1]));
}

__device__ __forceinline__ void set_chunk(uint32_t (&words)[kChunkWords], uint4 chunk) {
  words[0] = chunk.x, words[1] = chunk.y, words[2] = chunk.z, words[3] = chunk.w;
}

__device__ __forceinline__ uint4 chunk_of(const uint32_t (&words)[kChunkWords]) {
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A lane's words in shared memory, where k lie in order; `place` is that of its first chunk, from
// which the second differs in bit 4 (token_layout.h).
__device__ __forceinline__ void load_words(LaneWords& words, uint32_t place) {
  set_chunk(words[0], load_shared_16<0>(place));
  set_chunk(words[1], load_shared_16<0>(place ^ 16));
  set_chunk(words[2], load_shared_16<128>(place));
  set_chunk(words[3], load_shared_16<128>(place ^ 16));
}

template <typename Use>
__device__ __forceinline__ void for_each_word(LaneWords& words, Use use) {
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int i = 0; i < kChunkWords; ++i) {
      use(words[chunk][i], chunk, i);
    }
  }
}

}  // namespace lrq
