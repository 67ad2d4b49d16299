// What the kernel of lrq::_rotate_rows is asked to do, which problems it takes, and how it divides
// them. No torch, no kernels.
//
//     u       = norm(x) * (1 + scale) + shift      x one tensor, or two side by side along K
//     v       = (u * channel_scale) @ blockdiag(H) / sqrt(block_size)
//     x_scale = (rms ? sqrt(mean v^2) : max|v|) * step_factor
//     x_q     = rint(v / x_scale), 0 unless 0 < x_scale < inf
#pragma once

#include <cstdint>

#include "../int_math.h"
#include "../out_type.h"
#include "token_layout.h"

namespace lrq {

enum class TokenNorm : int { kNone, kLayer, kRms };

// 16-bit rows. Strides count elements; what they lead to is aligned to 16 bytes.
struct RowSource {
  const void* data;
  int64_t sample_stride;
  int token_stride;
  int features;
};

// One vector [K] a sample, or null.
struct SampleVectors {
  const void* data;
  int64_t sample_stride;  // 0: all samples share one
  OutType type;
};

struct RotateRowsArgs {
  RowSource first;   // k = 0 .. first.features - 1
  RowSource second;  // the rest; features 0 where there is none
  int features;      // K, of both
  OutType type;      // of both: bf16 or fp16
  int64_t samples;
  int64_t tokens;  // of a sample
  TokenNorm norm;
  float eps;
  SampleVectors scale;  // with a norm only
  SampleVectors shift;
  const float* channel_scale;  // [K] or null
  int block_size;
  float hadamard_norm;     // 1 / sqrt(block_size)
  float inverse_features;  // 1 / K
  float qmax;
  bool rms;
  bool clamp;  // codes may be beyond qmax
  float step_factor;
  int8_t* x_q;     // [samples * tokens, K]
  float* x_scale;  // [samples * tokens]
};

// ---- what the kernel takes ----------------------------------------------------------------------

constexpr int kRotateMaxThreads = 512;
constexpr int kRotateMaxWarps = kRotateMaxThreads / 32;
constexpr int kRotateMaxUnits = kRotateMaxWarps * kWarpUnits;
constexpr int kRotateMaxFeatures = kRotateMaxWarps * kWarpElements;
constexpr int kRotateAlignment = 16;

constexpr int64_t kRotateMaxRowStride = int64_t{1} << 20;
constexpr int64_t kRotateMaxTokens = int64_t{1} << 30;

// Whether the kernel takes rows of `first` + `second` features of 16 bits (second 0: one source)
// that lie `row_stride` elements apart, the larger of the two. `addresses` tells the alignment: the
// bitwise or of the addresses of the sources and of channel_scale, and of the strides in bytes that
// lead from row to row.
constexpr bool supports_rotate_rows(int64_t first, int64_t second, int64_t block_size,
                                    int64_t row_stride, uint64_t addresses) {
  const bool block =
      block_size == 128 || block_size == 256 || block_size == 512 || block_size == kWarpElements;
  const bool size = first > 0 && second >= 0 && first <= kRotateMaxFeatures &&
                    second <= kRotateMaxFeatures - first;
  return block && size && first % kTransform == 0 && second % kTransform == 0 &&
         (first + second) % block_size == 0 && row_stride <= kRotateMaxRowStride &&
         addresses % kRotateAlignment == 0;
}

// ---- how it divides the work --------------------------------------------------------------------
//
// A token is K / 128 units of four lanes. A thread block has one token where that fills its warps
// to 87 %, else a few, unit after unit:
//
//     K = 1152, four tokens    unit   0 .. 8   9 .. 17   18 .. 26   27 .. 35   36 .. 39
//                              token    0         1          2          3        idle
//
// Thread blocks take one lot each: the loads of some run under the arithmetic of others. A thread
// block of a long row is too large a part of an SM for that, and one of several short rows has too
// little to do to be started for it. Those stay, take lot after lot, load the next one early and
// keep the channel scale. On an H100 (November 2026) that takes 1 to 10 % off at K = 1152, 12288
// and 15360, and costs 6 % at 3072. Those that modulate stay at any K: of their L1 cycles (8 for a
// warp's load) half would go to the three vectors.

// What comes before the transform.
enum class RotateForm : int {
  kPlain,
  kModulated,  // norm, scale and shift of x's type that lie on 16 bytes
  kNorm,       // norm, with another scale and shift or without
};

struct RotateRowsPlan {
  int units;             // of a token
  int units_reciprocal;  // unit / units == unit * units_reciprocal >> 16 in a thread block
  int tokens_per_block;
  int blocks_per_sample;
  int threads;
  bool stay;         // from a thread block's token to its next: blocks_per_sample
  int shared_bytes;  // dynamic
};

constexpr int kRotateStayUnits = 64;
constexpr int kRotateStayRegisters = 96;
constexpr int kRotateStayModulatedRegisters = 128;  // the vectors are 64 of them
constexpr int kRegistersPerSm = 65536;
constexpr int kLaneBytes = 2 * kChunks * kChunkElements;
static_assert(kRotateMaxThreads * kLaneBytes + 2048 <= 48 * 1024, "what needs no leave to be used");

// features, samples and tokens are at least 1.
constexpr RotateRowsPlan plan_rotate_rows(int features, RotateForm form, int64_t samples,
                                          int64_t tokens, int sms) {
  RotateRowsPlan plan = {};
  plan.units = features / kTransform;
  plan.units_reciprocal = (1 << 16) / plan.units + 1;
  int warps = 0;
  do {
    ++plan.tokens_per_block;
    warps = ceil_div(plan.tokens_per_block * plan.units, kWarpUnits);
  } while (100 * plan.tokens_per_block * plan.units < 87 * kWarpUnits * warps);
  plan.threads = 32 * warps;
  const bool stays = plan.units > kRotateStayUnits || plan.tokens_per_block > 1;
  plan.stay = form == RotateForm::kModulated || (form == RotateForm::kPlain && stays);
  int64_t blocks = ceil_div<int64_t>(tokens, plan.tokens_per_block);
  if (plan.stay) {
    const int registers =
        form == RotateForm::kPlain ? kRotateStayRegisters : kRotateStayModulatedRegisters;
    const int64_t resident = sms * (kRegistersPerSm / registers / plan.threads);
    blocks = min_of(blocks, max_of<int64_t>(1, resident / samples));
    plan.shared_bytes = plan.threads * kLaneBytes;
  }
  plan.blocks_per_sample = static_cast<int>(blocks);
  return plan;
}

}  // namespace lrq
