// The Hopper GEMM: wgmma on int8, for sm_90a.
//
// Y^T = W * X^T, since only operand A of wgmma may come from registers: a consumer warpgroup
// decodes the packed codes of its 64 channels and multiplies them with tile_m tokens. A block has
//
//     warpgroups 0, 1 (, 2)   consumers of 64 channels of the tile each
//     the last warpgroup      one thread of it asks for copies; its registers go to the consumers
//
//     per stage of 128 k      x  [tile_m][128] int8 by TMA, in the 128-byte swizzle
//                             w  a half tile of the packed weight for each consumer
//
//     full[stage]    completes when the stage's bytes have arrived
//     empty[stage]   completes when every consumer warp of the cluster has left the stage
//
// In a cluster of two, blocks own neighbouring channel tiles and share X: each loads half of the
// tokens into both.
//
// A stage is four products of 32 k, each with a quarter (slice) of operand A. A warp that hands over
// a product stands still until the tensor core has taken the one before, so decoding is dealt out
// between the products: one product is under way while the slice that the product before it has
// read is decoded anew, for the next stage.
//
//     product   | s, 0 | s, 1   | s, 2   | s, 3   | s+1, 0 | s+1, 1 | ...
//     decode           | s, 3   | s+1, 0 | s+1, 1 | s+1, 2 | s+1, 3 | ...
//
// Across tiles too: the next tile's slices are decoded under the last products of this one.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "../device/sm90.cuh"
#include "../device/twin_log.cuh"
#include "../device/wgmma_s8.cuh"
#include "../layout/packed_weight.h"
#include "config.h"
#include "epilogue.cuh"
#include "epilogue_sm90.cuh"
#include "problem.h"
#include "schedule_sm90.h"

namespace lrq {

// 65536 registers: 168 a thread of three warpgroups or 128 of four at launch, then these.
constexpr int producer_registers(int consumers) { return consumers == 2 ? 40 : 56; }
constexpr int consumer_registers(int consumers) { return consumers == 2 ? 232 : 152; }

// A place in the ring of stages: the slot, and the parity of the phase that fills it this time.
template <int kStages>
struct RingSlot {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Stages that a tile takes: at least two, which spares the loop a special case. Past K, X is zeros,
// whatever the weight.
__device__ __forceinline__ int step_count(int k) { return max_of(ceil_div(k, kTileInputs), 2); }

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
  // The first slices of the next tile are decoded under the last products of this one, where there
  // are registers to hold them over the epilogue.
  static constexpr bool kBeginsEarly = kConsumers == 2;
  static constexpr uint32_t kXBytes = kTileM * kTileInputs;
  static constexpr uint32_t kHalfBytes = kHalfWords * 4;

  // Where the tile of a stage begins: token, and channel of the block.
  struct Origin {
    int m;
    int n;
  };

  struct Shared {
    alignas(kSwizzleBytes) int8_t x[kStages][kTileM * kTileInputs];
    alignas(kSwizzleBytes) unsigned char staging[kConsumers][sm90_staging_bytes(kTileM)];
    alignas(128) uint32_t w[kStages][kConsumers][kHalfWords];
    float x_scale[kConsumers][kTileM];
    Origin origin[kStages];
    uint64_t full[kStages];
    uint64_t empty[kStages];
    uint64_t residual_full[kConsumers];
  };

