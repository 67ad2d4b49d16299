// (LayerNorm or RMSNorm, modulation) -> channel scale -> block Hadamard -> int8 codes, one token in
// the registers of a group of lanes (rotate_quantize.h). Bound by memory: 3 bytes of an element, in
// whose time an H200 at full bandwidth issues 21 instructions of a lane. Per element, plain:
//
//     scale   mma    stages   max   fma   bytes   memory   rest
//      2.5    0.25    3 adds   1     1    0.75     0.6      1
//
// The additions of a transform of 128 alone were seven (NOTES.md).
#pragma once

#include <type_traits>

#include "token_norm.cuh"
#include "token_rotation.cuh"

namespace lrq {

// fp32 has unit spacing just above 1.5 * 2^23: adding it rounds half to even, and the low byte of
// the sum is the rounded integer in two's complement.
constexpr float kRoundingMagic = 12582912.0f;

struct RotateShared {
  float size[2][kRotateMaxThreads / 32];  // of what each warp has of a token; tokens in turn
  UnitMoments moments[kRotateMaxThreads / kUnitLanes];  // with a norm only
  uint64_t arrived[kRotateMaxTeams][kRotateMaxSlots];   // barriers of TokenRing
};

// ---- size of a token ----------------------------------------------------------------------------

// Two sizes of parts as one of both: sums of squares, or largest values, NaN when one is.
template <bool kSum>
__device__ __forceinline__ float both_sizes(float a, float b) {
  return kSum ? a + b : max_or_nan(a, b);
}

template <bool kSum>
__device__ __forceinline__ float column_size(const LaneResults& v, int column) {
  // Four chains: one of 16 steps would wait for itself.
  float size[kChunkWords];
#pragma unroll
  for (int word = 0; word < kChunkWords; ++word) {
#pragma unroll
    for (int i = 0; i < 2 * kResultChunks; ++i) {
      const float value = v[i / 2][word][2 * (i % 2) + column];
      if (i == 0) {
        size[word] = kSum ? value * value : fabsf(value);
      } else {
        size[word] = kSum ? fmaf(value, value, size[word]) : max_or_nan(size[word], fabsf(value));
      }
    }
  }
  return both_sizes<kSum>(both_sizes<kSum>(size[0], size[1]), both_sizes<kSum>(size[2], size[3]));
}

template <bool kSum>
__device__ __forceinline__ float warp_size(float size) {
  if constexpr (kSum) {
    return lanes_sum<32>(size);
  } else {
    // Numbers that are not negative: their bits sort like they do, and NaN above infinity.
    return __uint_as_float(reduce_max_u32(__float_as_uint(size)));
  }
}

// Size of the team's token; active: columns that are of it. sizes: of the team's warps.
template <bool kSum>
__device__ __forceinline__ float token_size(const LaneResults& v, const bool (&active)[kColumns],
                                            float* sizes) {
  float own[kColumns];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const float size = column_size<kSum>(v, column);
    own[column] = active[column] ? size : 0.0f;
  }
  const float size = warp_size<kSum>(both_sizes<kSum>(own[0], own[1]));
  if (Team::threads() == 32) {
    Team::sync();
    return size;
  }
  const int lane = Team::thread() % 32;
  if (lane == 0) {
    sizes[Team::thread() / 32] = size;
  }
  Team::sync();
  return warp_size<kSum>(32 * lane < Team::threads() ? sizes[lane] : 0.0f);
}

// ---- codes --------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return prmt(prmt(a, b, 0x0040), prmt(c, d, 0x0040), 0x5410);
}

// The 8 codes of a column's chunk.
template <bool kClamp>
__device__ __forceinline__ uint2 encode(const float (&v)[kChunkWords][4], int column, float factor,
                                        float qmax) {
  uint32_t code[kChunkWords][2];
#pragma unroll
  for (int word = 0; word < kChunkWords; ++word) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float sum = fmaf(v[word][2 * row + column], factor, kRoundingMagic);
      if (kClamp) {
        sum = fminf(fmaxf(sum, kRoundingMagic - qmax), kRoundingMagic + qmax);
      }
      code[word][row] = __float_as_uint(sum);
    }
  }
  return make_uint2(low_bytes(code[0][0], code[0][1], code[1][0], code[1][1]),
                    low_bytes(code[2][0], code[2][1], code[3][0], code[3][1]));
}

