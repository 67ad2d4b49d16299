// (LayerNorm or RMSNorm, modulation) -> channel scale -> block Hadamard -> int8 codes, one token at
// a time in the registers of a group of warps (rotate_quantize.h). Bound by memory: 3 bytes of an
// element, in whose time an H200 at full bandwidth issues 21 instructions of a lane.
//
// Why tensor cores for a transform of additions: a lane has 32 values, so two of the seven stages
// of H128 would go through shuffles, and codes would leave in runs of 8. mma.m16n8k8 does four
// stages and moves the data (token_layout.h). Its operands are tf32, so a value v goes in as
// hi + lo, hi = the 11 leading bits of v and lo = v - hi, exact in fp32, of which mma drops what is
// below 2^-21 of v: no more ties than with fp32 additions. (One bf16 part is too coarse for the tie
// budget, two miss it by three times, three cost more than hi and lo.)
// Instructions per element, without 5 for what is done once a token:
//
//                     unpack  scale, bit 0  other bits                 max  fma  bytes  memory
//     tensor cores       1        1.5       2 hi, lo + 1 mma + 2        1    1   0.75 0.5    10.75
//     additions          1        1.5       6 + 2 shuffles              1    1   0.75 0.5    13.75
#pragma once

#include "../device/numeric.cuh"
#include "rotate_quantize.h"

namespace lrq {

// fp32 has unit spacing just above 1.5 * 2^23: adding it rounds half to even, and the low byte of
// the sum is the rounded integer in two's complement.
constexpr float kRoundingMagic = 12582912.0f;

// State between tokens lies in shared memory, and what follows from threadIdx is computed anew at
// each use: the transform leaves no registers for either.
struct alignas(16) LaneState {
  const void* next_x;  // of the token after the next, or null past K
  int x_step;          // to the token after that, in units of 16 bytes
  int row;             // of x_q, of the token at hand
};
static_assert(sizeof(LaneState) == sizeof(uint4), "one piece");

struct alignas(16) WarpState {
  int warp;        // of the token's group
  int first_warp;  // of the group, in the thread block
  int end_row;     // of the sample
};

struct RotateShared {
  uint4 hadamard[kMmaSteps][32];  // operand A of each lane
  WarpState warps[kRotateMaxWarps];
  // One number of each warp. Reductions that follow each other use different rows:
  // 0, 1, 2 with a norm, else 0 and 1 in turn.
  float exchange[3][kRotateMaxWarps];
};
static_assert(sizeof(RotateShared) <= kRotateStaticShared, "as planned");

// The warps of a token, for its reductions.
struct TokenGroup {
  RotateShared& shared;
  int warps;

