// How a product with 16-bit activations of more than kGemvMaxTokens tokens runs on Hopper: by the
// kernel that decodes into it, in tiles of so many tokens, or by torch on a dequantized weight.
//
// A model, in one place. What it stands on, H100, November 2026, 4 bits:
//   - a step of 128 k of the kernel takes 920 + 5.2 T clocks with 128 channels and 1,330 + 7.8 T
//     with 192, in all of six tiles and ten shapes; products are 8 T and 12 T of them. At the power
//     limit one of T = 256 takes a fifth more;
//   - torch's product took 4.5 us and 780 TFLOPS, within 8 % on the five shapes with many tokens;
//   - dequantizing moves bits / 8 + 2 bytes a weight at the bandwidth of a copy, and is a launch.
// So torch is chosen for many tokens and a small weight that the tiles do not divide well: 4096 x
// 1152 x 4608 is two waves of 132 blocks, the second of them half empty. Where the difference is
// small the kernel runs: its products are exact and it needs no memory beside.
#pragma once

#include "../int_math.h"
#include "../layout/packed_weight.h"
#include "problem.h"

namespace lrq {

struct A16TileSize {
  int tokens;
  int channels;  // 128 or 192: two or three consumers
};

// Larger ones first: they win a tie, since they move fewer bytes.
inline constexpr A16TileSize kA16Tiles[] = {{256, 128}, {192, 128}, {128, 192},
                                            {128, 128}, {64, 192},  {64, 128}};
inline constexpr int kA16TileCount = sizeof(kA16Tiles) / sizeof(kA16Tiles[0]);
constexpr int kA16Dequantize = -1;  // no tile: torch's product

// us of the kernel on `sms` multiprocessors.
inline double a16_kernel_us(const GemmProblem& problem, const A16TileSize& tile, int sms) {
  constexpr double kClocksPerUs = 1750.0;
  constexpr double kLaunchUs = 2.0;
  const int64_t tiles =
      ceil_div<int64_t>(problem.m, tile.tokens) * ceil_div<int64_t>(problem.n, tile.channels);
  const int64_t step =
      tile.channels == kTileChannels ? 920 + 52 * tile.tokens / 10 : 1330 + 78 * tile.tokens / 10;
  const int64_t clocks = ceil_div<int64_t>(problem.k, kTileInputs) * step;
  return static_cast<double>(ceil_div<int64_t>(tiles, sms) * clocks) / kClocksPerUs + kLaunchUs;
}

// us of dequantizing and torch's product, on a GPU of 132 multiprocessors.
inline double a16_dequantize_us(const GemmProblem& problem) {
  constexpr double kFlopsPerUs = 780e6;
  constexpr double kBytesPerUs = 2.97e6;
  constexpr double kProductUs = 4.5;
  constexpr double kLaunchUs = 2.0;
  const double weights = static_cast<double>(problem.n) * static_cast<double>(problem.k);
  return 2.0 * static_cast<double>(problem.m) * weights / kFlopsPerUs + kProductUs +
         weights * (2.0 + problem.weight_bits / 8.0) / kBytesPerUs + kLaunchUs;
}

// The tile of the kernel, a place in kA16Tiles, or kA16Dequantize.
inline int choose_a16_tile(const GemmProblem& problem, int sms) {
  int best = 0;
  double best_us = a16_kernel_us(problem, kA16Tiles[0], sms);
  for (int tile = 1; tile < kA16TileCount; ++tile) {
    const double us = a16_kernel_us(problem, kA16Tiles[tile], sms);
    if (us < best_us) {
      best = tile;
      best_us = us;
    }
  }
  constexpr double kWorthIt = 0.9;
  return a16_dequantize_us(problem) < kWorthIt * best_us ? kA16Dequantize : best;
}

}  // namespace lrq
