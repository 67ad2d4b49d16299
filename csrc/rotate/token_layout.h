// Which k of a token a lane holds, before and after the Hadamard transform on tensor cores.
//
// A warp transforms 1024 neighbours of a token: 8 blocks of 128, each 16 lines of 8 neighbours.
//
//     bits of k       9 8 7    6 5 4 3    2 1 0
//     selects         block    line       element of the line
//
// The natural (Sylvester) Hadamard matrix is one butterfly for each bit of k, in any order, so each
// stage goes where its bit lies. Lines: mma.m16n8k8 with the 16 x 16 Hadamard matrix as A, whose
// 16 columns are two k8 steps; a column of B and D is a block, and every element has a product of
// its own. Elements, and blocks within a rotation of 256 to 1024: additions. Of lane = 4g + t
// (mma's names):
//
//     before, operand B:  block g, lines t, t+4 (step 0), t+8, t+12 (step 1), all elements:
//                         four pieces of 16 bytes of 16-bit values
//     after, operand D:   blocks 2t, 2t+1, lines 2g, 2g+1, all elements:
//                         two runs of 16 neighbours, whose codes are 16 bytes each
//
//     block 0 before:  line  0   1   2   3   4   5   6   7   8  ...  15
//                      lane  0   1   2   3   0   1   2   3   0  ...   3
//     block 0 after:   line  0   1   2   3   4   5   6   7   8  ...  15
//                      lane  0   0   4   4   8   8  12  12  16  ...  28
//
// so rows are permuted in mma's eyes alone: row g + 8r is line 2g + r. Codes come out in natural
// order without a shuffle.
#pragma once

#include "../int_math.h"

namespace lrq {

constexpr int kLineElements = 8;
constexpr int kBlockLines = 16;
constexpr int kTransform = kBlockLines * kLineElements;  // 128
constexpr int kWarpBlocks = 8;
constexpr int kWarpElements = kWarpBlocks * kTransform;  // 1024
constexpr int kLaneChunks = 4;                           // lines of a lane before the transform
constexpr int kMmaSteps = 2;

// Line of row 0..15 of A and D.
LRQ_HOST_DEVICE constexpr int mma_row_to_line(int row) { return 2 * (row % 8) + row / 8; }

// Line of column 0..7 of A (row of B) in step 0 or 1.
LRQ_HOST_DEVICE constexpr int mma_column_to_line(int step, int column) { return 8 * step + column; }

// Line of a lane's chunk 0..3, which is register chunk % 2 of operand B in step chunk / 2.
LRQ_HOST_DEVICE constexpr int lane_chunk_to_line(int lane, int chunk) {
  return lane % 4 + 4 * chunk;
}

// First of the 8 neighbours of a lane's chunk, among the warp's 1024.
LRQ_HOST_DEVICE constexpr int lane_chunk_to_k(int lane, int chunk) {
  return kTransform * (lane / 4) + kLineElements * lane_chunk_to_line(lane, chunk);
}

// First of the 8 neighbours of register `column + 2 * upper` of a lane's operands D.
LRQ_HOST_DEVICE constexpr int lane_result_to_k(int lane, int column, int upper) {
  return kTransform * (2 * (lane % 4) + column) +
         kLineElements * mma_row_to_line(lane / 4 + 8 * upper);
}

// Whether the natural Hadamard matrix has -1 at (row, column).
LRQ_HOST_DEVICE constexpr bool hadamard_is_negative(int row, int column) {
  int common = row & column;
  common ^= common >> 8;
  common ^= common >> 4;
  common ^= common >> 2;
  common ^= common >> 1;
  return (common & 1) != 0;
}

}  // namespace lrq