  // Lane i < warps of each warp of the token gets `value` of the token's warp i, the others 0.
  __device__ __forceinline__ float gather(float value, int row) const {
    const uint32_t thread = read_thread_index();
    const int lane = thread % 32;
    if (lane == 0) {
      shared.exchange[row][thread / 32] = value;
    }
    // Groups of several warps start at different warps below kRotateMaxWarps - 1: their barriers.
    const int first_warp = shared.warps[thread / 32].first_warp;
    named_barrier_sync(1 + first_warp, 32 * warps);
    const float gathered = lane < warps ? shared.exchange[row][first_warp + lane] : 0.0f;
    return gathered;
  }
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Of non-negative numbers: their bits sort like they do, and NaN above infinity.
__device__ __forceinline__ float warp_max(float value) {
  return __uint_as_float(reduce_max_u32(__float_as_uint(value)));
}

__device__ __forceinline__ float group_sum(TokenGroup group, float value, int row) {
  value = warp_sum(value);
  return group.warps == 1 ? value : warp_sum(group.gather(value, row));
}

__device__ __forceinline__ float group_max(TokenGroup group, float value, int row) {
  value = warp_max(value);
  return group.warps == 1 ? value : warp_max(group.gather(value, row));
}

// ---- 16-bit values ------------------------------------------------------------------------------

// Low and high half of a word.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word);

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) {
  __half2 halves;
  memcpy(&halves, &word, sizeof(halves));
  return __half22float2(halves);
}

// A lane's 32 values: kLaneChunks lines of four words.
using RawLines = uint4[kLaneChunks];

// Calls use(float2) for each pair of neighbours.
template <typename T, typename Use>
__device__ __forceinline__ void for_each_pair(const RawLines& raw, Use use) {
#pragma unroll
  for (int chunk = 0; chunk < kLaneChunks; ++chunk) {
    use(unpack<T>(raw[chunk].x));
    use(unpack<T>(raw[chunk].y));
    use(unpack<T>(raw[chunk].z));
    use(unpack<T>(raw[chunk].w));
  }
}

// ---- norm ---------------------------------------------------------------------------------------

// norm(x) = x * rstd + offset
struct NormScalars {
  float rstd;
  float offset;
};

// The squares of deviations from the mean, not of x: a large mean would cost the variance its
// digits. Lanes past K hold zeros, and `active` keeps them out of the second sum.
template <typename T>
__device__ __forceinline__ NormScalars norm_scalars(TokenGroup group, const RawLines& raw,
                                                    bool active, const RotateRowsArgs& args) {
  float mean = 0.0f;
  if (args.norm == TokenNorm::kLayer) {
    float sum = 0.0f;
    for_each_pair<T>(raw, [&](float2 x) { sum += x.x + x.y; });
    mean = group_sum(group, sum, 0) * args.inverse_features;
  }
  float square = 0.0f;
  if (active) {
    for_each_pair<T>(raw, [&](float2 x) {
      const float low = x.x - mean;
      const float high = x.y - mean;
      square = fmaf(low, low, square);
      square = fmaf(high, high, square);
    });
  }
  const float rstd = rsqrtf(group_sum(group, square, 1) * args.inverse_features + args.eps);
  return {rstd, -mean * rstd};
}

// ---- transform ----------------------------------------------------------------------------------

constexpr uint32_t kLeadingBits = 0xffffe000u;  // what tf32 holds of fp32

// A lane's part of the 16 x 16 Hadamard matrix: operand A of a step, +-1 as tf32.
__device__ __forceinline__ uint4 hadamard_operand(int step, int lane) {
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = mma_row_to_line(lane / 4 + 8 * (i % 2));
    const int column = mma_column_to_line(step, lane % 4 + 4 * (i / 2));
    a[i] = hadamard_is_negative(row, column) ? 0xbf800000u : 0x3f800000u;
  }
  return make_uint4(a[0], a[1], a[2], a[3]);
}

// Adds to one element of all lines (registers of operand D) what a step's two chunks contribute.
__device__ __forceinline__ void add_lines(float (&result)[4], const uint32_t (&hadamard)[4],
                                          float even_chunk, float odd_chunk) {
  const uint32_t even = __float_as_uint(even_chunk) & kLeadingBits;
  const uint32_t odd = __float_as_uint(odd_chunk) & kLeadingBits;
  mma_m16n8k8_tf32(result, hadamard, __float_as_uint(even_chunk - __uint_as_float(even)),
                   __float_as_uint(odd_chunk - __uint_as_float(odd)));
  mma_m16n8k8_tf32(result, hadamard, even, odd);
}

__device__ __forceinline__ void butterfly(float& a, float& b) {
  const float difference = a - b;
  a += b;
  b = difference;
}

// A lane's results: [element of the line][register of operand D].
using Rotated = float[kLineElements][4];

// Stages of blocks within a rotation of 256, 512 and 1024: registers of a lane, then lanes.
__device__ __forceinline__ void transform_blocks(Rotated& v, int block_size) {
  if (block_size >= 256) {
#pragma unroll
    for (int e = 0; e < kLineElements; ++e) {
      butterfly(v[e][0], v[e][1]);
      butterfly(v[e][2], v[e][3]);
    }
  }
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    if (block_size >= 512 * bit) {
      const float sign = read_thread_index() & bit ? -1.0f : 1.0f;
#pragma unroll
      for (int e = 0; e < kLineElements; ++e) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[e][i] = fmaf(v[e][i], sign, __shfl_xor_sync(0xffffffffu, v[e][i], bit));
        }
      }
    }
  }
}

