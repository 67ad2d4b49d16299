// The portable GEMM: mma.sync.m16n8k32 on int8, for sm_80 and newer.
//
// Y^T = W * X^T. Operand A is the weight, decoded from packed words to registers by the warp that
// uses it; operand B is X, which needs no transpose: a column of B is a token's row. Per stage of
// 128 k
//
//     shared memory   x  [tile_m][128] int8, 16-byte chunk c of token m stored at chunk c ^ (m % 8)
//                     w  the 128 x 128 tile of the packed weight as it lies in memory
//
//     warp (wn, wm)   channels wn * 16 * kChannelTiles ..., tokens wm * 8 * kTokenTiles ...
//
// The swizzle puts the same chunk of eight neighbouring tokens, which is what ldmatrix reads at
// once, into eight different groups of four banks.
#pragma once

#include <cstdint>

#include "../device/sm80.cuh"
#include "../device/twin_log.cuh"
#include "../layout/packed_weight.h"
#include "config.h"
#include "epilogue.cuh"
#include "problem.h"

namespace lrq {

template <int kBits_, int kConfigIndex>
struct GemmSm80 {
  static constexpr GemmConfig kConfig = kGemmConfigs[kConfigIndex];
  static constexpr int kBits = kBits_;
  static constexpr int kTileM = kConfig.tile_m;
  static constexpr int kTileN = kConfig.tile_n;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kWarpsN = kConfig.warps_n;
  static constexpr int kThreads = config_threads(kConfig);
  static constexpr int kBlocksPerSm = kConfig.blocks_per_sm;
  static constexpr int kSharedBytes = shared_bytes(kConfig, kBits);
  static constexpr int kChannelTiles = kTileN / kWarpsN / 16;       // of mma, per warp
  static constexpr int kTokenTiles = kTileM / kConfig.warps_m / 8;  // of mma, per warp

  static constexpr int kChunk = 16;                             // bytes of one cp.async
  static constexpr int kChunksPerToken = kTileInputs / kChunk;  // of a stage
  static constexpr int kTokensPerPass = kThreads / kChunksPerToken;
  static constexpr int kTileWords = 2 * half_tile_words(kBits);

  struct Stage {
    int8_t x[kTileM][kTileInputs];
    uint32_t w[kTileWords];
  };

