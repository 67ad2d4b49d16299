// The Hopper GEMM with 16-bit activations: wgmma on bf16 or fp16, for sm_90a.
//
//     y[m, n] = rn(fma(sum_k x[m, k] * level[n, code[n, k]], weight_scale[n], bias[n]))
//
// Levels are int8, which both types hold exactly, so a product is exact and the sum is fp32: closer
// than a dequantized weight, which rounds. Y^T = W * X^T as in gemm_sm90.cuh: a consumer warpgroup
// decodes the codes of its 64 channels in registers (operand A). A block has
//
//     warpgroups 0, 1 (, 2)   consumers of 64 channels of the tile each
//     the last warpgroup      one thread of it asks for copies
//
//     per stage of 128 k      x  two boxes [kTileM][64] by TMA, in the 128-byte swizzle
//                             w  a half tile of the packed weight for each consumer
//
// Two consumers of up to 256 tokens; or three of fewer, for weights that tiles of 192 channels
// divide better.
//
// The packed weight is dealt out for operands of 8 bits: lane t of four has k 4t..4t+3 of every
// sixteen, where operand A of 16 bits wants 2t, 2t+1 and 2t+8, 2t+9. So codes change lanes, eight
// in a word, before they are decoded:
//
//     k of sixteen      0 1 | 2 3 | 4 5 | 6 7 | 8 9 | 10 11 | 12 13 | 14 15
//     has               0     0     1     1     2     2       3       3
//     wants             0     1     2     3     0     1       2       3
//
// that is, lane t takes pair t % 2 of lane t / 2, then pair t % 2 of lane 2 + t / 2.
//
// A warp whose product waits for the one before issues nothing else. So decoding is dealt out
// between the products of a stage, a slice of 32 k (two products) at a time, three slices ahead:
//
//     products of slice      0       1       2       3       0 ...
//     decoded under them         3       0'      1'      2'      3' ...     (' of the next stage)
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../device/numeric.cuh"
#include "../device/sm90.cuh"
#include "../device/twin_log.cuh"
#include "../device/wgmma_16.cuh"
#include "../layout/packed_weight.h"
#include "config.h"
#include "problem.h"
#include "stages_sm90.cuh"

namespace lrq {

constexpr int kA16BoxInputs = 64;     // 128 bytes of a token, a row of the swizzle
constexpr int kA16StagedTokens = 32;  // of a warpgroup's results on their way out

template <int kBits_, typename T_, int kTileM_, int kConsumers_>
struct GemmA16 {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr int kTileM = kTileM_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kTileN = kConsumers * kHalfTileChannels;
  static constexpr int kConsumerWarps = kConsumers * kWarpgroupThreads / 32;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kHalfWords = half_tile_words(kBits);
  static constexpr uint32_t kBoxBytes = kTileM * kA16BoxInputs * 2;
  static constexpr int kStagingBytes = kA16StagedTokens * kHalfTileChannels * 2;
  static constexpr int kSharedLimit = 226 * 1024;
  static constexpr int kStagesThatFit =
      (kSharedLimit - kConsumers * kStagingBytes) /
      static_cast<int>(2 * kBoxBytes + kConsumers * kHalfWords * 4 + 16);
  static constexpr int kStages = kStagesThatFit < 8 ? kStagesThatFit : 8;

  struct Shared {
    alignas(kSwizzleBytes) unsigned char x[kStages][2][kBoxBytes];
    alignas(kSwizzleBytes) unsigned char staging[kConsumers][kStagingBytes];
    alignas(128) uint32_t w[kStages][kConsumers][kHalfWords];
    uint64_t full[kStages];
    uint64_t empty[kStages];
  };

  static_assert(kTileM % kA16StagedTokens == 0, "whole parts of staged tokens");
  static_assert(kStages >= 3 && sizeof(Shared) <= 227 * 1024, "what a block may have");
};

struct GemmA16Params {
  GemmProblem problem;
  const uint32_t* weight;
  const int8_t* levels;
  const uint8_t* table_of_row;
  const float* weight_scale;
  const float* bias;
  void* y;
  bool aligned;  // rows of y start and end at multiples of 16 bytes
};

// Blocks run in bands of 16 channel tiles, channels fastest, so that a wave finds its X in L2.
struct A16Tile {
  int m;
  int n;