// Vectors of the sample in shared memory, in the order of use: a piece is four values of a lane, of
// word w (elements 2w, 2w + 1) of the two chunks of a step. Pieces 4 * step + w of the lanes of a
// warp lie side by side.
constexpr int kVectorPieces = 32 / 4;

// Pieces of gain and, with a norm, of shift alternate.
template <bool kNorm>
constexpr int kVectorStride = kNorm ? 64 : 32;

// v = H (norm(raw) * gain + shift), not normalized; `vectors` from this lane on.
template <typename T, bool kNorm>
__device__ __forceinline__ void rotate_lane(Rotated& v, const RawLines& raw, const float4* vectors,
                                            NormScalars norm, const uint4* hadamard) {
#pragma unroll
  for (int e = 0; e < kLineElements; ++e) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[e][i] = 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < kMmaSteps; ++step) {
    const uint4 a = hadamard[32 * step];
    const uint32_t operand[4] = {a.x, a.y, a.z, a.w};
    const uint4 even = raw[2 * step];
    const uint4 odd = raw[2 * step + 1];
    const uint32_t even_words[4] = {even.x, even.y, even.z, even.w};
    const uint32_t odd_words[4] = {odd.x, odd.y, odd.z, odd.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const float4* const piece = vectors + kVectorStride<kNorm> * (4 * step + word);
      const float4 gain = piece[0];
      const float2 x = unpack<T>(even_words[word]);
      const float2 y = unpack<T>(odd_words[word]);
      // x[0] +- x[1] and y[0] +- y[1], the stage of bit 0
      float2 sum;
      float2 difference;
      if constexpr (kNorm) {
        const float4 shift = piece[32];
        const float x0 = fmaf(fmaf(x.x, norm.rstd, norm.offset), gain.x, shift.x);
        const float x1 = fmaf(fmaf(x.y, norm.rstd, norm.offset), gain.y, shift.y);
        const float y0 = fmaf(fmaf(y.x, norm.rstd, norm.offset), gain.z, shift.z);
        const float y1 = fmaf(fmaf(y.y, norm.rstd, norm.offset), gain.w, shift.w);
        sum = make_float2(x0 + x1, y0 + y1);
        difference = make_float2(x0 - x1, y0 - y1);
      } else {
        const float x1 = x.y * gain.y;
        const float y1 = y.y * gain.w;
        sum = make_float2(fmaf(x.x, gain.x, x1), fmaf(y.x, gain.z, y1));
        difference = make_float2(fmaf(x.x, gain.x, -x1), fmaf(y.x, gain.z, -y1));
      }
      add_lines(v[2 * word], operand, sum.x, sum.y);
      add_lines(v[2 * word + 1], operand, difference.x, difference.y);
    }
  }
#pragma unroll
  for (int bit = 2; bit <= 4; bit *= 2) {
#pragma unroll
    for (int e = 0; e < kLineElements; ++e) {
      if ((e & bit) == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          butterfly(v[e][i], v[e | bit][i]);
        }
      }
    }
  }
}

// ---- quantization -------------------------------------------------------------------------------

// sqrt(mean v^2) or max|v| of the token; NaN when any value is.
__device__ __forceinline__ float token_size(TokenGroup group, const Rotated& v, int row,
                                            const RotateRowsArgs& args) {
  float size = 0.0f;
  if (args.rms) {
#pragma unroll
    for (int e = 0; e < kLineElements; ++e) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        size = fmaf(v[e][i], v[e][i], size);
      }
    }
    return __fsqrt_rn(group_sum(group, size, row) * args.inverse_features);
  }
#pragma unroll
  for (int e = 0; e < kLineElements; ++e) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      size = max_or_nan(size, fabsf(v[e][i]));
    }
  }
  return group_max(group, size, row);
}

__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return prmt(prmt(a, b, 0x0040), prmt(c, d, 0x0040), 0x5410);
}

