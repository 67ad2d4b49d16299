// Which k of a token a lane holds, before and after the Hadamard transform.
//
// Four lanes, a unit, hold 128 neighbours: 4 chunks of 8 each. The natural (Sylvester) Hadamard
// matrix is one stage for each bit of k, in any order, so each stage goes where its bit lies: four
// of them in one mma, which sums over k of eight units at once, three in additions of the lane.
//
//     bits of k    9 8 7               6          5 4         3           2 1         0
//     before       lane 4 3 2          chunk 1    lane 1 0    chunk 0*    word        half
//     stage        additions, lanes    mma        mma         addition    addition    mma
//     after        lane 1 0, column    lane 4     lane 3 2    chunk       word        row
//
// "row" and "column" are the two rows (g, g + 8) and two columns (2t, 2t + 1) that a lane holds of
// the mma's result: 16 neighbours of each of two units. * Odd units have the two chunks the other
// way round: 8 lanes that read shared memory together, of two units, then read from all 32 banks.
// What that changes after the transform is the sign of the second chunk of column 1.
#pragma once

#include "../int_math.h"

namespace lrq {

constexpr int kTransform = 128;
constexpr int kUnitLanes = 4;
constexpr int kChunks = 4;  // of a lane
constexpr int kChunkElements = 8;
constexpr int kChunkWords = kChunkElements / 2;
constexpr int kWarpUnits = 32 / kUnitLanes;
constexpr int kWarpElements = kWarpUnits * kTransform;  // 1024
constexpr int kColumns = 2;                             // units of which a lane has results
constexpr int kResultChunks = 2;                        // of a column

// First of the 8 neighbours of a lane's chunk, among its unit's 128,
LRQ_HOST_DEVICE constexpr int chunk_of_unit(int lane, int chunk) {
  return 64 * (chunk / 2) + 16 * (lane % kUnitLanes) +
         kChunkElements * ((chunk + lane / kUnitLanes) % 2);
}

// and among its warp's 1024, before the transform;
LRQ_HOST_DEVICE constexpr int lane_chunk_to_k(int lane, int chunk) {
  return kTransform * (lane / kUnitLanes) + chunk_of_unit(lane, chunk);
}

// and after the transform.
LRQ_HOST_DEVICE constexpr int lane_result_unit(int lane, int column) {
  return kColumns * (lane % kUnitLanes) + column;
}

LRQ_HOST_DEVICE constexpr int lane_result_to_k(int lane, int column, int chunk) {
  return kTransform * lane_result_unit(lane, column) + 16 * (lane / kUnitLanes) +
         kChunkElements * chunk;
}

// What the eight units of a warp are: of one token all, or of several, 8 / kTokens of each. The
// warps of a team follow each other along K.
template <int kTokens>
struct TeamLayout {
  static_assert(kTokens == 1 || kTokens == 2 || kTokens == 4 || kTokens == 8, "tokens of a warp");
  static constexpr int kUnits = kWarpUnits / kTokens;  // of a token in a warp

  // Token, and first k of it, of the unit of which a thread holds a quarter before the transform,
  LRQ_HOST_DEVICE static constexpr int token(int thread) {
    return thread % 32 / kUnitLanes / kUnits;
  }
  LRQ_HOST_DEVICE static constexpr int unit_k(int thread) {
    return kTransform * (thread / 32 * kUnits + thread % 32 / kUnitLanes % kUnits);
  }

  // and token, and first of the 16 neighbours, of a thread's column after it.
  LRQ_HOST_DEVICE static constexpr int result_token(int thread, int column) {
    return lane_result_unit(thread % 32, column) / kUnits;
  }
  LRQ_HOST_DEVICE static constexpr int result_k(int thread, int column) {
    const int unit = lane_result_unit(thread % 32, column);
    return kTransform * (thread / 32 * kUnits + unit % kUnits) + 16 * (thread % 32 / kUnitLanes);
  }
};

}  // namespace lrq
