// The table of GEMM tile configurations and the choice among them. Host only, no torch, no CUDA.
//
// Y^T[N, M] = W[N, K] * X^T[K, M]: a thread block owns tile_n channels x tile_m tokens and walks K
// in steps of tile_k. Its warps form a grid of warps_n x warps_m; a warp decodes the weights of
// tile_n / warps_n channels once per step and uses them for tile_m / warps_m tokens. Every
// configuration gives bit-identical output.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "../int_math.h"
#include "../layout/packed_weight.h"
#include "problem.h"

namespace lrq {

struct GemmConfig {
  const char* name;
  int arch;           // oldest compute capability that runs it, 10 * major + minor
  int tile_m;         // tokens
  int tile_n;         // channels
  int tile_k;         // inputs of one pipeline stage
  int warps_n;        // warps along the channels
  int warps_m;        // warps along the tokens
  int stages;         // pipeline stages in shared memory
  int blocks_per_sm;  // thread blocks that must fit the registers of an SM
};

// Largest token tile first: select_gemm_config takes the first that fits the problem.
inline constexpr GemmConfig kGemmConfigs[] = {
    {"sm80_m128", 80, 128, 128, 128, 4, 2, 3, 2},
    {"sm80_m64", 80, 64, 128, 128, 4, 2, 4, 2},
    {"sm80_m32", 80, 32, 128, 128, 8, 1, 4, 2},
    {"sm80_m16", 80, 16, 128, 128, 8, 1, 6, 2},
};
inline constexpr int kGemmConfigCount = sizeof(kGemmConfigs) / sizeof(kGemmConfigs[0]);

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

// Kernels count tokens, channels and inputs in int32, up to the end of the last tile.
inline constexpr int64_t kLargestSize = INT32_MAX - 127;

// |x| and |level| are at most 128, so sums over more inputs could leave int32.
inline constexpr int64_t kLargestGemmInputs = INT32_MAX / (128 * 128);

// Offsets inside a token tile are 32-bit: 128 rows of this many bytes.
inline constexpr int64_t kLargestRowStride = INT32_MAX / 128 / 16 * 16;

// int32 accumulators of one output tile are staged in shared memory, four words of padding a token
// (gemm/epilogue.cuh says why four).
inline constexpr int kStagingPad = 4;

constexpr int config_threads(const GemmConfig& config) {
  return 32 * config.warps_n * config.warps_m;
}

constexpr int stage_bytes(const GemmConfig& config, int weight_bits) {
  return config.tile_m * config.tile_k + 2 * half_tile_words(weight_bits) * 4;
}

constexpr int staging_bytes(const GemmConfig& config) {
  return config.tile_m * (config.tile_n + kStagingPad) * 4;
}

// Dynamic shared memory of a block: the pipeline, then the staged accumulators in its place.
constexpr int shared_bytes(const GemmConfig& config, int weight_bits) {
  return max_of(config.stages * stage_bytes(config, weight_bits), staging_bytes(config));
}

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

constexpr int64_t block_count(const GemmConfig& config, const GemmProblem& problem) {
  return ceil_div<int64_t>(problem.m, config.tile_m) * ceil_div<int64_t>(problem.n, config.tile_n);
}

// The one statement of which configuration may run what where.
constexpr bool is_legal(const GemmConfig& config, const GemmProblem& problem, int arch) {
  return arch >= config.arch && is_weight_bits(problem.weight_bits) && problem.m >= 1 &&
         problem.n >= 1 && problem.k >= 1 && problem.m <= kLargestSize &&
         problem.n <= kLargestSize && problem.k <= kLargestGemmInputs &&
         block_count(config, problem) <= INT32_MAX &&
         shared_bytes(config, problem.weight_bits) <= max_shared_bytes(arch);
}

inline std::string arch_name(int arch) {
  return std::to_string(arch / 10) + "." + std::to_string(arch % 10);
}

// The largest token tile that gives most SMs of a data-centre GPU (108 to 148) a block and is at
// least half full; failing that the smallest, which spreads a small problem widest.
// Throws std::invalid_argument, naming both numbers, where no kernel can run.
inline const GemmConfig& select_gemm_config(const GemmProblem& problem, int arch) {
  constexpr int64_t kBlocksToFill = 108;
  if (arch < kOldestArch) {
    throw std::invalid_argument("lrq::gemm: needs a GPU of compute capability " +
                                arch_name(kOldestArch) + " or newer, got " + arch_name(arch));
  }
  const GemmConfig* smallest = nullptr;
  for (const GemmConfig& config : kGemmConfigs) {
    if (!is_legal(config, problem, arch)) {
      continue;
    }
    if (2 * problem.m > config.tile_m && block_count(config, problem) >= kBlocksToFill) {
      return config;
    }
    smallest = &config;
  }
  if (smallest == nullptr) {
    throw std::invalid_argument(
        "lrq::gemm: no configuration for M=" + std::to_string(problem.m) +
        ", N=" + std::to_string(problem.n) + ", K=" + std::to_string(problem.k) +
        ", weight_bits=" + std::to_string(problem.weight_bits) + " on compute capability " +
        arch_name(arch) + "; expected sizes of 1 to 2^31-128, K up to " +
        std::to_string(kLargestGemmInputs) + ", and 2, 3 or 4 bits");
  }
  return *smallest;
}

// Bytes of scratch memory beside the output. No configuration splits K, so all partial sums live in
// registers.
constexpr int64_t workspace_bytes(const GemmConfig&, const GemmProblem&) { return 0; }

}  // namespace lrq