// The 16 codes of a column.
template <bool kClamp>
__device__ __forceinline__ uint4 column_codes(const LaneResults& v, int column,
                                              const float (&scales)[kResultChunks], float qmax) {
  const uint2 first = encode<kClamp>(v[0], column, scales[0], qmax);
  const uint2 second = encode<kClamp>(v[1], column, scales[1], qmax);
  return make_uint4(first.x, first.y, second.x, second.y);
}

// ---- vectors of the channels --------------------------------------------------------------------

// Two bf16 values in type T.
template <typename T>
__device__ __forceinline__ uint32_t from_bf16(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return word;
  } else {
    const float2 pair = Words<__nv_bfloat16>::unpack(word);
    return pack<T>(pair.x, pair.y);
  }
}

// Fills what a thread block keeps in shared memory, k in order: a factor of each channel, 1 or
// 1 + scale, and with a modulation a summand, shift; both times the channel scale, which may be
// null.
template <typename T, bool kModulated>
__device__ __forceinline__ void fill_vectors(T* factors, T* summands, const RotateRowsArgs& args,
                                             int sample) {
  const T* const scale = static_cast<const T*>(args.scale.data) + sample * args.scale.sample_stride;
  const T* const shift = static_cast<const T*>(args.shift.data) + sample * args.shift.sample_stride;
#pragma unroll 1
  for (int k = kChunkElements * (threadIdx.x + blockDim.x * threadIdx.y); k < args.features;
       k += kChunkElements * blockDim.x * blockDim.y) {
    uint32_t factor[kChunkWords];
    uint32_t summand[kChunkWords];
#pragma unroll
    for (int i = 0; i < kChunkWords; ++i) {
      factor[i] = Words<T>::kOnes;
    }
    if constexpr (kModulated) {
      uint32_t word[kChunkWords];
      set_chunk(word, __ldg(reinterpret_cast<const uint4*>(scale + k)));
      set_chunk(summand, __ldg(reinterpret_cast<const uint4*>(shift + k)));
#pragma unroll
      for (int i = 0; i < kChunkWords; ++i) {
        factor[i] = add<T>(factor[i], word[i]);
      }
    }
    if (args.channel_scale != nullptr) {
      uint32_t word[kChunkWords];
      set_chunk(word, __ldg(reinterpret_cast<const uint4*>(args.channel_scale + k)));
#pragma unroll
      for (int i = 0; i < kChunkWords; ++i) {
        factor[i] = multiply<T>(factor[i], from_bf16<T>(word[i]));
        if constexpr (kModulated) {
          summand[i] = multiply<T>(summand[i], from_bf16<T>(word[i]));
        }
      }
    }
    *reinterpret_cast<uint4*>(factors + k) = chunk_of(factor);
    if constexpr (kModulated) {
      *reinterpret_cast<uint4*>(summands + k) = chunk_of(summand);
    }
  }
}

// ---- kernel -------------------------------------------------------------------------------------

// A thread block is teams that stay for token after token of a sample (plan_rotate_rows). The next
// plan.slots tokens of a team are on their way under its arithmetic on the one at hand.
// kUsual: rotations of 128, and the largest value without a factor for x_scale.
template <typename T, RotateForm kForm, bool kUsual, int kRegisters>
__global__ void __maxnreg__(kRegisters)
    rotate_rows_kernel(const __grid_constant__ RotateRowsArgs args,
                       const __grid_constant__ RotateRowsPlan plan) {
  constexpr bool kModulated = kForm == RotateForm::kModulated;
  __shared__ RotateShared shared;
  extern __shared__ __align__(128) char dynamic_shared[];
  const int tokens = static_cast<int>(args.tokens);
  const int sample = blockIdx.y + gridDim.y * blockIdx.z;
  if (sample >= static_cast<int>(args.samples)) {
    return;
  }
  const int lane = Team::thread() % 32;
  // Tokens of teams of one thread block are far apart.
  int token = blockIdx.x + gridDim.x * Team::index();
  const int step = gridDim.x * blockDim.y;
  const int team_bytes = plan.slots * kLaneBytes * Team::threads();
  const TokenRing ring(shared.arrived[Team::index()], dynamic_shared + Team::index() * team_bytes,
                       args, plan, sample);
  T* const factors = reinterpret_cast<T*>(dynamic_shared + blockDim.y * team_bytes);
  T* const summands = factors + args.features;
  ring.initialize();

  grid_dependency_wait();
  grid_dependency_trigger();
#pragma unroll 1
  for (int slot = 0; slot < plan.slots; ++slot) {
    ring.request(slot, token + slot * step);
  }
  fill_vectors<T, kModulated>(factors, summands, args, sample);
  __syncthreads();

  // Units past the token are idle. Nothing leads from unit to unit but within a token, so what they
  // compute need not be defined; they read the vectors of the first.
  const bool in_token = kTransform * (Team::thread() / kUnitLanes) < args.features;
  const int first_k = in_token ? lane_first_k(Team::thread()) : chunk_of_unit(lane, 0);
  const uint32_t factor_place = shared_address(factors + first_k);
  const uint32_t summand_place = factor_place + 2 * args.features;

  const int result_k = Team::thread() / 32 * kWarpElements + lane_result_to_k(lane, 0, 0);
  bool active[kColumns];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    active[column] = result_k + column * kTransform < args.features;
  }
  const int first_warp = Team::index() * (Team::threads() / 32);
  uint32_t matrix[4];
  hadamard_fragment(matrix, lane, Words<T>::kOnes);

  const int last_slot = plan.slots - 1;  // 0 or 1
  int turn = 0;
