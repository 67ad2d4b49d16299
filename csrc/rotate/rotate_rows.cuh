// (LayerNorm or RMSNorm, modulation) -> channel scale -> block Hadamard -> int8 codes, one token in
// the registers of a team of warps (rotate_quantize.h). Bound by memory: 3 bytes of an element, in
// whose time an H200 at full bandwidth issues 21 instructions of a lane. Per element, plain:
//
//     scale   mma    stages   max   fma   bytes   memory   rest
//      2.5    0.25    3 adds   1     1    0.75     0.6      1
//
// The additions of a transform of 128 alone were seven (NOTES.md).
#pragma once

#include "token_codes.cuh"
#include "token_norm.cuh"
#include "token_ring.cuh"
#include "token_size.cuh"
#include "token_vectors.cuh"

namespace lrq {

struct RotateShared {
  float size[2][kRotateMaxThreads / 32];  // of what each warp has of a token; tokens in turn
  UnitMoments moments[kRotateMaxThreads / kUnitLanes];  // with a norm only
  uint64_t arrived[kRotateMaxTeams][kRotateMaxSlots];   // barriers of TokenRing
};

// A thread block is teams that stay for token after token of a sample (plan_rotate_rows). The next
// plan.slots tokens of a team are on their way under its arithmetic on the one at hand.
// kUsual: rotations of 128, and the largest value without a factor for x_scale.
template <typename T, RotateForm kForm, bool kUsual>
__global__ void __maxnreg__(row_registers(kForm, kUsual) + more_registers(kCodeArch))
    rotate_rows_kernel(const __grid_constant__ RotateRowsArgs args,
                       const __grid_constant__ RotateRowsPlan plan) {
  using Team = TeamOfBlock;
  using Layout = TeamLayout<1>;
  constexpr bool kModulated = kForm == RotateForm::kModulated;
  __shared__ RotateShared shared;
  extern __shared__ __align__(128) char dynamic_shared[];
  const int tokens = static_cast<int>(args.tokens);
  const int sample = sample_of_block();
  if (sample >= static_cast<int>(args.samples)) {
    return;
  }
  const int thread = Team::thread();
  const int lane = thread % 32;
  // Tokens of teams of one thread block are far apart.
  int token = blockIdx.x + gridDim.x * Team::index();
  const int step = gridDim.x * blockDim.y;
  const int team_bytes = plan.slots * kLaneBytes * Team::threads();
  const TokenRing ring(shared.arrived[Team::index()], dynamic_shared + Team::index() * team_bytes,
                       args, plan, sample);
  T* const factors = reinterpret_cast<T*>(dynamic_shared + blockDim.y * team_bytes);
  T* const summands = factors + args.features;
  ring.initialize();
  __syncthreads();

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
  const bool in_token = Layout::unit_k(thread) < args.features;
  const int unit_k = in_token ? Layout::unit_k(thread) : 0;
  const uint32_t factor_place = shared_address(factors + unit_k + chunk_of_unit(lane, 0));
  const uint32_t summand_place = factor_place + 2 * args.features;

  const int result_k = Layout::result_k(thread, 0);
  bool active[kColumns];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    active[column] = Layout::result_k(thread, column) < args.features;
  }
  const int first_warp = Team::index() * (Team::threads() / 32);
  uint32_t matrix[4];
  hadamard_fragment(matrix, lane, Words<T>::kOnes);

  const int last_slot = plan.slots - 1;  // 0 or 1
#pragma unroll 1
  for (int turn = 0; token < tokens; token += step, ++turn) {
    const int slot = turn & last_slot;
    ring.wait(slot, turn >> last_slot & 1);
    // Read again after the norm: held, they would take registers from its sums.
    const auto load = [&](LaneWords& words) { load_words(words, ring.place(slot)); };
    LaneWords words;
    if constexpr (kForm == RotateForm::kPlain) {
      load(words);
    } else {
      UnitMoments* const moments = shared.moments + first_warp * kWarpUnits;
      const NormFactors norm = norm_factors<T, Team, 1>(load, in_token, moments, args);
      load(words);
      if constexpr (kModulated) {
        normalize<T>(words, norm);
      } else {
        modulate<T>(words, norm, args, sample, unit_k);
      }
    }
    apply_vectors<T, kModulated>(words, factor_place, summand_place);
    LaneResults v;
    const int block_size = kUsual ? kTransform : args.block_size;
    multiply_matrix<T>(v, words, matrix);
    finish_transform(v, lane, block_size);

    const bool rms = !kUsual && args.rms;
    float* const sizes = shared.size[turn & 1] + first_warp;
    const float size = rms ? token_size<true, Team, 1>(v, active, sizes)
                           : token_size<false, Team, 1>(v, active, sizes);
    // All of this token was read before the barrier of its size.
    ring.request(slot, token + plan.slots * step);

    const TokenScales scales = token_scales(size, rms, args);
    const int row = sample * tokens + token;  // of the outputs: kRotateMaxTokens at most
    int8_t* const x_q = args.x_q + int64_t{row} * args.features + result_k;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const bool negated = column == 1 && block_size == kTransform;
      const uint4 codes = column_codes<!kUsual>(v, column, scales.to_code, negated, args);
      if (active[column]) {
        store_global_16(x_q + column * kTransform, codes);
      }
    }
    if (thread == 0) {
      args.x_scale[row] = scales.x_scale;
    }
  }
}

}  // namespace lrq
