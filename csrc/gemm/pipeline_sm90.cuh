// What the parts of the Hopper GEMM (gemm_sm90.cuh) share: sizes, shared memory, who is where.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../device/sm90.cuh"
#include "../layout/packed_weight.h"
#include "config.h"
#include "epilogue_sm90.cuh"
#include "problem.h"
#include "schedule_sm90.h"
#include "stages_sm90.cuh"

namespace lrq {

// Named barriers 1..3 are the consumers' own (epilogue_sm90.cuh).
constexpr int kAllConsumersBarrier = 4;

// What a launch hands over beside the tensor maps.
struct GemmSm90Params {
  GemmArgs args;
  TileSchedule schedule;
  int cluster;      // blocks that share X
  int split_k;      // blocks that share a tile; one of the two is 1
  bool aligned;     // has_aligned_octets
  TileStore store;  // how tiles leave
};

// Tensor maps of tiles of one number of tokens. x by that of a tile over the blocks that share it;
// y and residual by tensor stores, unset where tiles leave otherwise.
struct TensorMaps {
  CUtensorMap x;
  CUtensorMap y;
  CUtensorMap residual;
};

// This block: the number of its cluster, and its own in it.
struct BlockPlace {
  uint32_t cluster;
  int channel_rank;
  int k_rank;

  __device__ __forceinline__ explicit BlockPlace(const GemmSm90Params& params)
      : cluster(blockIdx.x / (params.cluster * params.split_k)),
        channel_rank(params.split_k > 1 ? 0 : static_cast<int>(cluster_rank())),
        k_rank(params.split_k > 1 ? static_cast<int>(cluster_rank()) : 0) {}
};

// Where a tile begins.
struct TileOrigin {
  int m;
  int n;
};

// k tiles first .. last - 1.
struct StepRange {
  int first;
  int last;
};

template <int kBits_, int kTileM_, int kConsumers_, int kStages_>
struct GemmSm90 {
  static constexpr int kBits = kBits_;
  static constexpr int kTileM = kTileM_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kStages = kStages_;
  static constexpr int kTileN = kConsumers * kHalfTileChannels;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kConsumerWarps = kConsumers * kWarpgroupThreads / 32;
  static constexpr int kHalfWords = half_tile_words(kBits);
  static constexpr uint32_t kXBytes = kTileM * kTileInputs;
  // Two consumers have registers for a second operand A, and to hold what is decoded of the next
  // tile over the epilogue (consumer_sm90.cuh).
  static constexpr bool kTwoOperands = kConsumers == 2;
  static constexpr bool kBeginsEarly = kTwoOperands;
  static constexpr int kFewestSteps = sm90_fewest_steps(kConsumers);
  static constexpr bool kHasTail = sm90_has_tail(kTileM, kConsumers);

  struct Shared {
    alignas(kSwizzleBytes) int8_t x[kStages][kTileM * kTileInputs];
    alignas(kSwizzleBytes) unsigned char staging[kConsumers][sm90_staging_bytes(kTileM)];
    alignas(128) uint32_t w[kStages][kConsumers][kHalfWords];
    float x_scale[kConsumers][kTileM];
    TileOrigin origin[kStages];  // of the tile that the stage belongs to
    uint64_t full[kStages];
    uint64_t empty[kStages];
    uint64_t residual_full[kConsumers];
  };

  static_assert(kTileM % 16 == 0,
                "a width of wgmma, whole swizzle patterns in half a tile's tokens");
  static_assert(kStages >= 2, "a stage is released after the next has arrived");
  static_assert(kConsumers * kTileM * kStagedTokenBytes <=
                    sizeof(Shared::x) + sizeof(Shared::staging),
                "the sums of a whole tile as int32, for blocks that split K");

  // The block's share of the k tiles, dealt as evenly as they go.
  __device__ __forceinline__ static StepRange step_range(const GemmSm90Params& params,
                                                         const BlockPlace& place) {
    const int k_tiles = ceil_div(static_cast<int>(params.args.problem.k), kTileInputs);
    return {k_tiles * place.k_rank / params.split_k,
            max_of(k_tiles * (place.k_rank + 1) / params.split_k, kFewestSteps)};
  }

  __device__ __forceinline__ static TileOrigin tile_origin(const TileWalk& walk, int cluster,
                                                           int channel_rank) {
    return {walk.m_tile() * kTileM, (walk.group() * cluster + channel_rank) * kTileN};
  }

  // Of the cluster's part of the tail, where it has one.
  __device__ __forceinline__ static TileOrigin tail_origin(const GemmSm90Params& params,
                                                           const BlockPlace& place) {
    const TailPart tail = tail_part(params.schedule, place.cluster);
    return {tail.m_tile * kTileM + tail.part * params.schedule.tail_tokens,
            (tail.group * params.cluster + place.channel_rank) * kTileN};
  }
};

// The same stages, of which a tile takes the first tokens.
template <typename Gemm, int kTokens>
struct TailOf : Gemm {
  static constexpr int kTileM = kTokens;
};

}  // namespace lrq
