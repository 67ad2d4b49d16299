// Values to and from memory: one correctly rounded conversion each way.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "sm80.cuh"

namespace lrq {

template <typename T>
__device__ __forceinline__ T round_to(float value);

template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <>
__device__ __forceinline__ __half round_to<__half>(float value) {
  return __float2half_rn(value);
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// 2^x, wrong by at most 2 units in the last place, results below 2^-126 flushed to zero (PTX ISA
// 9.7.3.21, ex2).
__device__ __forceinline__ float approximate_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, wrong by at most 1 unit in the last place, subnormal numbers taken for and flushed to zero
// (PTX ISA 9.7.3.15, rcp).
__device__ __forceinline__ float approximate_rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// kCount neighbours that move as one access.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount > 16 ? 16 : sizeof(T) * kCount) Pack {
  T value[kCount];
};

// Stores neighbours in 8- or 16-byte pieces. Assigning a Pack does not: the compiler splits it.
template <typename T, int kCount>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, kCount>& pack) {
  constexpr int kWords = sizeof(pack) / 4;
  static_assert(kWords == 2 || kWords % 4 == 0, "whole pieces");
  uint32_t word[kWords];
  memcpy(word, pack.value, sizeof(word));
  if constexpr (kWords == 2) {
    store_global_8(target, make_uint2(word[0], word[1]));
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      store_global_16(reinterpret_cast<uint32_t*>(target) + i,
                      make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]));
    }
  }
}

}  // namespace lrq