  static_assert(kConfig.arch == 80, "a row of another kernel family");
  static_assert(kTileN == kTileChannels && kConfig.tile_k == kTileInputs, "the packed tile");
  static_assert(kTokenTiles % 2 == 0, "ldmatrix.x4 loads two token tiles");
  static_assert(kTokensPerPass % 8 == 0, "a thread's chunk keeps its swizzle from pass to pass");
  static_assert(sizeof(Stage) == stage_bytes(kConfig, kBits) && sizeof(Stage) % 128 == 0,
                "the planner and the kernel agree on shared memory");
};

struct TileIndex {
  int m;
  int n;
};

// Blocks run in bands of 16 channel tiles, channels fastest: a wave of blocks then reads a small
// part of X once and finds the weights of its band in L2.
__device__ __forceinline__ TileIndex block_to_tile(int block, int m_tiles, int n_tiles) {
  const int band_tiles = min_of(16, n_tiles);
  const int band = block / (band_tiles * m_tiles);
  const int within = block - band * band_tiles * m_tiles;
  const int width = min_of(band_tiles, n_tiles - band * band_tiles);
  return {within / width, band * band_tiles + within % width};
}

template <int kBits, int kConfigIndex>
__global__ void __launch_bounds__(GemmSm80<kBits, kConfigIndex>::kThreads,
                                  GemmSm80<kBits, kConfigIndex>::kBlocksPerSm)
    gemm_sm80_kernel(const __grid_constant__ GemmArgs args, const bool aligned) {
  using Gemm = GemmSm80<kBits, kConfigIndex>;
  using Stage = typename Gemm::Stage;
  constexpr int kChannelTiles = Gemm::kChannelTiles;
  constexpr int kTokenTiles = Gemm::kTokenTiles;

  extern __shared__ __align__(128) unsigned char shared[];
  Stage* const stages = reinterpret_cast<Stage*>(shared);
  int* const staging = reinterpret_cast<int*>(shared);

  const int m_size = static_cast<int>(args.problem.m);
  const int n_size = static_cast<int>(args.problem.n);
  const int k_size = static_cast<int>(args.problem.k);
  const int k_tiles = ceil_div(k_size, kTileInputs);
  const TileIndex tile =
      block_to_tile(blockIdx.x, ceil_div(m_size, Gemm::kTileM), ceil_div(n_size, Gemm::kTileN));
  const int m0 = tile.m * Gemm::kTileM;
  const int n0 = tile.n * Gemm::kTileN;

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warp_channel = warp % Gemm::kWarpsN * (16 * kChannelTiles);
  const int warp_token = warp / Gemm::kWarpsN * (8 * kTokenTiles);
  const int group = lane / 4;   // mma's g: row of A and C, column of B
  const int thread = lane % 4;  // mma's t

  // Copies one k tile into a stage: X with zeros past M and K, whole weight tiles.
  const int copy_token = threadIdx.x / Gemm::kChunksPerToken;
  const int copy_chunk = threadIdx.x % Gemm::kChunksPerToken;
  const int8_t* const copy_x =
      args.x_q + (m0 + copy_token) * args.x_stride + copy_chunk * Gemm::kChunk;
  const uint32_t* const copy_w =
      args.weight + static_cast<int64_t>(tile.n) * k_tiles * Gemm::kTileWords;
  const auto copy_stage = [&](int k_tile, Stage& stage) {
    const int k = k_tile * kTileInputs + copy_chunk * Gemm::kChunk;
    const int valid = max_of(min_of(k_size - k, Gemm::kChunk), 0);
    const uint32_t target = shared_address(stage.x) + copy_token * kTileInputs +
                            (copy_chunk ^ copy_token % 8) * Gemm::kChunk;
#pragma unroll
    for (int first = 0; first < Gemm::kTileM; first += Gemm::kTokensPerPass) {
      if (Gemm::kTokensPerPass > Gemm::kTileM && copy_token >= Gemm::kTileM) {
        break;
      }
      // Past M nothing is read, so the address need not exist. 32-bit offsets save the registers
      // that would spill: kLargestRowStride bounds them.
      const bool inside = m0 + first + copy_token < m_size;
      const uint32_t offset = first * static_cast<int>(args.x_stride) + k_tile * kTileInputs;
      cp_async_16(target + first * kTileInputs, copy_x + offset, inside ? valid : 0);
    }
    const uint32_t* source = copy_w + static_cast<int64_t>(k_tile) * Gemm::kTileWords;
#pragma unroll
    for (int word = 0; word < Gemm::kTileWords; word += 4 * Gemm::kThreads) {
      const int mine = word + 4 * threadIdx.x;
      if (Gemm::kTileWords % (4 * Gemm::kThreads) == 0 || mine < Gemm::kTileWords) {
        cp_async_16(shared_address(&stage.w[mine]), source + mine, 16);
      }
    }
  };

  // Every step commits a group, empty ones too, so that "all but kStages - 2" means "this tile".
  // The first copies leave before anything else is waited for.
#pragma unroll
  for (int k_tile = 0; k_tile < Gemm::kStages - 1; ++k_tile) {
    if (k_tile < k_tiles) {
      copy_stage(k_tile, stages[k_tile]);
    }
    cp_async_commit();
  }

  // The lookup tables of this lane's rows. Rows past N decode to anything: they are not stored.
  LevelTable<kBits> tables[kChannelTiles][kRowsPerLane];
#pragma unroll
  for (int i = 0; i < kChannelTiles; ++i) {
#pragma unroll
    for (int row = 0; row < kRowsPerLane; ++row) {
      const int n = min_of(n0 + warp_channel + 16 * i + group + 8 * row, n_size - 1);
      tables[i][row] = load_level_table<kBits>(args.levels, args.table_of_row, n);
    }
  }

  // Matrices 0..3 of ldmatrix.x4: (tokens 0-7, k 0-15), (tokens 0-7, k 16-31), the same of tokens
  // 8-15.
  const int matrix = lane / 8;
  const int matrix_row = lane % 8;
  const int matrix_token = warp_token + matrix / 2 * 8 + matrix_row;
  const int matrix_chunk = (matrix % 2 ^ matrix_row) * Gemm::kChunk;

  int acc[kChannelTiles][kTokenTiles][4] = {};
  const auto multiply_stage = [&](const Stage& stage) {
    uint32_t words[kChannelTiles][words_per_lane(kBits)];
    const uint32_t x_row = shared_address(&stage.x[matrix_token][0]);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      uint32_t a[kChannelTiles][4];
#pragma unroll
      for (int i = 0; i < kChannelTiles; ++i) {
        const int channel = warp_channel + 16 * i;
        const uint32_t* half_tile = stage.w + channel / kHalfTileChannels * half_tile_words(kBits);
        load_slice_words<kBits>(words[i], half_tile, channel % kHalfTileChannels / 16 * 32 + lane,
                                slice);
        decode_slice<kBits>(a[i], words[i], tables[i], slice);
      }
      const uint32_t x_chunk = x_row + (matrix_chunk ^ slice * 2 * Gemm::kChunk);
#pragma unroll
      for (int pair = 0; pair < kTokenTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, x_chunk + pair * 16 * kTileInputs);
#pragma unroll
        for (int i = 0; i < kChannelTiles; ++i) {
          mma_m16n8k32_s8(acc[i][2 * pair], a[i], b[0], b[1]);
          mma_m16n8k32_s8(acc[i][2 * pair + 1], a[i], b[2], b[3]);
        }
      }
    }
  };

  int slot = 0;
  int free_slot = Gemm::kStages - 1;
#pragma unroll 1
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    cp_async_wait<Gemm::kStages - 2>();
    // After this barrier the tile is visible to all warps, and all have left the slot before it.
    __syncthreads();
    if (k_tile + Gemm::kStages - 1 < k_tiles) {
      copy_stage(k_tile + Gemm::kStages - 1, stages[free_slot]);
    }
    cp_async_commit();
    multiply_stage(stages[slot]);
    free_slot = slot;
    slot = slot + 1 == Gemm::kStages ? 0 : slot + 1;
  }

  // The staging takes the place of the pipeline: all warps must have left it.
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kChannelTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const int channel = warp_channel + 16 * i + group + reg / 2 * 8;
        const int token = warp_token + 8 * j + 2 * thread + reg % 2;
        staging[token_channel_to_staging(token, channel, Gemm::kTileN)] = acc[i][j][reg];
      }
    }
  }
  __syncthreads();
  store_tile_as<Gemm::kTileN, Gemm::kThreads>(StagedSums<Gemm::kTileN>{staging}, args, m0, n0,
                                              Gemm::kTileM, threadIdx.x, aligned);
}

}  // namespace lrq
