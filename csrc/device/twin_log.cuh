// Packed words -> levels in the registers of an mma.m16n8k32 A operand. The only decoder.
//
// A level is looked up by byte permute: eight levels fill the two source registers of PRMT, and a
// nibble of the packed word is its selector. For b = 3 and 2 the top bit of a selector is masked
// off and the lookup is direct. For b = 4 the table has sixteen entries, and the top bit s of the
// nibble s<<3 | i chooses between the pair (L[i], L[i+8]) by PRMT's sign fill:
//
//     even[i] = L[i],   odd[i] = L[i+8] ^ signfill(L[i+8])   (never negative)
//     level = prmt(even, x) ^ prmt(odd, x ^ 8)
//
//     s = 0:   L[i]            ^  signfill(odd[i]) = 0                 ->  L[i]
//     s = 1:   signfill(L[i])  ^  L[i+8] ^ signfill(L[i+8])            ->  L[i+8]
//
// which is exact because a pair has one sign: levels ascend, the format holds half of them
// negative, and L[i], L[i+8] are neighbours in value (layout/packed_weight.h).
#pragma once

#include <cstdint>

#include "../layout/packed_weight.h"
#include "sm80.cuh"

namespace lrq {

// The lookup table of one channel, in device-code order.
template <int kBits>
struct LevelTable;

template <>
struct alignas(16) LevelTable<4> {
  uint32_t even03, even47, odd03, odd47;
};

template <>
struct alignas(8) LevelTable<3> {
  uint32_t level03, level47;
};

template <>
struct LevelTable<2> {
  uint32_t level03;
};

// Four bytes in reverse order.
__device__ __forceinline__ uint32_t reverse_bytes(uint32_t bytes) { return prmt(bytes, 0, 0x0123); }

// Bytes >= 0 unchanged, bytes < 0 complemented.
__device__ __forceinline__ uint32_t fold_signs(uint32_t bytes) {
  return bytes ^ prmt(bytes, bytes, 0xba98);
}

// The canonical levels of one channel: the non-negative half upward, then the negative half
// downward.
template <int kBits>
struct CanonicalLevels {
  uint32_t word[(1 << kBits) / 4];
};

// `levels`: [2^kBits] int8, aligned to their size.
template <int kBits>
__device__ __forceinline__ CanonicalLevels<kBits> load_canonical_levels(const int8_t* levels) {
  if constexpr (kBits == 4) {
    const uint4 four = __ldg(reinterpret_cast<const uint4*>(levels));
    return {{four.x, four.y, four.z, four.w}};
  } else if constexpr (kBits == 3) {
    const uint2 two = __ldg(reinterpret_cast<const uint2*>(levels));
    return {{two.x, two.y}};
  } else {
    return {{__ldg(reinterpret_cast<const uint32_t*>(levels))}};
  }
}

template <int kBits>
__device__ __forceinline__ LevelTable<kBits> make_level_table(
    const CanonicalLevels<kBits>& canonical) {
  const uint32_t (&word)[(1 << kBits) / 4] = canonical.word;
  if constexpr (kBits == 4) {
    const uint32_t ascending[4] = {reverse_bytes(word[3]), reverse_bytes(word[2]), word[0],
                                   word[1]};
    return {prmt(ascending[0], ascending[1], 0x6420), prmt(ascending[2], ascending[3], 0x6420),
            fold_signs(prmt(ascending[0], ascending[1], 0x7531)),
            fold_signs(prmt(ascending[2], ascending[3], 0x7531))};
  } else if constexpr (kBits == 3) {
    return {reverse_bytes(word[1]), word[0]};
  } else {
    return {prmt(word[0], 0, 0x1023)};
  }
}

// Table of channel n: its own, or, where `table_of_row` is not null, the one that it names.
template <int kBits>
__device__ __forceinline__ LevelTable<kBits> load_level_table(const int8_t* levels,
                                                              const uint8_t* table_of_row,
                                                              int64_t n) {
  const int64_t table = table_of_row == nullptr ? n : __ldg(table_of_row + n);
  return make_level_table<kBits>(load_canonical_levels<kBits>(levels + (table << kBits)));
}

// The levels of four codes, whose nibbles are the low 16 bits of `nibbles` (codes below 8 for
// kBits = 3, below 4 for kBits = 2).
template <int kBits>
__device__ __forceinline__ uint32_t lookup_levels(const LevelTable<kBits>& table,
                                                  uint32_t nibbles) {
  if constexpr (kBits == 4) {
    return prmt(table.even03, table.even47, nibbles) ^
           prmt(table.odd03, table.odd47, nibbles ^ 0x8888u);
  } else if constexpr (kBits == 3) {
    return prmt(table.level03, table.level47, nibbles);
  } else {
    return prmt(table.level03, table.level03, nibbles);
  }
}

// The words of lane `lane` (0..127) of a half tile, in shared or global memory, that slice `slice`
// is the first to need: all of them at once would cost b = 4 registers that its later slices can
// wait for.
template <int kBits>
__device__ __forceinline__ void load_slice_words(uint32_t (&words)[words_per_lane(kBits)],
                                                 const uint32_t* half_tile, int lane, int slice) {
  const bool first_half = slice == 0;
  const bool second_half = kBits == 4 && slice == 2;
  if (first_half || second_half) {
    const int word = second_half ? 4 : 0;
    const uint4 four =
        *reinterpret_cast<const uint4*>(half_tile + lane_word_to_offset(kBits, lane, word));
    words[word] = four.x;
    words[word + 1] = four.y;
    words[word + 2] = four.z;
    words[word + 3] = four.w;
  }
  if constexpr (kBits == 3) {
    if (first_half) {
      const uint2 two =
          *reinterpret_cast<const uint2*>(half_tile + lane_word_to_offset(kBits, lane, 4));
      words[4] = two.x;
      words[5] = two.y;
    }
  }
}

// Whether decode_slice of `slice` reads word `word`.
__device__ constexpr bool slice_reads_word(int bits, int slice, int word) {
  switch (bits) {
    case 4:
      return word / 2 == slice;
    case 3:
      return slice == 3 || word % 3 == slice;
    default:
      return word / 2 == slice / 2;
  }
}

// All words of a lane.
template <int kBits>
__device__ __forceinline__ void load_lane_words(uint32_t (&words)[words_per_lane(kBits)],
                                                const uint32_t* half_tile, int lane) {
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    load_slice_words<kBits>(words, half_tile, lane, slice);
  }
}

