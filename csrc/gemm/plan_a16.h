// How a product with 16-bit activations of more than kGemvMaxTokens tokens runs on Hopper: by the
// kernel that decodes into it, in tiles of so many tokens, or by torch on a dequantized weight.
//
// A model, in one place. What it stands on, H100, November 2026, 4 bits:
//   - a step of 128 k of the kernel takes 920 + 5.2 T clocks in all of four tiles and ten shapes,
//   of
//     which products are 8 T and issuing the decoding 660; at the power limit a step of T = 256 is
//     a fifth longer;
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

// Tokens of a tile, larger ones first: they win a tie, since they move fewer bytes.
constexpr int kA16TileTokens[] = {256, 192, 128, 64};
constexpr int kA16Dequantize = 0;  // no tile: torch's product

// us of the kernel on `sms` multiprocessors.
inline double a16_kernel_us(const GemmProblem& problem, int tile_m, int sms) {
  constexpr double kClocksPerUs = 1750.0;
  constexpr double kLaunchUs = 2.0;
  const int64_t tiles =
      ceil_div<int64_t>(problem.m, tile_m) * ceil_div<int64_t>(problem.n, kTileChannels);
  const int64_t step = 920 + 52 * tile_m / 10;  // the epilogue's share included
  const int64_t tile = ceil_div<int64_t>(problem.k, kTileInputs) * step;
  return static_cast<double>(ceil_div<int64_t>(tiles, sms) * tile) / kClocksPerUs + kLaunchUs;
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

// Tokens of a tile of the kernel, or kA16Dequantize.
inline int choose_a16_tile(const GemmProblem& problem, int sms) {
  int best = kA16TileTokens[0];
  for (const int tile_m : kA16TileTokens) {
    if (a16_kernel_us(problem, tile_m, sms) < a16_kernel_us(problem, best, sms)) {
      best = tile_m;
    }
  }
  constexpr double kWorthIt = 0.9;
  return a16_dequantize_us(problem) < kWorthIt * a16_kernel_us(problem, best, sms) ? kA16Dequantize
                                                                                   : best;
}

}  // namespace lrq