  __device__ __forceinline__ A16Tile(int tile, int m_tiles, int n_tiles) {
    const int band_tiles = min_of(16, n_tiles);
    const int band = tile / (band_tiles * m_tiles);
    const int within = tile - band * band_tiles * m_tiles;
    const int width = min_of(band_tiles, n_tiles - band * band_tiles);
    m = within / width;
    n = band * band_tiles + within % width;
  }
};

// Words first.. of lane t become those whose nibbles are in the order that operand A of 16 bits
// wants.
template <int kWords>
__device__ __forceinline__ void exchange_pairs(uint32_t (&words)[kWords], int first, int count,
                                               int lane) {
  const int source = (lane & ~3) + lane % 4 / 2;
  const uint32_t selector = lane % 2 == 0 ? 0x6240u : 0x7351u;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const uint32_t low = __shfl_sync(0xffffffffu, words[first + i], source);
    const uint32_t high = __shfl_sync(0xffffffffu, words[first + i], source + 2);
    words[first + i] = prmt(low, high, selector);
  }
}

// Bytes 2 pair and 2 pair + 1 of four int8 levels as two values of T.
//
// fp16: level + 128 under the exponent of 2^10 is 1024 + 128 + level. bf16 has 7 bits below its
// leading one: the low 7 bits of the level under that of 2^7 are 128 + level mod 128, the sign bit
// there is 128, or 256 for a negative level.
template <typename T>
__device__ __forceinline__ uint32_t widen_levels(uint32_t levels, int pair) {
  const uint32_t selector = pair == 0 ? 0x4140u : 0x4342u;
  if constexpr (std::is_same_v<T, __half>) {
    const uint32_t biased = prmt(levels ^ 0x80808080u, 0x64646464u, selector);
    const __half2 value = __hsub2(reinterpret_cast<const __half2&>(biased), __half2half2(1152.0f));
    return reinterpret_cast<const uint32_t&>(value);
  } else {
    const uint32_t both = prmt(levels, 0x43434343u, selector);
    const uint32_t rest = both & 0xff7fff7fu;
    const uint32_t sign = both & 0xff80ff80u;
    const __nv_bfloat162 value = __hsub2(reinterpret_cast<const __nv_bfloat162&>(rest),
                                         reinterpret_cast<const __nv_bfloat162&>(sign));
    return reinterpret_cast<const uint32_t&>(value);
  }
}

template <typename Gemm>
__device__ __forceinline__ void produce_a16(typename Gemm::Shared& shared, const CUtensorMap& x_map,
                                            const GemmA16Params& params, int m_tiles, int n_tiles) {
  const int k_tiles = ceil_div(static_cast<int>(params.problem.k), kTileInputs);
  const int half_tiles = 2 * ceil_div(static_cast<int>(params.problem.n), kTileChannels);
  RingSlot<Gemm::kStages> ring;
  for (int i = blockIdx.x; i < m_tiles * n_tiles; i += gridDim.x) {
    const A16Tile tile(i, m_tiles, n_tiles);
    HalfTiles<Gemm::kConsumers, Gemm::kHalfWords> w(params.weight, tile.n * Gemm::kTileN,
                                                    half_tiles, 0, k_tiles);
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      const uint32_t full = shared_address(&shared.full[ring.slot]);
      mbarrier_wait(shared_address(&shared.empty[ring.slot]), ring.parity ^ 1);
      mbarrier_arrive_expect(full, 2 * Gemm::kBoxBytes + w.bytes());
      w.load(shared.w[ring.slot], full, true);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        tensor_load(shared_address(shared.x[ring.slot][half]), &x_map,
                    k_tile * kTileInputs + half * kA16BoxInputs, tile.m * Gemm::kTileM, full);
      }
      ring.advance();
    }
  }
}