// Codes of the 16 neighbours in registers `column` and `column + 2`.
template <bool kClamp>
__device__ __forceinline__ uint4 encode(const Rotated& v, int column, float inverse, float qmax) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t code[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float sum = fmaf(v[4 * (i % 2) + j][column + 2 * (i / 2)], inverse, kRoundingMagic);
      if (kClamp) {
        sum = fminf(fmaxf(sum, kRoundingMagic - qmax), kRoundingMagic + qmax);
      }
      code[j] = __float_as_uint(sum);
    }
    word[i] = low_bytes(code[0], code[1], code[2], code[3]);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// ---- kernel -------------------------------------------------------------------------------------

__device__ __forceinline__ float sample_value(const SampleVectors& vectors, int64_t sample, int k) {
  const int64_t at = sample * vectors.sample_stride + k;
  switch (vectors.type) {
    case OutType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(vectors.data)[at]);
    case OutType::kFloat16:
      return to_float(static_cast<const __half*>(vectors.data)[at]);
    default:
      return static_cast<const float*>(vectors.data)[at];
  }
}

// gain = (1 + scale) * channel_scale and shift * channel_scale of every k; zeros past K.
template <bool kNorm>
__device__ __forceinline__ void load_vectors(float* vectors, const RotateRowsArgs& args,
                                             int64_t sample, int features, int warps) {
  for (int at = threadIdx.x; at < kWarpElements * warps; at += blockDim.x) {
    const int lane = at / 4 % 32;
    const int piece = at / 128 % kVectorPieces;
    const int chunk = 2 * (piece / 4) + at % 4 / 2;
    const int k = at / kWarpElements * kWarpElements + lane_chunk_to_k(lane, chunk) +
                  2 * (piece % 4) + at % 2;
    const bool inside = k < features;
    const float channel = !inside                         ? 0.0f
                          : args.channel_scale == nullptr ? 1.0f
                                                          : args.channel_scale[k];
    float* const target = vectors + at / 128 * (4 * kVectorStride<kNorm>)+at % 128;
    target[0] = channel;
    if constexpr (kNorm) {
      if (inside && args.scale.data != nullptr) {
        target[0] = (1.0f + sample_value(args.scale, sample, k)) * channel;
      }
      const bool shifted = inside && args.shift.data != nullptr;
      target[128] = shifted ? sample_value(args.shift, sample, k) * channel : 0.0f;
    }
  }
}