// Selector nibbles of slice `slice`, row `row`, position p in nibble p. Constant after unrolling.
template <int kBits>
__device__ __forceinline__ uint32_t slice_nibbles(const uint32_t (&words)[words_per_lane(kBits)],
                                                  int slice, int row) {
  if constexpr (kBits == 4) {
    return words[2 * slice + row];
  } else if constexpr (kBits == 3) {
    const uint32_t* row_words = words + 3 * row;
    if (slice < 3) {
      return row_words[slice] & 0x77777777u;
    }
    return (row_words[0] >> 3 & 0x11111111u) | (row_words[1] >> 2 & 0x22222222u) |
           (row_words[2] >> 1 & 0x44444444u);
  } else {
    return words[2 * (slice / 2) + row] >> 2 * (slice % 2) & 0x33333333u;
  }
}

// Operand A of k32 slice `slice`: a[r] = row r, k 4t..4t+3; a[2 + r] = row r, k 16 + 4t...
template <int kBits>
__device__ __forceinline__ void decode_slice(uint32_t (&a)[4],
                                             const uint32_t (&words)[words_per_lane(kBits)],
                                             const LevelTable<kBits> (&tables)[kRowsPerLane],
                                             int slice) {
#pragma unroll
  for (int row = 0; row < kRowsPerLane; ++row) {
    const uint32_t nibbles = slice_nibbles<kBits>(words, slice, row);
    a[row] = lookup_levels<kBits>(tables[row], nibbles);
    a[2 + row] = lookup_levels<kBits>(tables[row], nibbles >> 16);
  }
}

// Four levels as floats. A byte with its sign bit flipped, level + 128, put under the exponent of
// 2^23 is the float 2^23 + 128 + level: one PRMT and one exact subtraction, both at full rate,
// which integer conversion is not.
__device__ __forceinline__ void levels_to_float(float (&value)[4], uint32_t levels) {
  const uint32_t biased = levels ^ 0x80808080u;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    value[i] = __uint_as_float(prmt(biased, 0x4b000000u, 0x7440u | i)) - 8388736.0f;
  }
}

}  // namespace lrq