template <typename Gemm>
__device__ __forceinline__ void consume_a16(typename Gemm::Shared& shared,
                                            const GemmA16Params& params, int m_tiles, int n_tiles) {
  using T = typename Gemm::T;
  constexpr int kBits = Gemm::kBits;
  constexpr int kTileM = Gemm::kTileM;
  const int m_size = static_cast<int>(params.problem.m);
  const int n_size = static_cast<int>(params.problem.n);
  const int k_tiles = ceil_div(static_cast<int>(params.problem.k), kTileInputs);
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0);
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int lane = threadIdx.x % 32;
  const int warp = thread / 32;
  const int channel = 16 * warp + lane / 4;  // this lane's first of 64; the other is 8 further

  uint32_t acc[kTileM / 2];
  uint32_t a[kSlices][2][4];  // two k16 of operand A for each slice
  uint32_t words[words_per_lane(kBits)];
  LevelTable<kBits> tables[kRowsPerLane];
  RingSlot<Gemm::kStages> ring;  // the stage that is decoded next
  int slot = 0;                  // of the stage that is multiplied

  // The first words are asked for before any is used, the others when those are used up.
  const auto load_words = [&](int slice) {
    load_slice_words<kBits>(words, shared.w[slot][warpgroup], thread, slice);
    constexpr int kFirst = kBits == 3 ? 6 : 4;
    exchange_pairs(words, slice == 0 ? 0 : 4, kFirst, lane);
  };
  const auto await_stage = [&] {
    mbarrier_wait(shared_address(&shared.full[ring.slot]), ring.parity);
    slot = ring.slot;
    ring.advance();
  };
  // Once no more than `pending` slices are being multiplied, none of which is a[slice].
  const auto decode = [&](int slice, auto pending) {
    wgmma_wait<decltype(pending)::value>();
    pin_registers(a[slice][0]);
    pin_registers(a[slice][1]);
#pragma unroll
    for (int word = 0; word < words_per_lane(kBits); ++word) {
      if (slice_reads_word(kBits, slice, word)) {
        pin_register(words[word]);
      }
    }
    uint32_t levels[4];
    decode_slice<kBits>(levels, words, tables, slice);
#pragma unroll
    for (int sixteen = 0; sixteen < 2; ++sixteen) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // row i % 2, pair i / 2
        a[slice][sixteen][i] = widen_levels<T>(levels[2 * sixteen + i % 2], i / 2);
      }
    }
  };
  constexpr std::integral_constant<int, 1> kOnePending;
  const auto multiply = [&](int of_slot, int slice, int accumulate) {
    const uint64_t x = swizzled_descriptor(shared_address(shared.x[of_slot][slice / 2])) +
                       slice % 2 * 2 * kSliceDescriptorStep;
    wgmma_fence();
    wgmma_m64k16<T, kTileM>(acc, a[slice][0], x, accumulate);
    wgmma_m64k16<T, kTileM>(acc, a[slice][1], x + kSliceDescriptorStep, 1);
    wgmma_commit();
  };
  const auto release_slot = [&](int of_slot) {
    if (lane == 0) {
      mbarrier_arrive_cluster(cluster_address(shared_address(&shared.empty[of_slot]), 0));
    }
  };
  // Waits for the first stage of a tile, then for this warpgroup's lookup tables. Rows past N
  // decode to anything: they are not stored.
  const auto begin_tile = [&](const A16Tile& tile) {
    const int n0 = tile.n * Gemm::kTileN + warpgroup * kHalfTileChannels + channel;
#pragma unroll
    for (int row = 0; row < kRowsPerLane; ++row) {
      const int64_t n = min_of(n0 + 8 * row, n_size - 1);
      tables[row] = load_level_table<kBits>(params.levels, params.table_of_row, n);
    }
    await_stage();
    load_words(0);
  };
  const auto load_last_words = [&] {  // of slices 2 and 3, where those have words of their own
    if constexpr (kBits == 4) {
      load_words(2);
    }
  };

  A16Tile next(blockIdx.x, m_tiles, n_tiles);
  begin_tile(next);
  decode(0, kOnePending);  // nothing is under way
  decode(1, kOnePending);
  load_last_words();
  decode(2, kOnePending);
#pragma unroll 1
  for (int i = blockIdx.x; i < m_tiles * n_tiles; i += gridDim.x) {
    const A16Tile tile = next;
    const int n0 = tile.n * Gemm::kTileN + warpgroup * kHalfTileChannels;
    float weight_scale[kRowsPerLane];
    float bias[kRowsPerLane];
#pragma unroll
    for (int row = 0; row < kRowsPerLane; ++row) {
      const int n = min_of(n0 + channel + 8 * row, n_size - 1);
      weight_scale[row] = __ldg(params.weight_scale + n);
      // fma(a, b, -0) is rn(a * b) in every case, sign of zero included.
      bias[row] = params.bias != nullptr ? __ldg(params.bias + n) : -0.0f;
    }

    int left = slot;
#pragma unroll 1
    for (int k_tile = 1; k_tile < k_tiles; ++k_tile) {
      const int of_slot = slot;
      multiply(of_slot, 0, k_tile > 1 ? 1 : 0);
      decode(3, kOnePending);
      if (k_tile > 1) {
        release_slot(left);
      }
      left = of_slot;
      multiply(of_slot, 1, 1);
      await_stage();
      load_words(0);
      decode(0, kOnePending);
      multiply(of_slot, 2, 1);
      decode(1, kOnePending);
      load_last_words();
      multiply(of_slot, 3, 1);
      decode(2, kOnePending);
    }

    // The last stage: under its products the next tile is begun.
    const int last = slot;
    multiply(last, 0, k_tiles > 1 ? 1 : 0);
    decode(3, kOnePending);
    if (k_tiles > 1) {
      release_slot(left);
    }
    multiply(last, 1, 1);
    multiply(last, 2, 1);
    multiply(last, 3, 1);
    if (i + gridDim.x < static_cast<unsigned>(m_tiles * n_tiles)) {
      next = A16Tile(i + gridDim.x, m_tiles, n_tiles);
      begin_tile(next);
      decode(0, std::integral_constant<int, 3>{});
      decode(1, std::integral_constant<int, 2>{});
      load_last_words();
      decode(2, kOnePending);
    }
    wgmma_wait<0>();
    pin_registers(acc);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      pin_registers(a[slice][0]);
      pin_registers(a[slice][1]);
    }
    release_slot(last);

    // Thirty-two tokens at a time: registers to a [token][channel] tile by stmatrix.trans, warp w
    // in 16-byte chunks 2w and 2w + 1 of a token, stored at chunk ^ (token % 8); rows from there.
    unsigned char* const staging = shared.staging[warpgroup];
    const int matrix_token = lane / 16 * 8 + lane % 8;
    const int matrix_chunk = (warp * 2 + lane / 8 % 2) ^ lane % 8;
    const uint32_t matrix_row = shared_address(staging) + matrix_token * 128 + matrix_chunk * 16;
    const int m0 = tile.m * kTileM;
