// What the kernels of lrq::_rotate_rows are asked to do, which problems they take, and how they
// divide them. No torch, no kernels.
//
//     u       = norm(x) * (1 + scale) + shift      x one tensor, or two side by side along K
//     v       = (u * channel_scale) @ blockdiag(H) / sqrt(block_size)
//
// u is rounded to x's type, and so is its product with channel_scale. Where scale and shift have
// x's type too, so are the norm, 1 + scale and the product; lie both on 16 bytes, then
// channel_scale multiplies 1 + scale and shift instead of u, rounded (reference.joins_modulation).
//
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
  const uint16_t* channel_scale;  // bf16 [K] or null
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

// ---- what the kernels take ----------------------------------------------------------------------

constexpr int kRotateMaxThreads = 1024;
constexpr int kRotateMaxWarps = 16;  // of a team
constexpr int kRotateMaxFeatures = kRotateMaxWarps * kWarpElements;
constexpr int kRotateAlignment = 16;

constexpr int64_t kRotateMaxRowStride = int64_t{1} << 20;
constexpr int64_t kRotateMaxTokens = int64_t{1} << 30;

// Whether the kernels take rows of `first` + `second` features of 16 bits (second 0: one source)
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

// What comes before the transform.
enum class RotateForm : int {
  kPlain,
  kModulated,  // norm, scale and shift of x's type that lie on 16 bytes
  kNorm,       // norm, with another scale and shift or without
};

// Warps of an SM where each lane has that many registers: a quarter of its 65536 serves a quarter
// of the warps.
constexpr int resident_warps(int registers) { return 4 * (65536 / 4 / 32 / registers); }

// Registers of a lane: no spills, and on an H200 not slower than others. Code of other
// architectures than 9.0 needs more.
constexpr int more_registers(int code_arch) { return code_arch == 90 ? 0 : 16; }
constexpr int kRotateGroupRegisters = 56;
constexpr int row_registers(RotateForm form, bool usual) {
  return form == RotateForm::kNorm ? 128 : form == RotateForm::kPlain && usual ? 64 : 80;
}

// Two kernels. In that of rows a team of warps takes one token at a time, a lane of it 32 features,
// and stays for one after another, each with its next tokens on their way. A thread block is as
// many teams as registers, shared memory and barriers have room for, one thread block an SM, and
// fills shared memory with the vectors of the channels once. In that of groups a thread block takes
// a few tokens and no others; it starts sooner, and a warp can have units of several tokens.

constexpr int kRotateMaxSlots = 2;   // with more the shared memory is taken from teams
constexpr int kRotateMaxTeams = 15;  // each has a barrier, beside that of the thread block
constexpr int kLaneBytes = 2 * kChunks * kChunkElements;
constexpr int kRotateStaticShared = 4 * 1024;  // no less than RotateShared and what CUDA keeps

constexpr int kRotateMaxGroupWarps = 12;  // more wait for each other too long

// Warps of a thread block of so many tokens.
constexpr int group_warps(int group_tokens, int features) {
  return ceil_div(features, kWarpElements / group_tokens);
}

// Tokens of a thread block, 1, 2, 4 or 8; 0: rows are for these. As measured on an H200 (NOTES.md):
// it starts 0.4 thread blocks a nanosecond, for which short tokens are too few bytes to go alone,
// and tokens wait for memory unless 33 of the 36 warps of an SM are there and busy.
constexpr int choose_group_tokens(int features, int64_t samples, int64_t tokens, int sms,
                                  RotateForm form) {
  if (form == RotateForm::kModulated) {
    // Rows fill shared memory with the vectors once: ahead unless a quarter of their lanes is idle.
    const bool idle = 4 * features <= 3 * kWarpElements * group_warps(1, features);
    return idle && group_warps(kWarpUnits, features) <= kRotateMaxGroupWarps &&
                   samples * (tokens / kWarpUnits) >= sms
               ? kWarpUnits
               : 0;
  }
  if (form == RotateForm::kNorm) {
    return 0;
  }
  const bool few = samples * tokens <= 4 * sms;
  for (int group = 1; group <= kWarpUnits; group *= 2) {
    const int least_features = group == 1 ? 8192 : group == 2 ? 1856 : group == 4 ? 1472 : 0;
    const int warps = group_warps(group, features);
    const int resident = resident_warps(kRotateGroupRegisters) / warps * warps;
    const bool busy = int64_t{resident} * features >= int64_t{33} * (kWarpElements / group) * warps;
    if (warps <= kRotateMaxGroupWarps && (few || (busy && features >= least_features))) {
      return group;
    }
  }
  return 0;
}

struct RotateRowsPlan {
  int team_threads;
  int teams;              // of a thread block
  int slots;              // tokens of a team on their way at once
  int blocks_per_sample;  // thread blocks
  int shared_bytes;       // dynamic

  // A GPU with less may have no room for both vectors of a modulation of a long token.
  constexpr bool fits(int shared_limit) const {
    return shared_bytes + kRotateStaticShared <= shared_limit;
  }
};

// features, samples and tokens are at least 1; shared_limit: bytes that a thread block may have.
constexpr RotateRowsPlan plan_rotate_rows(int features, int64_t samples, int64_t tokens, int sms,
                                          int registers, bool modulated, int shared_limit) {
  RotateRowsPlan plan = {};
  const int warps = ceil_div(features, kWarpElements);
  const int token_bytes = 32 * warps * kLaneBytes;
  const int vector_bytes = (modulated ? 2 : 1) * 2 * features;
  const int room = max_of(1, (shared_limit - kRotateStaticShared - vector_bytes) / token_bytes);
  plan.team_threads = 32 * warps;
  plan.slots = min_of(kRotateMaxSlots, room);
  plan.blocks_per_sample =
      static_cast<int>(min_of<int64_t>(tokens, max_of<int64_t>(1, sms / samples)));
  const int fit = min_of(resident_warps(registers) / warps, room / plan.slots);
  const int64_t wanted = ceil_div<int64_t>(tokens, plan.blocks_per_sample);
  plan.teams =
      static_cast<int>(max_of<int64_t>(1, min_of<int64_t>(min_of(fit, kRotateMaxTeams), wanted)));
  plan.shared_bytes = plan.teams * plan.slots * token_bytes + vector_bytes;
  return plan;
}

}  // namespace lrq
