// The device layout of packed weights: pictures and index maps, host and device, no torch, no CUDA.
//
// A weight [N, K] of b-bit codes (b = 4, 3, 2), padded to multiples of 128 with device code 0, is
//
//     int32 [N/128][K/128][2][256*b]          one half tile = 64 channels x 128 k = 256*b words
//
//               k 0..127   k 128..255
//     n   0.. 63 +--------+--------+          storage order of the half tiles:
//                |   0    |   2    |          both halves of a 128 x 128 tile are neighbours, so
//     n  64..127 +--------+--------+          one pipeline stage of a GEMM is one contiguous copy
//                |   1    |   3    |          of 2048*b bytes
//     n 128..191 +--------+--------+
//                |   4    |   6    |
//
// Inside a half tile the words are dealt to 128 lanes, four warps of 32, in the order in which
// mma.m16n8k32 wants operand A. Warp w of the half tile owns rows 16w .. 16w+15. With g = lane/4 %
// 8 and t = lane % 4, a lane owns rows 16w + g + 8r (r = 0, 1) and, in each of the four 32-wide
// slices h of the 128 k, eight positions p:
//
//     k of a slice:  0  1  2  3 | 4  5  6  7 | 8 .. 11 | 12 .. 15 | 16 .. 19 | 20 .. 23 | ...
//     owner t:           0      |     1      |    2    |    3     |    0     |    1     | ...
//     position p:    0  1  2  3 | 0  1  2  3 | 0 ..  3 |  0 ..  3 |  4 ..  7 |  4 ..  7 | ...
//
//     k = 32h + 16(p/4) + 4t + p%4
//
// so positions 0..3 decode to register a[r] and positions 4..7 to a[2 + r] of slice h.
// A lane holds 2b words; nibble p of a word belongs to position p:
//
//     b = 4   word 2h + r            nibble = code(h, r, p)
//     b = 3   word 3r + i, i < 3     nibble = code(h=i, r, p) | bit i of code(h=3, r, p) << 3
//     b = 2   word 2i + r, i < 2     nibble = code(h=2i, r, p) | code(h=2i+1, r, p) << 2
//
// and the words of the 128 lanes lie so that every access is one wide conflict-free load:
//
//     b = 4   words 0-3 of all lanes (16 bytes each), then words 4-7
//     b = 3   words 0-3 of all lanes (16 bytes each), then words 4-5 (8 bytes each)
//     b = 2   words 0-3 of all lanes
//
// A *device code* is not the canonical code s<<(b-1) | m. With levels in ascending order
// v = L + m (s = 0) or L - 1 - m (s = 1), L = 2^(b-1), the device code is v for b = 3 and 2, and
// (v & 1) << 3 | v >> 1 for b = 4: neighbours in value become a pair that the sign-fill lookup of
// device/twin_log.cuh tells apart by the top bit.
#pragma once

#include <cstdint>

#include "../int_math.h"