#pragma unroll
    for (int part = 0; part < kTileM / kA16StagedTokens; ++part) {
      const int part_token = part * kA16StagedTokens;
      if (m0 + part_token < m_size) {
#pragma unroll
        for (int sixteen = 0; sixteen < kA16StagedTokens; sixteen += 16) {
          uint32_t matrix[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {  // matrix j: channel row j % 2, tokens 8 (j / 2) ..
            const int row = j % 2;
            const uint32_t* sum = &acc[(part_token + sixteen + j / 2 * 8) / 2 + 2 * row];
            const Pack<T, 2> pair = {
                round_to<T>(__fmaf_rn(__uint_as_float(sum[0]), weight_scale[row], bias[row])),
                round_to<T>(__fmaf_rn(__uint_as_float(sum[1]), weight_scale[row], bias[row]))};
            memcpy(&matrix[j], &pair, sizeof(pair));
          }
          stmatrix_x4_trans(matrix_row + sixteen * 128, matrix);
        }
        named_barrier(1 + warpgroup, kWarpgroupThreads);
#pragma unroll
        for (int pass = 0; pass < kA16StagedTokens / 16; ++pass) {
          const int token = pass * 16 + thread / 8;
          const int chunk = thread % 8;
          const int64_t m = m0 + part_token + token;
          const int n = n0 + chunk * 8;
          const uint4 eight =
              *reinterpret_cast<const uint4*>(staging + token * 128 + (chunk ^ token % 8) * 16);
          T* const target = static_cast<T*>(params.y) + m * n_size + n;
          if (m < m_size && params.aligned && n < n_size) {
            store_global_16(target, eight);
          } else if (m < m_size) {
            Pack<T, 8> values;
            memcpy(&values, &eight, sizeof(values));
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              if (n + e < n_size) {
                target[e] = values.value[e];
              }
            }
          }
        }
        named_barrier(1 + warpgroup, kWarpgroupThreads);
      }
    }
  }
}

template <int kBits, typename T, int kTileM, int kConsumers>
__global__ void __launch_bounds__(GemmA16<kBits, T, kTileM, kConsumers>::kThreads, 1)
    gemm_a16_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                         const __grid_constant__ GemmA16Params params) {
  using Gemm = GemmA16<kBits, T, kTileM, kConsumers>;
  extern __shared__ __align__(kSwizzleBytes) unsigned char shared_bytes_of_block[];
  auto& shared = *reinterpret_cast<typename Gemm::Shared*>(shared_bytes_of_block);

  const int m_tiles = ceil_div(static_cast<int>(params.problem.m), kTileM);
  const int n_tiles = ceil_div(static_cast<int>(params.problem.n), Gemm::kTileN);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // known uniform
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Gemm::kStages; ++stage) {
      mbarrier_init(shared_address(&shared.full[stage]), 1);
      mbarrier_init(shared_address(&shared.empty[stage]), Gemm::kConsumerWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (warp >= Gemm::kConsumerWarps) {
    release_registers<producer_registers(kConsumers)>();
    if (warp == Gemm::kConsumerWarps && threadIdx.x % 32 == 0) {
      produce_a16<Gemm>(shared, x_map, params, m_tiles, n_tiles);
    }
  } else {
    acquire_registers<consumer_registers(kConsumers)>();
    consume_a16<Gemm>(shared, params, m_tiles, n_tiles);
  }
}

}  // namespace lrq