#pragma unroll 1
  for (; token < tokens; token += step) {
    const int slot = turn & last_slot;
    ring.wait(slot, turn >> last_slot & 1);
    LaneWords words;
    LaneWords factor;
    load_words(words, ring.place(slot));
    if constexpr (kForm == RotateForm::kPlain) {
      load_words(factor, factor_place);
      for_each_word(words, [&](uint32_t& word, int chunk, int i) {
        word = multiply<T>(word, factor[chunk][i]);
      });
    } else {
      LaneValues v;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        unpack_chunk<T>(v[chunk], words[chunk]);
      }
      normalize(v, args.features / kTransform, shared.moments + first_warp * kWarpUnits, args);
      if constexpr (kModulated) {
        LaneWords summand;
        load_words(factor, factor_place);
        load_words(summand, summand_place);
        for_each_word(words, [&](uint32_t& word, int chunk, int i) {
          const uint32_t y = pack<T>(v[chunk][2 * i], v[chunk][2 * i + 1]);
          word = add<T>(multiply<T>(y, factor[chunk][i]), summand[chunk][i]);
        });
      } else {
        modulate<T>(words, v, args, sample, first_k - chunk_of_unit(lane, 0));
        load_words(factor, factor_place);
        for_each_word(words, [&](uint32_t& word, int chunk, int i) {
          word = multiply<T>(word, factor[chunk][i]);
        });
      }
    }
    LaneResults v;
    const int block_size = kUsual ? kTransform : args.block_size;
    multiply_matrix<T>(v, words, matrix);
    finish_transform(v, lane, block_size);

    const bool rms = !kUsual && args.rms;
    float* const sizes = shared.size[turn & 1] + first_warp;
    const float size =
        rms ? token_size<true>(v, active, sizes) : token_size<false>(v, active, sizes);
    // All of this token was read before the barrier of its size.
    ring.request(slot, token + plan.slots * step);
    ++turn;

    // The norm of H rides on the scalars of the token instead of on every element.
    const float scaled_size = rms ? __fsqrt_rn(size * args.inverse_features) : size;
    const float x_scale = scaled_size * args.hadamard_norm * args.step_factor;
    const float inverse = __frcp_rn(x_scale);
    const bool meaningful = inverse > 0.0f && inverse < INFINITY;
    const float scale = inverse * args.hadamard_norm;
    const int row = sample * tokens + token;  // of the outputs: kRotateMaxTokens at most
    int8_t* const x_q = args.x_q + int64_t{row} * args.features + result_k;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      uint4 codes = make_uint4(0, 0, 0, 0);
      if (meaningful) {
        // What finish_transform negates.
        const bool negated = column == 1 && block_size == kTransform;
        const float scales[kResultChunks] = {scale, negated ? -scale : scale};
        codes = !kUsual && args.clamp ? column_codes<true>(v, column, scales, args.qmax)
                                      : column_codes<false>(v, column, scales, args.qmax);
      }
      if (active[column]) {
        store_global_16(x_q + column * kTransform, codes);
      }
    }
    if (Team::thread() == 0) {
      args.x_scale[row] = x_scale;
    }
  }
}

}  // namespace lrq
