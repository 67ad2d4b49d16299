// Vectors of the channels: the channel scale, and the scale and shift of a modulation.
#pragma once

#include <type_traits>

#include "rotate_quantize.h"
#include "token_words.cuh"

namespace lrq {

// Two bf16 values in type T.
template <typename T>
__device__ __forceinline__ uint32_t from_bf16(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return word;
  } else {
    const float2 pair = Words<__nv_bfloat16>::unpack(word);
    return pack<T>(pair.x, pair.y);
  }
}

__device__ __forceinline__ uint4 load_constant_16(const void* global) {
  return __ldg(static_cast<const uint4*>(global));
}

// Fills what a thread block keeps in shared memory, k in order: a factor of each channel, 1 or
// 1 + scale, and with a modulation a summand, shift; both times the channel scale, which may be
// null.
template <typename T, bool kModulated>
__device__ __forceinline__ void fill_vectors(T* factors, T* summands, const RotateRowsArgs& args,
                                             int sample) {
  const T* const scale = static_cast<const T*>(args.scale.data) + sample * args.scale.sample_stride;
  const T* const shift = static_cast<const T*>(args.shift.data) + sample * args.shift.sample_stride;
#pragma unroll 1
  for (int k = kChunkElements * (threadIdx.x + blockDim.x * threadIdx.y); k < args.features;
       k += kChunkElements * blockDim.x * blockDim.y) {
    uint32_t factor[kChunkWords];
    uint32_t summand[kChunkWords];
#pragma unroll
    for (int i = 0; i < kChunkWords; ++i) {
      factor[i] = Words<T>::kOnes;
    }
    if constexpr (kModulated) {
      uint32_t word[kChunkWords];
      set_chunk(word, load_constant_16(scale + k));
      set_chunk(summand, load_constant_16(shift + k));
#pragma unroll
      for (int i = 0; i < kChunkWords; ++i) {
        factor[i] = add<T>(factor[i], word[i]);
      }
    }
    if (args.channel_scale != nullptr) {
      uint32_t word[kChunkWords];
      set_chunk(word, load_constant_16(args.channel_scale + k));
#pragma unroll
      for (int i = 0; i < kChunkWords; ++i) {
        factor[i] = multiply<T>(factor[i], from_bf16<T>(word[i]));
        if constexpr (kModulated) {
          summand[i] = multiply<T>(summand[i], from_bf16<T>(word[i]));
        }
      }
    }
    *reinterpret_cast<uint4*>(factors + k) = chunk_of(factor);
    if constexpr (kModulated) {
      *reinterpret_cast<uint4*>(summands + k) = chunk_of(summand);
    }
  }
}

// words = words * factors + summands of fill_vectors, the latter with a modulation; places: of what
// belongs to this lane's words, for load_words.
template <typename T, bool kModulated>
__device__ __forceinline__ void apply_vectors(LaneWords& words, uint32_t factor_place,
                                              uint32_t summand_place) {
  LaneWords vector;
  load_words(vector, factor_place);
  for_each_word(
      words, [&](uint32_t& word, int chunk, int i) { word = multiply<T>(word, vector[chunk][i]); });
  if constexpr (kModulated) {
    load_words(vector, summand_place);
    for_each_word(words,
                  [&](uint32_t& word, int chunk, int i) { word = add<T>(word, vector[chunk][i]); });
  }
}

}  // namespace lrq