template <typename T, bool kNorm>
__global__ void __launch_bounds__(kRotateMaxThreads, kRotateBlocksPerSm)
    rotate_rows_kernel(const __grid_constant__ RotateRowsArgs args,
                       const __grid_constant__ RotateRowsPlan plan) {
  extern __shared__ __align__(16) uint4 dynamic_shared[];
  __shared__ RotateShared scratch;
  const int features = args.features;
  const int tokens = static_cast<int>(args.tokens);

  // Dynamic shared memory: for each warp, kLanePieces of its lanes side by side, the last LaneState
  // | vectors.
  constexpr int kWarpVectors = kVectorPieces * kVectorStride<kNorm>;
  const auto pieces_of = [&](uint32_t thread) {
    return dynamic_shared + 32 * kLanePieces * (thread / 32) + thread % 32;
  };
  const auto state_of = [&](uint4* pieces) {
    return reinterpret_cast<LaneState*>(pieces + 32 * kLaneChunks);
  };
  float4* const vectors = reinterpret_cast<float4*>(dynamic_shared + plan.vectors / 16);
  const auto copy = [&](uint4* next, const void* x) {
    const uint32_t address = shared_address(next);
#pragma unroll
    for (int chunk = 0; chunk < kLaneChunks; ++chunk) {
      cp_async_16(address + 32 * sizeof(uint4) * chunk,
                  static_cast<const T*>(x) + 4 * kLineElements * chunk, 16);
    }
  };
  {
    const int lane = threadIdx.x % 32;
    const int block_warp = threadIdx.x / 32;
    const int group_index = block_warp / plan.warps_per_token;
    const int warp = block_warp - group_index * plan.warps_per_token;
    const int sample = blockIdx.x / plan.blocks_per_sample;
    const int token = blockIdx.x % plan.blocks_per_sample + plan.blocks_per_sample * group_index;
    // Blocks of 128 belong to one source as a whole; those past K stay zeros.
    const int k = kWarpElements * warp + lane_chunk_to_k(lane, 0);
    const bool in_first = k < args.first.features;
    const RowSource& source = in_first ? args.first : args.second;
    const int64_t x_step = plan.token_step * source.token_stride;
    uint4* const next = pieces_of(threadIdx.x);
    LaneState state = {nullptr, static_cast<int>(x_step / 8), sample * tokens + token};
    if (k < features) {
      const T* const x = static_cast<const T*>(source.data) + sample * source.sample_stride +
                         token * source.token_stride + (in_first ? k : k - args.first.features);
      if (token < tokens) {
        copy(next, x);
      }
      state.next_x = x + x_step;
    } else {
#pragma unroll
      for (int chunk = 0; chunk < kLaneChunks; ++chunk) {
        next[32 * chunk] = make_uint4(0, 0, 0, 0);
      }
    }
    cp_async_commit();
    *state_of(next) = state;
    if (lane == 0) {
      scratch.warps[block_warp] = {warp, group_index * plan.warps_per_token, (sample + 1) * tokens};
    }
    load_vectors<kNorm>(reinterpret_cast<float*>(vectors), args, sample, features,
                        plan.warps_per_token);
    if (block_warp == 0) {
#pragma unroll
      for (int step = 0; step < kMmaSteps; ++step) {
        scratch.hadamard[step][lane] = hadamard_operand(step, lane);
      }
    }
  }
  __syncthreads();

  const TokenGroup group = {scratch, plan.warps_per_token};
  int parity = 0;  // of the token: without a norm there is one reduction each
#pragma unroll 1
  while (true) {
    Rotated v;
    {
      const uint32_t thread = read_thread_index();
      const int lane = thread % 32;
      const WarpState of_warp = scratch.warps[thread / 32];
      uint4* const next = pieces_of(thread);
      const LaneState state = *state_of(next);
      if (state.row >= of_warp.end_row) {
        return;
      }
      RawLines raw;
      cp_async_wait<0>();
#pragma unroll
      for (int chunk = 0; chunk < kLaneChunks; ++chunk) {
        raw[chunk] = next[32 * chunk];
      }
      // A thread reads what it copied itself, so no barrier stands between.
      if (state.next_x != nullptr && state.row + plan.token_step < of_warp.end_row) {
        copy(next, state.next_x);
        state_of(next)->next_x =
            static_cast<const uint4*>(state.next_x) + static_cast<int64_t>(state.x_step);
      }
      cp_async_commit();
      NormScalars norm = {1.0f, 0.0f};
      if constexpr (kNorm) {
        norm = norm_scalars<T>(group, raw, state.next_x != nullptr, args);
      }
      rotate_lane<T, kNorm>(v, raw, vectors + kWarpVectors * of_warp.warp + lane, norm,
                            &scratch.hadamard[0][lane]);
    }
    transform_blocks(v, args.block_size);

    // The norm of H rides on the scalars of the token instead of on every element.
    const float x_scale =
        token_size(group, v, kNorm ? 2 : parity, args) * args.hadamard_norm * args.step_factor;
    parity ^= 1;
    const float inverse = __frcp_rn(x_scale);
    const bool meaningful = inverse > 0.0f && inverse < INFINITY;
    const uint32_t thread = read_thread_index();
    const int lane = thread % 32;
    const int warp = scratch.warps[thread / 32].warp;
    LaneState* const state = state_of(pieces_of(thread));
    const int row = state->row;
    state->row = row + plan.token_step;
    if (warp == 0 && lane == 0) {
      args.x_scale[row] = x_scale;
    }
    const int k = kWarpElements * warp + lane_result_to_k(lane, 0, 0);
    int8_t* const x_q = args.x_q + static_cast<int64_t>(row) * features + k;
    const float factor = inverse * args.hadamard_norm;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      uint4 codes = make_uint4(0, 0, 0, 0);
      if (meaningful) {
        codes = args.clamp ? encode<true>(v, column, factor, args.qmax)
                           : encode<false>(v, column, factor, args.qmax);
      }
      if (k + kTransform * column < features) {
        store_global_16(x_q + kTransform * column, codes);
      }
    }
  }
}

}  // namespace lrq
