// The size of tokens after the transform: the largest value of each, or the sum of its squares.
#pragma once

#include "token_layout.h"
#include "token_rotation.cuh"

namespace lrq {

// Two sizes of parts as one of both: sums of squares, or largest values, NaN when one is.
template <bool kSum>
__device__ __forceinline__ float both_sizes(float a, float b) {
  return kSum ? a + b : max_or_nan(a, b);
}

template <bool kSum>
__device__ __forceinline__ float column_size(const LaneResults& v, int column) {
  // Four chains: one of 16 steps would wait for itself.
  float size[kChunkWords];
#pragma unroll
  for (int word = 0; word < kChunkWords; ++word) {
#pragma unroll
    for (int i = 0; i < 2 * kResultChunks; ++i) {
      const float value = v[i / 2][word][2 * (i % 2) + column];
      if (i == 0) {
        size[word] = kSum ? value * value : fabsf(value);
      } else {
        size[word] = kSum ? fmaf(value, value, size[word]) : max_or_nan(size[word], fabsf(value));
      }
    }
  }
  return both_sizes<kSum>(both_sizes<kSum>(size[0], size[1]), both_sizes<kSum>(size[2], size[3]));
}

// The token of which a lane has the size: that of its columns, or of eight tokens, where these are
// of two, the one that has the parity of the lane's row.
template <int kTokens>
struct SizeLanes {
  static constexpr bool kOnePerColumn = kTokens == kWarpUnits;
  // Lanes side by side that have the same token.
  static constexpr int kNeighbours = kOnePerColumn ? 1 : kUnitLanes / kTokens;

  // The column of the lane's token, where each is of another,
  __device__ __forceinline__ static int column(int lane) { return lane / kUnitLanes % kColumns; }
  // where sizes of tokens lie side by side, that of the lane's,
  __device__ __forceinline__ static int place(int lane) {
    return kOnePerColumn ? lane % kWarpUnits : lane % kUnitLanes / kNeighbours;
  }
  // which token of the team this is,
  __device__ __forceinline__ static int token(int lane) {
    return kOnePerColumn ? lane_result_unit(lane, column(lane)) : place(lane);
  }
  // and the number of the lane among the 32 / kTokens that have it, which lie
  __device__ __forceinline__ static int rank(int lane) {
    return kOnePerColumn ? lane / kWarpUnits : lane / kUnitLanes * kNeighbours + lane % kNeighbours;
  }
  // that far apart.
  __device__ __forceinline__ static constexpr bool is_apart(int distance) {
    return distance < kNeighbours || distance >= (kOnePerColumn ? kWarpUnits : kUnitLanes);
  }
};

template <bool kSum, int kTokens>
__device__ __forceinline__ float warp_size(float size) {
  if constexpr (!kSum && kTokens == 1) {
    // Numbers that are not negative: their bits sort like they do, and NaN above infinity.
    return __uint_as_float(reduce_max_u32(__float_as_uint(size)));
  } else {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      if (SizeLanes<kTokens>::is_apart(distance)) {
        size = both_sizes<kSum>(size, other_lane(size, distance));
      }
    }
    return size;
  }
}

// Of SizeLanes::token. active: columns that are of a token. sizes: kTokens for each warp of the
// team.
template <bool kSum, typename Team, int kTokens>
__device__ __forceinline__ float token_size(const LaneResults& v, const bool (&active)[kColumns],
                                            float* sizes) {
  using Lanes = SizeLanes<kTokens>;
  const int lane = Team::thread() % 32;
  const float first = active[0] ? column_size<kSum>(v, 0) : 0.0f;
  const float second = active[1] ? column_size<kSum>(v, 1) : 0.0f;
  float size;
  if constexpr (Lanes::kOnePerColumn) {
    const bool odd = Lanes::column(lane) == 1;
    size = both_sizes<kSum>(odd ? second : first, other_lane(odd ? first : second, kUnitLanes));
  } else {
    size = both_sizes<kSum>(first, second);
  }
  size = warp_size<kSum, kTokens>(size);
  if (Team::threads() == 32) {
    Team::sync();
    return size;
  }
  if (Lanes::rank(lane) == 0) {
    sizes[Team::thread() / 32 * kTokens + Lanes::place(lane)] = size;
  }
  Team::sync();
  size = 0.0f;
#pragma unroll 1
  for (int warp = Lanes::rank(lane); 32 * warp < Team::threads(); warp += 32 / kTokens) {
    size = both_sizes<kSum>(size, sizes[warp * kTokens + Lanes::place(lane)]);
  }
  return warp_size<kSum, kTokens>(size);
}

}  // namespace lrq
