// Integer helpers shared by host and device code.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LRQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LRQ_HOST_DEVICE inline
#endif

namespace lrq {

template <typename T>
LRQ_HOST_DEVICE constexpr T ceil_div(T value, T divisor) {
  return (value + divisor - 1) / divisor;
}

template <typename T>
LRQ_HOST_DEVICE constexpr T align_up(T value, T multiple) {
  return ceil_div(value, multiple) * multiple;
}

template <typename T>
LRQ_HOST_DEVICE constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
LRQ_HOST_DEVICE constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}

}  // namespace lrq
