// The table of GEMM tile configurations and the choice among them. Host only, no torch, no CUDA.
//
// Y^T[N, M] = W[N, K] * X^T[K, M]: a thread block owns tile_n channels x tile_m tokens and walks K
// in steps of tile_k. Its warps form a grid of warps_n x warps_m; a warp decodes the weights of
// tile_n / warps_n channels once per step and uses them for tile_m / warps_m tokens. Every
// configuration gives bit-identical output.
//
// Two kernel families: rows of arch 80 are mma.sync (gemm_sm80.cuh), one tile a block; rows of arch
// 90 are wgmma (gemm_sm90.cuh), two or three consumer warpgroups of 64 channels beside one of
// producers, in blocks that stay and walk over tiles, singly or in clusters of two along the
// channels, or in clusters along K that share one tile.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "../int_math.h"
#include "../layout/packed_weight.h"
#include "problem.h"

namespace lrq {

// Whether this build holds code for sm_90a: setup.py says where it does not.
#ifdef LRQ_WITHOUT_SM90A
inline constexpr bool kSm90Compiled = false;
#else
inline constexpr bool kSm90Compiled = true;
#endif

struct GemmConfig {
  const char* name;
  int arch;           // oldest compute capability that runs it, 10 * major + minor
  int tile_m;         // tokens
  int tile_n;         // channels
  int tile_k;         // inputs of one pipeline stage
  int warps_n;        // warps along the channels (arch 90: of the consumers)
  int warps_m;        // warps along the tokens
  int stages;         // pipeline stages in shared memory
  int blocks_per_sm;  // thread blocks that must fit the registers of an SM
  int cluster;        // blocks along the channels that share the copies of X
  int split_k = 1;    // blocks along K that share a tile
};

// Of the rows of an architecture that do not split K the largest token tile comes first, and the
// larger cluster, which both selections prefer; then those that do. Rows of arch 90 with one tile
// have one number of stages, so that they share a kernel.
inline constexpr GemmConfig kGemmConfigs[] = {
    {"sm80_m128", 80, 128, 128, 128, 4, 2, 3, 2, 1},
    {"sm80_m64", 80, 64, 128, 128, 4, 2, 4, 2, 1},
    {"sm80_m32", 80, 32, 128, 128, 8, 1, 4, 2, 1},
    {"sm80_m16", 80, 16, 128, 128, 8, 1, 6, 2, 1},
    {"sm90_m256_c2", 90, 256, 128, 128, 8, 1, 4, 1, 2},
    {"sm90_m256", 90, 256, 128, 128, 8, 1, 4, 1, 1},
    {"sm90_m224_c2", 90, 224, 128, 128, 8, 1, 4, 1, 2},
    {"sm90_m224", 90, 224, 128, 128, 8, 1, 4, 1, 1},
    {"sm90_n192_m192_c2", 90, 192, 192, 128, 12, 1, 4, 1, 2},
    {"sm90_n192_m192", 90, 192, 192, 128, 12, 1, 4, 1, 1},
    {"sm90_m192_c2", 90, 192, 128, 128, 8, 1, 5, 1, 2},
    {"sm90_m192", 90, 192, 128, 128, 8, 1, 5, 1, 1},
    {"sm90_n192_m128", 90, 128, 192, 128, 12, 1, 6, 1, 1},
    {"sm90_m144", 90, 144, 128, 128, 8, 1, 7, 1, 1},
    {"sm90_m128_c2", 90, 128, 128, 128, 8, 1, 7, 1, 2},
    {"sm90_m128", 90, 128, 128, 128, 8, 1, 7, 1, 1},
    {"sm90_m64", 90, 64, 128, 128, 8, 1, 10, 1, 1},
    {"sm90_m32", 90, 32, 128, 128, 8, 1, 14, 1, 1},
    {"sm90_m16", 90, 16, 128, 128, 8, 1, 16, 1, 1},
    {"sm90_m256_k2", 90, 256, 128, 128, 8, 1, 4, 1, 1, 2},
    {"sm90_m256_k3", 90, 256, 128, 128, 8, 1, 4, 1, 1, 3},
    {"sm90_m256_k4", 90, 256, 128, 128, 8, 1, 4, 1, 1, 4},
    {"sm90_n192_m128_k2", 90, 128, 192, 128, 12, 1, 6, 1, 1, 2},
    {"sm90_m128_k2", 90, 128, 128, 128, 8, 1, 7, 1, 1, 2},
    {"sm90_m128_k3", 90, 128, 128, 128, 8, 1, 7, 1, 1, 3},
    {"sm90_m128_k4", 90, 128, 128, 128, 8, 1, 7, 1, 1, 4},
    {"sm90_m64_k2", 90, 64, 128, 128, 8, 1, 10, 1, 1, 2},
    {"sm90_m64_k3", 90, 64, 128, 128, 8, 1, 10, 1, 1, 3},
    {"sm90_m64_k4", 90, 64, 128, 128, 8, 1, 10, 1, 1, 4},
    {"sm90_m32_k2", 90, 32, 128, 128, 8, 1, 14, 1, 1, 2},
    {"sm90_m32_k4", 90, 32, 128, 128, 8, 1, 14, 1, 1, 4},
    {"sm90_m32_k3", 90, 32, 128, 128, 8, 1, 14, 1, 1, 3},
    {"sm90_m16_k2", 90, 16, 128, 128, 8, 1, 16, 1, 1, 2},
    {"sm90_m16_k4", 90, 16, 128, 128, 8, 1, 16, 1, 1, 4},
    {"sm90_m16_k8", 90, 16, 128, 128, 8, 1, 16, 1, 1, 8},
};
inline constexpr int kGemmConfigCount = sizeof(kGemmConfigs) / sizeof(kGemmConfigs[0]);

constexpr bool tiles_have_one_number_of_stages() {
  for (const GemmConfig& a : kGemmConfigs) {
    for (const GemmConfig& b : kGemmConfigs) {
      const bool same =
          a.arch == 90 && b.arch == 90 && a.tile_m == b.tile_m && a.tile_n == b.tile_n;
      if (same && a.stages != b.stages) {
        return false;
      }
    }
  }
  return true;
}
static_assert(tiles_have_one_number_of_stages());

// Row of the table with this name, or -1.
inline int config_index(const GemmConfig& config) {
  for (int i = 0; i < kGemmConfigCount; ++i) {
    if (std::string_view(kGemmConfigs[i].name) == config.name) {
      return i;
    }
  }
  return -1;
}

// Oldest compute capability with cp.async and mma.m16n8k32 on int8.
inline constexpr int kOldestArch = 80;

// Kernels count tokens, channels and inputs in int32, up to the end of the last tile, of at most
// 256.
inline constexpr int64_t kLargestSize = INT32_MAX - 255;

// |x| and |level| are at most 128, so sums over more inputs could leave int32.
inline constexpr int64_t kLargestGemmInputs = INT32_MAX / (128 * 128);

// Offsets inside a token tile are 32-bit: 128 rows of this many bytes.
inline constexpr int64_t kLargestRowStride = INT32_MAX / 128 / 16 * 16;

// int32 accumulators of one output tile are staged in shared memory, four words of padding a token
// (gemm/epilogue.cuh says why four).
inline constexpr int kStagingPad = 4;

constexpr int kWarpgroupThreads = 128;

constexpr bool is_sm90(const GemmConfig& config) { return config.arch == 90; }

constexpr int config_threads(const GemmConfig& config) {
  return 32 * config.warps_n * config.warps_m + (is_sm90(config) ? kWarpgroupThreads : 0);
}

constexpr int stage_bytes(const GemmConfig& config, int weight_bits) {
  return config.tile_m * config.tile_k +
         config.tile_n / kHalfTileChannels * half_tile_words(weight_bits) * 4;
}

constexpr int staging_bytes(const GemmConfig& config) {
  return config.tile_m * (config.tile_n + kStagingPad) * 4;
}

// arch 90: warpgroups that multiply.
constexpr int sm90_consumers(const GemmConfig& config) { return config.tile_n / kHalfTileChannels; }

// k tiles that a block multiplies at least: three consumers begin with two (consumer_sm90.cuh).
// Past K they are zeros, but parts of K must not overlap.
constexpr int sm90_fewest_steps(int consumers) { return consumers == 2 ? 1 : 2; }

// arch 90, bytes of one consumer warpgroup's 64 channels of output: all tokens in 16 bits, in rows
// of the 128-byte swizzle, whose pattern repeats every kSwizzleBytes. A small tile also fits as
// int32.
constexpr int kSwizzleBytes = 1024;
constexpr int kStagedTokenBytes = (kHalfTileChannels + kStagingPad) * 4;

constexpr int sm90_staging_bytes(int tile_m) {
  const int as_int32 = tile_m <= 64 ? tile_m * kStagedTokenBytes : 0;
  return align_up(max_of(tile_m * kHalfTileChannels * 2, as_int32), kSwizzleBytes);
}

// Tokens that fit there as int32: the largest part of a tile in whole eights.
constexpr int sm90_staged_tokens(int tile_m) {
  int tokens = tile_m;
  while (tile_m % tokens != 0 || tokens % 8 != 0 ||
         tokens * kStagedTokenBytes > sm90_staging_bytes(tile_m)) {
    --tokens;
  }
  return tokens;
}

// The pipeline with two barriers and the place of its tile a stage, the staging of the consumers,
// their copies of x_scale, a barrier a consumer.
constexpr int sm90_shared_bytes(const GemmConfig& config, int weight_bits) {
  const int pipeline = config.stages * (stage_bytes(config, weight_bits) + 2 * 8 + 8);
  const int warpgroup = sm90_staging_bytes(config.tile_m) + config.tile_m * 4 + 8;
  return align_up(pipeline + sm90_consumers(config) * warpgroup, kSwizzleBytes);
}

// Dynamic shared memory of a block. arch 80: the pipeline, then the staged accumulators in its
// place.
constexpr int shared_bytes(const GemmConfig& config, int weight_bits) {
  if (is_sm90(config)) {
    return sm90_shared_bytes(config, weight_bits);
  }
  return max_of(config.stages * stage_bytes(config, weight_bits), staging_bytes(config));
}

// 65536 registers of an SM: 168 a thread of two consumer warpgroups and one producer at launch, 128
// of three and one, then these.
constexpr int producer_registers(int consumers) { return consumers == 2 ? 40 : 56; }
constexpr int consumer_registers(int consumers) { return consumers == 2 ? 232 : 152; }

// Most shared memory that one block may have (CUDA C++ Programming Guide, compute capabilities).
constexpr int max_shared_bytes(int arch) {
  switch (arch) {
    case 80:
    case 87:
      return 163 * 1024;
    case 90:
    case 100:
    case 103:
      return 227 * 1024;
    default:
      return 99 * 1024;
  }
}

// arch 90: tokens of the tiles that a last wave of few tiles can be cut into (schedule_sm90.h): of
// the largest tile, whose waves are longest. A step of 32 is as long as its decoding, half as long
// as one of 256.
constexpr int kSm90TailTokens[] = {32, 64, 128};
constexpr bool sm90_has_tail(int tile_m, int consumers) { return tile_m == 256 && consumers == 2; }

// arch 90: of tiles of which `at_once` make a wave, those that are left to a tail, and the tokens
// of its parts: the fewest with which there are no more parts than places in a wave.
struct Sm90Tail {
  int64_t tiles = 0;
  int tokens = 0;
};

constexpr Sm90Tail sm90_tail(const GemmConfig& config, int64_t tiles, int64_t at_once) {
  const int64_t left = tiles > at_once ? tiles % at_once : 0;
  if (left > 0 && config.split_k == 1 && sm90_has_tail(config.tile_m, sm90_consumers(config))) {
    for (const int tokens : kSm90TailTokens) {
      if (left * (config.tile_m / tokens) <= at_once) {
        return {left, tokens};
      }
    }
  }
  return {};
}

constexpr int64_t block_count(const GemmConfig& config, const GemmProblem& problem) {
  return ceil_div<int64_t>(problem.m, config.tile_m) * ceil_div<int64_t>(problem.n, config.tile_n);
}

// The one statement of which configuration may run what where. Code for sm_90a runs on 9.0 alone; a
// cluster wants as many channel tiles as it has blocks.
constexpr bool is_legal(const GemmConfig& config, const GemmProblem& problem, int arch) {
  return (is_sm90(config) ? kSm90Compiled && arch == config.arch : arch >= config.arch) &&
         is_weight_bits(problem.weight_bits) && problem.m >= 1 && problem.n >= 1 &&
         problem.k >= 1 && problem.m <= kLargestSize && problem.n <= kLargestSize &&
         problem.k <= kLargestGemmInputs && block_count(config, problem) <= INT32_MAX &&
         ceil_div<int64_t>(problem.n, config.tile_n) % config.cluster == 0 &&
         (config.split_k == 1 || ceil_div<int64_t>(problem.k, config.tile_k) >=
                                     sm90_fewest_steps(sm90_consumers(config)) * config.split_k) &&
         shared_bytes(config, problem.weight_bits) <= max_shared_bytes(arch);
}

inline std::string arch_name(int arch) {
  return std::to_string(arch / 10) + "." + std::to_string(arch % 10);
}

// arch 90: clocks from launch until the last block is done, fitted to every row on the shapes of
// benchmarks/dit_shapes.py (one H100, November 2026). A step of 128 k takes the products of all
// consumers, or one consumer's decoding and products in turn where that is longer; a tile costs an
// epilogue besides, and a split one the exchange of sums.
constexpr int64_t kSm90Sms = 132;

// Clusters that run at once: each stays within a GPC, of 16 or 18 SMs.
constexpr int64_t sm90_clusters_at_once(int blocks) {
  constexpr int64_t kAtOnce[] = {0, kSm90Sms, 66, 40, 30, 20, 16, 16, 14};
  return kAtOnce[blocks];
}

// Until a tail multiplies: the tables and the first stage are not asked for under a product.
constexpr int64_t kTailBeginClocks = 2500;

constexpr int64_t sm90_clocks(const GemmConfig& config, const GemmProblem& problem) {
  // By weight_bits: one consumer's decoding, what three at once add to a step, and its least.
  constexpr int kDecodeClocks[] = {0, 0, 340, 380, 490};
  constexpr int kCrowdClocks[] = {0, 0, 0, 30, 100};
  constexpr int64_t kCrowdedStep[] = {0, 0, 780, 810, 980};
  constexpr int kLaunchClocks = 5000;
  const bool two = sm90_consumers(config) == 2;
  const auto tile_clocks = [&](int tokens) {
    const int64_t products = 2 * tokens * sm90_consumers(config);
    const int64_t in_turn = kDecodeClocks[problem.weight_bits] + 23 * tokens / 10;
    const int64_t step = two ? max_of(products + 40, in_turn)
                             : max_of(products + kCrowdClocks[problem.weight_bits],
                                      kCrowdedStep[problem.weight_bits]);
    const int64_t steps =
        ceil_div<int64_t>(ceil_div<int64_t>(problem.k, config.tile_k), config.split_k);
    return steps * step + (two ? 1000 : 2500) + 9 * tokens;
  };
  const int64_t exchange = config.split_k > 1 ? 1500 + 20 * config.tile_m : 0;
  const int64_t at_once = sm90_clusters_at_once(config.split_k);
  const int64_t tiles = block_count(config, problem);
  const Sm90Tail tail = sm90_tail(config, tiles, at_once);
  const int64_t tail_clocks = tail.tiles > 0 ? tile_clocks(tail.tokens) + kTailBeginClocks : 0;
  const int64_t waves = ceil_div(tiles - tail.tiles, at_once);
  return waves * (tile_clocks(config.tile_m) + exchange) + tail_clocks + kLaunchClocks;
}

// The cheapest legal row of arch 90, or null. A row further down the table must be 2 % cheaper; so
// must a cluster, but with few steps a tile its blocks wait for each other.
inline const GemmConfig* select_sm90_config(const GemmProblem& problem, int arch) {
  constexpr int64_t kStepsForClusters = 12;
  const GemmConfig* best = nullptr;
  for (const GemmConfig& config : kGemmConfigs) {
    const bool clustered = config.cluster > 1;
    if (!is_sm90(config) || !is_legal(config, problem, arch) ||
        (clustered && problem.k < kStepsForClusters * config.tile_k)) {
      continue;
    }
    if (best == nullptr || 50 * sm90_clocks(config, problem) < 49 * sm90_clocks(*best, problem)) {
      best = &config;
    }
  }
  return best;
}

// Of the rows of arch 80 the largest token tile that gives most SMs of a data-centre GPU (108 to
// 148) a block and is at least half full; failing that the smallest, which spreads a small problem
// widest. Null where none is legal.
inline const GemmConfig* select_sm80_config(const GemmProblem& problem, int arch) {
  constexpr int64_t kBlocksToFill = 108;
  const GemmConfig* smallest = nullptr;
  for (const GemmConfig& config : kGemmConfigs) {
    if (is_sm90(config) || !is_legal(config, problem, arch)) {
      continue;
    }
    if (2 * problem.m > config.tile_m && block_count(config, problem) >= kBlocksToFill) {
      return &config;
    }
    smallest = &config;
  }
  return smallest;
}

// What lrq::gemm runs; `sm90` false keeps to the portable rows on every GPU.
// Throws std::invalid_argument, naming both numbers, where no kernel can run.
inline const GemmConfig& select_gemm_config(const GemmProblem& problem, int arch,
                                            bool sm90 = true) {
  if (arch < kOldestArch) {
    throw std::invalid_argument("lrq::gemm: needs a GPU of compute capability " +
                                arch_name(kOldestArch) + " or newer, got " + arch_name(arch));
  }
  const GemmConfig* config = sm90 ? select_sm90_config(problem, arch) : nullptr;
  if (config == nullptr) {
    config = select_sm80_config(problem, arch);
  }
  if (config == nullptr) {
    throw std::invalid_argument(
        "lrq::gemm: no configuration for M=" + std::to_string(problem.m) +
        ", N=" + std::to_string(problem.n) + ", K=" + std::to_string(problem.k) +
        ", weight_bits=" + std::to_string(problem.weight_bits) + " on compute capability " +
        arch_name(arch) + "; expected sizes of 1 to 2^31-256, K up to " +
        std::to_string(kLargestGemmInputs) + ", and 2, 3 or 4 bits");
  }
  return *config;
}

}  // namespace lrq