  static_assert(kTileM % 16 == 0,
                "a width of wgmma, whole swizzle patterns in half a tile's tokens");
  static_assert(kStages >= 2, "a stage is released after the next has arrived");
};

// What a launch hands over beside the tensor maps.
struct GemmSm90Params {
  GemmArgs args;
  TileSchedule schedule;
  int cluster;
  bool aligned;     // has_aligned_octets
  TileStore store;  // how tiles leave
};

// The thread that feeds the ring: asks for stage after stage, as far ahead as there are free slots.
template <typename Gemm>
__device__ __forceinline__ void produce(typename Gemm::Shared& shared, const CUtensorMap& x_map,
                                        const GemmSm90Params& params, uint32_t rank) {
  const int cluster = params.cluster;
  const int k_tiles = ceil_div(static_cast<int>(params.args.problem.k), kTileInputs);
  const int steps = step_count(static_cast<int>(params.args.problem.k));
  const int half_tiles = 2 * ceil_div(static_cast<int>(params.args.problem.n), kTileChannels);
  const int slice_tokens = Gemm::kTileM / cluster;
  const uint32_t slice_offset = rank * slice_tokens * kTileInputs;
  const auto every_block = static_cast<uint16_t>((1 << cluster) - 1);

  RingSlot<Gemm::kStages> ring;
  for (TileWalk walk(params.schedule, blockIdx.x / cluster); !walk.done(); walk.advance()) {
    const int channel_tile = walk.group() * cluster + static_cast<int>(rank);
    const typename Gemm::Origin origin = {walk.m_tile() * Gemm::kTileM,
                                          channel_tile * Gemm::kTileN};
    const int token = origin.m + static_cast<int>(rank) * slice_tokens;
    // Past the last channel there is no weight: those consumers multiply what lies there.
    const int half_tile = channel_tile * Gemm::kConsumers;
    const int halves = min_of(half_tiles - half_tile, Gemm::kConsumers);
    const uint32_t* w[Gemm::kConsumers];
#pragma unroll
    for (int i = 0; i < Gemm::kConsumers; ++i) {
      const int64_t channel = static_cast<int64_t>(half_tile + i) * kHalfTileChannels;
      w[i] = params.args.weight + nk_to_half_tile(channel, 0, k_tiles) * Gemm::kHalfWords;
    }
#pragma unroll 1
    for (int k_tile = 0; k_tile < steps; ++k_tile) {
      const uint32_t full = shared_address(&shared.full[ring.slot]);
      const uint32_t x = shared_address(shared.x[ring.slot]) + slice_offset;
      mbarrier_wait(shared_address(&shared.empty[ring.slot]), ring.parity ^ 1);
      shared.origin[ring.slot] = origin;  // the arrival publishes it
      mbarrier_arrive_expect(full, Gemm::kXBytes + halves * Gemm::kHalfBytes);
      if (cluster > 1) {
        tensor_load_multicast(x, &x_map, k_tile * kTileInputs, token, full, every_block);
      } else {
        tensor_load(x, &x_map, k_tile * kTileInputs, token, full);
      }
#pragma unroll
      for (int i = 0; i < Gemm::kConsumers; ++i) {
        if (i < halves) {
          bulk_load(shared_address(shared.w[ring.slot][i]), w[i], Gemm::kHalfBytes, full);
          w[i] += k_tile + 1 < k_tiles ? 2 * Gemm::kHalfWords : 0;
        }
      }
      ring.advance();
    }
  }
}

// One consumer warpgroup: decodes, multiplies, writes.
template <typename Gemm>
__device__ __forceinline__ void consume(typename Gemm::Shared& shared, const CUtensorMap& y_map,
                                        const CUtensorMap& residual_map,
                                        const GemmSm90Params& params, uint32_t rank) {
  constexpr int kBits = Gemm::kBits;
  constexpr int kTileM = Gemm::kTileM;

  const GemmArgs& args = params.args;
  const int steps = step_count(static_cast<int>(args.problem.k));
  const int n_size = static_cast<int>(args.problem.n);
  const WarpgroupThread self;
  const int warpgroup =
      __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0);  // known uniform

  // Slices 0..2 of `a` belong to stage `slot`; slice 3 still to the stage before, until the first
  // product of `slot` is under way. `ring` is the stage that is decoded next.
  RingSlot<Gemm::kStages> ring;
  int slot = 0;
  LevelTable<kBits> tables[kRowsPerLane];
  uint32_t words[words_per_lane(kBits)];
  uint32_t a[kSlices][4];
  // The first words are asked for before any is used, the others when those are used up.
  const auto load_words = [&](int of_slot, int slice) {
    load_slice_words<kBits>(words, shared.w[of_slot][warpgroup], self.thread, slice);
  };
  const auto await_stage = [&] {
    mbarrier_wait(shared_address(&shared.full[ring.slot]), ring.parity);
    slot = ring.slot;
    ring.advance();
  };
  // Once no more than `pending` products are under way, none of which reads a[slice].
  const auto decode = [&](int slice, auto pending) {
    wgmma_wait<decltype(pending)::value>();
    pin_registers(a[slice]);
#pragma unroll
    for (int word = 0; word < words_per_lane(kBits); ++word) {
      if (slice_reads_word(kBits, slice, word)) {
        pin_register(words[word]);
      }
    }
    decode_slice<kBits>(a[slice], words, tables, slice);
  };
  constexpr std::integral_constant<int, 1> kOnePending;

  int acc[kTileM / 2];
  const auto multiply = [&](uint64_t x, int slice, int accumulate) {
    wgmma_fence();
    wgmma_m64k32_s8<kTileM>(acc, a[slice], x + slice * kSliceDescriptorStep, accumulate);
    wgmma_commit();
  };
  const auto x_descriptor = [&] { return swizzled_descriptor(shared_address(shared.x[slot])); };
  const auto release_slot = [&](int slot) {
    if (self.lane < params.cluster) {
      mbarrier_arrive_cluster(cluster_address(shared_address(&shared.empty[slot]), self.lane));
    }
  };
  // One stage of the main loop. The first of a tile starts the sums; the others find the stage
  // `left` behind them read.
  int left = 0;
  const auto step = [&](bool first) {
    const uint64_t x = x_descriptor();
    multiply(x, 0, first ? 0 : 1);
    decode(3, kOnePending);
    if (!first) {
      release_slot(left);
    }
    left = slot;
    multiply(x, 1, 1);
    await_stage();
    load_words(slot, 0);
    decode(0, kOnePending);
    multiply(x, 2, 1);
    decode(1, kOnePending);
    load_words(slot, 2);
    multiply(x, 3, 1);
    decode(2, kOnePending);
  };

