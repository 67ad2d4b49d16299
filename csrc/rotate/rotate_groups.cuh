// What rotate_rows.cuh does, for a few tokens in the registers of a thread block, which takes no
// others: no lane is idle where K is no multiple of 1024, and what a warp loads of the channel
// scale serves several tokens. Nothing is in shared memory but the vectors of a modulation: loads
// are hidden by the other thread blocks of the SM, not by a ring.
#pragma once

#include "token_codes.cuh"
#include "token_norm.cuh"
#include "token_size.cuh"
#include "token_vectors.cuh"

namespace lrq {

// A lane's words of a token that is there, or another's.
template <int kTokens>
__device__ __forceinline__ void load_group(LaneWords& words, const RotateRowsArgs& args, int sample,
                                           int token, int k) {
  const bool in_first = k < args.first.features;
  const RowSource& source = in_first ? args.first : args.second;
  const int own =
      min(token + TeamLayout<kTokens>::token(threadIdx.x), static_cast<int>(args.tokens) - 1);
  const char* const unit = static_cast<const char*>(source.data) +
                           2 * (sample * source.sample_stride + int64_t{own} * source.token_stride +
                                (in_first ? k : k - args.first.features));
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int of_unit = chunk_of_unit(threadIdx.x % 32, chunk);
    set_chunk(words[chunk], *reinterpret_cast<const uint4*>(unit + 2 * of_unit));
  }
}

// words *= channel scale, from memory: of several tokens a warp reads the same.
template <typename T>
__device__ __forceinline__ void apply_channel_scale(LaneWords& words, const RotateRowsArgs& args,
                                                    int k) {
  if (args.channel_scale == nullptr) {
    return;
  }
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    uint32_t factor[kChunkWords];
    const int of_unit = chunk_of_unit(threadIdx.x % 32, chunk);
    set_chunk(factor, load_constant_16(args.channel_scale + k + of_unit));
#pragma unroll
    for (int i = 0; i < kChunkWords; ++i) {
      words[chunk][i] = multiply<T>(words[chunk][i], from_bf16<T>(factor[i]));
    }
  }
}

// Rotations of 128. kUsual: the largest value without a factor for x_scale.
template <typename T, RotateForm kForm, bool kUsual, int kTokens>
__global__ void __maxnreg__(kRotateGroupRegisters + more_registers(kCodeArch))
    rotate_groups_kernel(const __grid_constant__ RotateRowsArgs args) {
  using Team = WholeBlock;
  using Layout = TeamLayout<kTokens>;
  using Lanes = SizeLanes<kTokens>;
  constexpr bool kModulated = kForm == RotateForm::kModulated;
  static_assert(kModulated || kForm == RotateForm::kPlain, "forms that groups take");
  constexpr int kMaxWarps = kRotateMaxGroupWarps;
  __shared__ float sizes[kMaxWarps * kTokens];
  __shared__ UnitMoments moments[kModulated ? kMaxWarps * kWarpUnits : 1];
  extern __shared__ __align__(128) char dynamic_shared[];
  const int tokens = static_cast<int>(args.tokens);
  const int sample = sample_of_block();
  if (sample >= static_cast<int>(args.samples)) {
    return;
  }
  const int thread = Team::thread();
  const int lane = thread % 32;
  const int token = kTokens * blockIdx.x;
  // Idle units read the first, and nothing leads from unit to unit but within a token.
  const bool in_token = Layout::unit_k(thread) < args.features;
  const int k = in_token ? Layout::unit_k(thread) : 0;
  bool active[kColumns];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    active[column] = token + Layout::result_token(thread, column) < tokens &&
                     Layout::result_k(thread, column) < args.features;
  }

  grid_dependency_wait();
  grid_dependency_trigger();
  LaneWords words;
  load_group<kTokens>(words, args, sample, token, k);
  if constexpr (kModulated) {
    T* const factors = reinterpret_cast<T*>(dynamic_shared);
    T* const summands = factors + args.features;
    fill_vectors<T, true>(factors, summands, args, sample);
    const auto load = [&](LaneWords& copy) { memcpy(copy, words, sizeof(copy)); };
    const NormFactors norm = norm_factors<T, Team, kTokens>(load, in_token, moments, args);
    if (Team::threads() == 32) {
      Team::sync();  // vectors are there; more warps have waited for their moments
    }
    normalize<T>(words, norm);
    const uint32_t place = shared_address(factors + k + chunk_of_unit(lane, 0));
    apply_vectors<T, true>(words, place, place + 2 * args.features);
  } else {
    apply_channel_scale<T>(words, args, k);
  }
  uint32_t matrix[4];
  hadamard_fragment(matrix, lane, Words<T>::kOnes);
  LaneResults v;
  multiply_matrix<T>(v, words, matrix);
  finish_transform(v, lane, kTransform);

  const bool rms = !kUsual && args.rms;
  const float size = rms ? token_size<true, Team, kTokens>(v, active, sizes)
                         : token_size<false, Team, kTokens>(v, active, sizes);
  const TokenScales scales = token_scales(size, rms, args);
  float to_code[kColumns] = {scales.to_code, scales.to_code};
  if constexpr (Lanes::kOnePerColumn) {
    const float other = other_lane(scales.to_code, kUnitLanes);
    const bool odd = Lanes::column(lane) == 1;
    to_code[0] = odd ? other : scales.to_code;
    to_code[1] = odd ? scales.to_code : other;
  }
  const int row = sample * tokens + token;  // of the outputs: kRotateMaxTokens at most
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const uint4 codes = column_codes<!kUsual>(v, column, to_code[column], column == 1, args);
    if (active[column]) {
      const int64_t own = row + Layout::result_token(thread, column);
      store_global_16(args.x_q + own * args.features + Layout::result_k(thread, column), codes);
    }
  }
  const int own = Lanes::token(lane);
  if (thread < 32 && Lanes::rank(lane) == 0 && token + own < tokens) {
    args.x_scale[row + own] = scales.x_scale;
  }
}

}  // namespace lrq