namespace lrq {

constexpr int kTileChannels = 128;
constexpr int kTileInputs = 128;
constexpr int kHalfTileChannels = 64;
constexpr int kHalfTileLanes = 128;
constexpr int kSlices = 4;         // of 32 k in a tile
constexpr int kRowsPerLane = 2;    // r
constexpr int kPositions = 8;      // p
constexpr int kCanonicalRun = 32;  // codes that fill exactly `bits` canonical words

LRQ_HOST_DEVICE constexpr bool is_weight_bits(int bits) { return bits >= 2 && bits <= 4; }

LRQ_HOST_DEVICE constexpr int words_per_lane(int bits) { return 2 * bits; }

LRQ_HOST_DEVICE constexpr int half_tile_words(int bits) { return kHalfTileLanes * 2 * bits; }

// A code inside a half tile, seen from the matrix: channel 0..63, k 0..127.
struct HalfTileNK {
  int channel;
  int k;
};

// The same code, seen from its owner: lane 0..127, slice h, row r, position p.
struct LaneSlot {
  int lane;
  int slice;
  int row;
  int position;
};

LRQ_HOST_DEVICE constexpr HalfTileNK lane_to_nk(LaneSlot slot) {
  const int group = slot.lane % 32 / 4;
  const int thread = slot.lane % 4;
  return {16 * (slot.lane / 32) + group + 8 * slot.row,
          32 * slot.slice + 16 * (slot.position / 4) + 4 * thread + slot.position % 4};
}

LRQ_HOST_DEVICE constexpr LaneSlot nk_to_lane(HalfTileNK nk) {
  const int warp = nk.channel / 16;
  const int group = nk.channel % 8;
  const int thread = nk.k % 16 / 4;
  return {32 * warp + 4 * group + thread, nk.k / 32, nk.channel % 16 / 8,
          nk.k % 32 / 16 * 4 + nk.k % 4};
}

// A bit among the 2b words of a lane.
struct LaneBit {
  int word;
  int bit;
};

// Where bit `plane` of the device code of a slot lies (its lane does not matter).
LRQ_HOST_DEVICE constexpr LaneBit slot_to_lane_bit(int bits, LaneSlot slot, int plane) {
  const int nibble = 4 * slot.position;
  if (bits == 4) {
    return {2 * slot.slice + slot.row, nibble + plane};
  }
  if (bits == 3) {
    return slot.slice < 3 ? LaneBit{3 * slot.row + slot.slice, nibble + plane}
                          : LaneBit{3 * slot.row + plane, nibble + 3};
  }
  return {2 * (slot.slice / 2) + slot.row, nibble + 2 * (slot.slice % 2) + plane};
}

// A bit of a code: the slot that holds the code, and which of its bits.
struct SlotBit {
  LaneSlot slot;
  int plane;
};

LRQ_HOST_DEVICE constexpr SlotBit lane_bit_to_slot(int bits, int lane, LaneBit at) {
  const int position = at.bit / 4;
  const int in_nibble = at.bit % 4;
  if (bits == 4) {
    return {{lane, at.word / 2, at.word % 2, position}, in_nibble};
  }
  if (bits == 3) {
    return in_nibble < 3 ? SlotBit{{lane, at.word % 3, at.word / 3, position}, in_nibble}
                         : SlotBit{{lane, 3, at.word / 3, position}, at.word % 3};
  }
  return {{lane, 2 * (at.word / 2) + in_nibble / 2, at.word % 2, position}, in_nibble % 2};
}

// Offset in a half tile, in words, of word `word` of lane `lane`.
LRQ_HOST_DEVICE constexpr int lane_word_to_offset(int bits, int lane, int word) {
  const int chunk_words = word < 4 ? 4 : words_per_lane(bits) - 4;
  return word / 4 * (kHalfTileLanes * 4) + lane * chunk_words + word % 4;
}

struct LaneWord {
  int lane;
  int word;
};

LRQ_HOST_DEVICE constexpr LaneWord offset_to_lane_word(int bits, int offset) {
  const int chunk = offset / (kHalfTileLanes * 4);
  const int within = offset % (kHalfTileLanes * 4);
  const int chunk_words = chunk == 0 ? 4 : words_per_lane(bits) - 4;
  return {within / chunk_words, 4 * chunk + within % chunk_words};
}

// A bit of the whole packed weight: word offset from its start, bit in the word.
struct PackedBit {
  int64_t word;
  int bit;
};

// Index of the half tile that holds (n, k) when the weight has `k_tiles` tiles along K.
LRQ_HOST_DEVICE constexpr int64_t nk_to_half_tile(int64_t n, int64_t k, int64_t k_tiles) {
  return (n / kTileChannels * k_tiles + k / kTileInputs) * 2 +
         n % kTileChannels / kHalfTileChannels;
}

// The first (n, k) of a half tile: where the matrix begins that lane_to_nk counts from.
struct MatrixNK {
  int64_t n;
  int64_t k;
};

LRQ_HOST_DEVICE constexpr MatrixNK half_tile_to_nk(int64_t half_tile, int64_t k_tiles) {
  const int64_t tile = half_tile / 2;
  return {tile / k_tiles * kTileChannels + half_tile % 2 * kHalfTileChannels,
          tile % k_tiles * kTileInputs};
}

LRQ_HOST_DEVICE constexpr PackedBit nk_to_offset(int bits, int64_t n, int64_t k, int plane,
                                                 int64_t k_tiles) {
  const LaneSlot slot =
      nk_to_lane({static_cast<int>(n % kHalfTileChannels), static_cast<int>(k % kTileInputs)});
  const LaneBit at = slot_to_lane_bit(bits, slot, plane);
  return {nk_to_half_tile(n, k, k_tiles) * half_tile_words(bits) +
              lane_word_to_offset(bits, slot.lane, at.word),
          at.bit};
}

// The device code of (n, k), gathered bit by bit: for unpacking, not for a hot path.
LRQ_HOST_DEVICE int load_device_code(const uint32_t* packed, int bits, int64_t n, int64_t k,
                                     int64_t k_tiles) {
  int code = 0;
  for (int plane = 0; plane < bits; ++plane) {
    const PackedBit at = nk_to_offset(bits, n, k, plane, k_tiles);
    code |= static_cast<int>(packed[at.word] >> at.bit & 1u) << plane;
  }
  return code;
}

LRQ_HOST_DEVICE constexpr int canonical_to_ascending(int bits, int code) {
  const int half = 1 << (bits - 1);
  return code < half ? half + code : half - 1 - (code - half);
}

LRQ_HOST_DEVICE constexpr int ascending_to_canonical(int bits, int order) {
  const int half = 1 << (bits - 1);
  return order >= half ? order - half : half + (half - 1 - order);
}

LRQ_HOST_DEVICE constexpr int canonical_to_device_code(int bits, int code) {
  const int order = canonical_to_ascending(bits, code);
  return bits == 4 ? (order & 1) << 3 | order >> 1 : order;
}

LRQ_HOST_DEVICE constexpr int device_to_canonical_code(int bits, int code) {
  return ascending_to_canonical(bits, bits == 4 ? (code & 7) << 1 | code >> 3 : code);
}

}  // namespace lrq