  TileEpilogue<typename Gemm::Shared, kTileM> epilogue(shared, args, params.store, y_map,
                                                       residual_map);

  // Waits for the first stage of a tile and says where the tile begins, then for this warpgroup's
  // lookup tables. Rows past N decode to anything: they are not stored.
  const auto begin_tile = [&] {
    await_stage();
    load_words(slot, 0);
    typename Gemm::Origin origin = shared.origin[slot];
    origin.n += warpgroup * kHalfTileChannels;
#pragma unroll
    for (int row = 0; row < kRowsPerLane; ++row) {
      const int n = min_of(origin.n + self.channel + 8 * row, n_size - 1);
      tables[row] = load_level_table<kBits>(args.levels + (static_cast<int64_t>(n) << kBits));
    }
    return origin;
  };

  // With nothing under way.
  const auto decode_first_slices = [&] {
    decode_slice<kBits>(a[0], words, tables, 0);
    decode_slice<kBits>(a[1], words, tables, 1);
    load_words(slot, 2);
    decode_slice<kBits>(a[2], words, tables, 2);
  };

  int tiles = tile_count(params.schedule, blockIdx.x / params.cluster);
  typename Gemm::Origin origin = begin_tile();
  decode_first_slices();
  while (true) {
    epilogue.begin_tile(origin.m, origin.n);
    epilogue.request_residual();

    step(true);
#pragma unroll 1
    for (int k_tile = 2; k_tile < steps; ++k_tile) {
      step(false);
    }

    // The last stage: under its products the next tile is begun, and all that the epilogue needs is
    // fetched.
    const uint64_t x = x_descriptor();
    multiply(x, 0, 1);
    decode(3, kOnePending);
    release_slot(left);
    left = slot;
    multiply(x, 1, 1);
    multiply(x, 2, 1);
    multiply(x, 3, 1);
    const auto scales = epilogue.request_scales();
    if (Gemm::kBeginsEarly && tiles > 1) {
      origin = begin_tile();
      decode(0, std::integral_constant<int, 3>{});
      decode(1, std::integral_constant<int, 2>{});
      load_words(slot, 2);
      decode(2, kOnePending);
    }
    epilogue.place_scales(scales);
    wgmma_wait<0>();
    pin_registers(acc);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      pin_registers(a[slice]);  // nothing else was in its registers until here
    }
    release_slot(left);
    epilogue.store(acc, scales, params.aligned);
    if (--tiles == 0) {
      break;
    }
    if (!Gemm::kBeginsEarly) {
      origin = begin_tile();
      decode_first_slices();
    }
  }
  epilogue.finish();
}

template <int kBits, int kTileM, int kConsumers, int kStages>
__global__ void __launch_bounds__(GemmSm90<kBits, kTileM, kConsumers, kStages>::kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap y_map,
                     const __grid_constant__ CUtensorMap residual_map,
                     const __grid_constant__ GemmSm90Params params) {
  using Gemm = GemmSm90<kBits, kTileM, kConsumers, kStages>;
  extern __shared__ __align__(kSwizzleBytes) unsigned char shared_bytes_of_block[];
  auto& shared = *reinterpret_cast<typename Gemm::Shared*>(shared_bytes_of_block);

  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // known uniform
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(shared_address(&shared.full[stage]), 1);
      mbarrier_init(shared_address(&shared.empty[stage]), Gemm::kConsumerWarps * params.cluster);
    }
    for (uint64_t& barrier : shared.residual_full) {
      mbarrier_init(shared_address(&barrier), 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();

  if (warp >= Gemm::kConsumerWarps) {
    release_registers<producer_registers(kConsumers)>();
    if (warp == Gemm::kConsumerWarps && threadIdx.x % 32 == 0) {
      produce<Gemm>(shared, x_map, params, rank);
    }
    __syncwarp();
  } else {
    acquire_registers<consumer_registers(kConsumers)>();
    consume<Gemm>(shared, y_map, residual_map, params, rank);
  }
  // No block may leave while another of its cluster still copies to it or arrives at its barriers.
  cluster_arrive();
  cluster_wait();
}

}  // namespace lrq
