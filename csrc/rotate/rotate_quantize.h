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
  int64_t token_stride;
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

constexpr int kRotateBlocksPerSm = 2;  // by registers, when full
constexpr int kRotateMaxThreads = 512;
constexpr int kRotateMaxWarps = kRotateMaxThreads / 32;
// A warp takes 1024. The vectors, two with a norm, must fit the 99 KB of sm_89 and sm_120.
constexpr int kRotateMaxFeatures = 15 * kWarpElements;
constexpr int kRotateMaxNormFeatures = 8 * kWarpElements;
constexpr int kRotateAlignment = 16;

constexpr int64_t kRotateMaxRowStride = int64_t{1} << 20;
constexpr int64_t kRotateMaxTokens = int64_t{1} << 30;

// Whether the kernel takes rows of `first` + `second` features of 16 bits (second 0: one source)
// that lie `row_stride` elements apart, the larger of the two. `addresses` tells their alignment:
// the bitwise or of the sources' addresses and of the strides in bytes that lead from row to row.
constexpr bool supports_rotate_rows(int64_t first, int64_t second, int64_t block_size, bool norm,
                                    int64_t row_stride, uint64_t addresses) {
  const bool block =
      block_size == 128 || block_size == 256 || block_size == 512 || block_size == kWarpElements;
  const int64_t largest = norm ? kRotateMaxNormFeatures : kRotateMaxFeatures;
  const bool size = first > 0 && second >= 0 && first <= largest && second <= largest - first;
  return block && size && first % kTransform == 0 && second % kTransform == 0 &&
         (first + second) % block_size == 0 && row_stride <= kRotateMaxRowStride &&
         addresses % kRotateAlignment == 0;
}

// ---- how it divides the work --------------------------------------------------------------------
//
// A token belongs to a group of warps, 1024 features each. A thread block has several groups, which
// share the vectors in shared memory and take turns with the tokens of one sample:
//
//     token of the sample    0  1  2 ...  b  b+1 ...      b = blocks_per_sample
//     thread block           0  1  2 ...  0   1  ...
//     group in it            0  0  0 ...  1   1  ...

struct RotateRowsPlan {
  int warps_per_token;
  int tokens_per_block;  // groups
  int blocks_per_sample;
  int token_step;    // from a group's token to its next: of all thread blocks of a sample
  int vectors;       // their place in dynamic shared memory, in bytes
  int shared_bytes;  // dynamic

  constexpr int group_threads() const { return 32 * warps_per_token; }
  constexpr int threads() const { return tokens_per_block * group_threads(); }
};

struct RotateDevice {
  int sms;
  int shared_bytes_per_sm;
  int shared_bytes_per_block;
};

// A lane's 16-byte pieces in shared memory: its part of the next token, and state.
constexpr int kLanePieces = kLaneChunks + 1;
constexpr int kLaneElements = kWarpElements / 32;
constexpr int kRotateStaticShared = 1536;
constexpr int kSystemShared = 1024;  // of each thread block

// features, samples and tokens are at least 1.
constexpr RotateRowsPlan plan_rotate_rows(int features, bool norm, int64_t samples, int64_t tokens,
                                          RotateDevice device) {
  RotateRowsPlan plan = {};
  plan.warps_per_token = ceil_div(features, kWarpElements);
  // fp32 factors and, with a norm, terms
  const int vector_bytes = plan.group_threads() * kLaneElements * 4 * (norm ? 2 : 1);
  const int token_bytes = plan.group_threads() * kLanePieces * 16;
  const int room = device.shared_bytes_per_block - kRotateStaticShared - vector_bytes;
  plan.tokens_per_block =
      max_of(1, min_of(kRotateMaxThreads / plan.group_threads(), room / token_bytes));
  plan.vectors = plan.tokens_per_block * token_bytes;
  plan.shared_bytes = plan.vectors + vector_bytes;
  const int by_threads = kRotateBlocksPerSm * kRotateMaxThreads / plan.threads();
  const int by_shared =
      device.shared_bytes_per_sm / (plan.shared_bytes + kRotateStaticShared + kSystemShared);
  const int64_t resident = device.sms * int64_t{max_of(1, min_of(by_threads, by_shared))};
  plan.blocks_per_sample =
      static_cast<int>(min_of<int64_t>(tokens, max_of<int64_t>(1, resident / samples)));
  plan.token_step = plan.blocks_per_sample * plan.tokens_per_block;
  return plan;
}

}  // namespace lrq
