// Which k of a token a lane holds, before and after the Hadamard transform.
//
// Four lanes, a unit, transform 128 neighbours: 4 chunks of 8 neighbours each. The natural
// (Sylvester) Hadamard matrix is one butterfly for each bit of k, in any order, so each stage goes
// where its bit lies:
//
//     bits of k    9 8 7      6          5          4          3          2 1 0
//     before       unit       chunk 2    chunk 1    lane 2     lane 1     element
//     after        unit       chunk 2    lane 1     lane 2     chunk 1    element
//
// Bits 3 and 5 change places on the way: half of the values go to the neighbour lane, instead of
// all values there and back. A lane loads pieces of 16 bytes, four lanes 64 bytes side by side, and
// stores pieces of 16 codes, four lanes 64 bytes side by side.
#pragma once

#include "../int_math.h"

namespace lrq {

constexpr int kTransform = 128;
constexpr int kUnitLanes = 4;
constexpr int kChunks = 4;  // of a lane
constexpr int kChunkElements = 8;
constexpr int kWarpUnits = 32 / kUnitLanes;
constexpr int kWarpElements = kWarpUnits * kTransform;  // 1024

// First of the 8 neighbours of a lane's chunk, among its warp's 1024: before the transform,
LRQ_HOST_DEVICE constexpr int lane_chunk_to_k(int lane, int chunk) {
  return kTransform * (lane / kUnitLanes) + kChunkElements * (lane % kUnitLanes) + 32 * chunk;
}

// and after it.
LRQ_HOST_DEVICE constexpr int lane_result_to_k(int lane, int chunk) {
  return kTransform * (lane / kUnitLanes) + 64 * (chunk / 2) + 32 * (lane % 2) +
         16 * (lane / 2 % 2) + 8 * (chunk % 2);
}

}  // namespace lrq
