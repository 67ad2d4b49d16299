// The Hopper GEMM: wgmma on int8, for sm_90a.
//
// Y^T = W * X^T, since only operand A of wgmma may come from registers: a consumer warpgroup
// decodes the packed codes of its 64 channels and multiplies them with tile_m tokens. A block has
//
//     warpgroups 0, 1   consumers, channels 0..63 and 64..127 of the tile
//     warpgroup 2       one thread of it asks for copies; its registers go to the consumers
//
//     per stage of 128 k      x  [tile_m][128] int8 by TMA, in the 128-byte swizzle
//                             w  the 128 x 128 tile of the packed weight as it lies in memory
//
//     full[stage]    completes when the stage's bytes have arrived
//     empty[stage]   completes when every consumer warp of the cluster has left the stage
//
// In a cluster of two, blocks own neighbouring channel tiles and share X: each loads half of the
// tokens into both. A consumer step overlaps decoding with the product of the step before:
//
//     step s - 1     | wgmma a0 ........................|
//     step s         wait full, load, decode a1 | wgmma a1 .....................|
//                              wait until step s - 1 is done, release its stage |
//     step s + 1                                   wait full, load, decode a0   | wgmma a0 ...
//
// across tiles too: the first step of the next tile is decoded under the last product of this one.
#pragma once

#include <cuda.h>

#include <cstdint>

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

constexpr int kSm90ConsumerWarps = 8;
constexpr int kSm90Threads = 3 * kWarpgroupThreads;

// 65536 registers: 168 a thread at launch, then these.
constexpr int kSm90ProducerRegisters = 40;
constexpr int kSm90ConsumerRegisters = 232;

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

template <int kBits_, int kTileM_, int kStages_>
struct GemmSm90 {
  static constexpr int kBits = kBits_;
  static constexpr int kTileM = kTileM_;
  static constexpr int kStages = kStages_;
  static constexpr int kTileWords = 2 * half_tile_words(kBits);
  static constexpr uint32_t kXBytes = kTileM * kTileInputs;
  static constexpr uint32_t kWBytes = kTileWords * 4;

  struct Shared {
    alignas(kSwizzleBytes) int8_t x[kStages][kTileM * kTileInputs];
    alignas(kSwizzleBytes) unsigned char staging[2][sm90_staging_bytes(kTileM)];
    alignas(128) uint32_t w[kStages][kTileWords];
    float x_scale[2][kTileM];
    uint64_t full[kStages];
    uint64_t empty[kStages];
    uint64_t residual_full[2];
  };

  static_assert(kTileM % 16 == 0,
                "a width of wgmma, whole swizzle patterns in half a tile's tokens");
  static_assert(kStages >= 2, "a stage is released after the next has arrived");
};

using Operand = uint32_t[kSlices][4];

__device__ __forceinline__ void pin_operand(Operand& a) {
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    pin_registers(a[slice]);
  }
}

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
  const int slice_tokens = Gemm::kTileM / cluster;
  const uint32_t slice_offset = rank * slice_tokens * kTileInputs;
  const auto every_block = static_cast<uint16_t>((1 << cluster) - 1);

  RingSlot<Gemm::kStages> ring;
  for (TileWalk walk(params.schedule, blockIdx.x / cluster); !walk.done(); walk.advance()) {
    const int token = walk.m_tile() * Gemm::kTileM + static_cast<int>(rank) * slice_tokens;
    const int64_t channel_tile = static_cast<int64_t>(walk.group()) * cluster + rank;
    const uint32_t* w = params.args.weight + channel_tile * k_tiles * Gemm::kTileWords;
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      const uint32_t full = shared_address(&shared.full[ring.slot]);
      const uint32_t x = shared_address(shared.x[ring.slot]) + slice_offset;
      mbarrier_wait(shared_address(&shared.empty[ring.slot]), ring.parity ^ 1);
      mbarrier_arrive_expect(full, Gemm::kXBytes + Gemm::kWBytes);
      if (cluster > 1) {
        tensor_load_multicast(x, &x_map, k_tile * kTileInputs, token, full, every_block);
      } else {
        tensor_load(x, &x_map, k_tile * kTileInputs, token, full);
      }
      bulk_load(shared_address(shared.w[ring.slot]), w, Gemm::kWBytes, full);
      w += Gemm::kTileWords;
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
  const int k_tiles = ceil_div(static_cast<int>(args.problem.k), kTileInputs);
  const int n_size = static_cast<int>(args.problem.n);
  const WarpgroupThread self(threadIdx.x);

  // The lookup tables of this lane's rows. Rows past N decode to anything: they are not stored.
  LevelTable<kBits> tables[kRowsPerLane];
  const auto load_tables = [&](int channel0) {
#pragma unroll
    for (int row = 0; row < kRowsPerLane; ++row) {
      const int n = min_of(channel0 + self.channel + 8 * row, n_size - 1);
      tables[row] = load_level_table<kBits>(args.levels + (static_cast<int64_t>(n) << kBits));
    }
  };

  RingSlot<Gemm::kStages> ring;
  const auto decode_step = [&](Operand& a) {
    mbarrier_wait(shared_address(&shared.full[ring.slot]), ring.parity);
    uint32_t words[words_per_lane(kBits)];
    load_lane_words<kBits>(words, shared.w[ring.slot] + self.warpgroup * half_tile_words(kBits),
                           self.thread);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      decode_slice<kBits>(a[slice], words, tables, slice);
    }
  };

  int acc[kTileM / 2];
  const auto multiply_step = [&](const Operand& a, int accumulate) {
    const uint64_t x = swizzled_descriptor(shared_address(shared.x[ring.slot]));
    pin_registers(acc);
    wgmma_fence();
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      wgmma_m64k32_s8<kTileM>(acc, a[slice], x + slice * kSliceDescriptorStep,
                              slice > 0 ? 1 : accumulate);
    }
    wgmma_commit();
    pin_registers(acc);
  };
  const auto release_slot = [&](int slot) {
    if (self.lane < params.cluster) {
      mbarrier_arrive_cluster(cluster_address(shared_address(&shared.empty[slot]), self.lane));
    }
  };
  // One step later than `in_flight`: decodes, multiplies, then leaves the stage before.
  const auto next_step = [&](Operand& a, Operand& in_flight) {
    const int left = ring.slot;
    ring.advance();
    decode_step(a);
    multiply_step(a, 1);
    wgmma_wait<1>();
    pin_operand(in_flight);
    release_slot(left);
  };

  TileWalk walk(params.schedule, blockIdx.x / params.cluster);
  const auto first_channel = [&] {
    return (walk.group() * params.cluster + static_cast<int>(rank)) * kTileChannels +
           self.warpgroup * kHalfTileChannels;
  };
  TileEpilogue<kTileM> epilogue(
      params.args, params.store, self,
      {shared_address(shared.staging[self.warpgroup]), shared.x_scale[self.warpgroup],
       shared_address(&shared.residual_full[self.warpgroup])},
      y_map, residual_map);
  Operand a0;
  Operand a1;
  load_tables(first_channel());
  decode_step(a0);
  for (bool more = true; more;) {
    epilogue.begin_tile(walk.m_tile() * kTileM, first_channel());
    walk.advance();
    more = !walk.done();

    multiply_step(a0, 0);
    epilogue.request_residual();
    int k_tile = 1;
#pragma unroll 1
    for (; k_tile + 1 < k_tiles; k_tile += 2) {
      next_step(a1, a0);
      next_step(a0, a1);
    }
    const bool last_in_a1 = k_tile < k_tiles;
    if (last_in_a1) {
      next_step(a1, a0);
    }
    // The last product is under way: time for all that the epilogue and the next tile need.
    epilogue.request_scales();
    const int left = ring.slot;
    ring.advance();
    if (more) {
      load_tables(first_channel());
      if (last_in_a1) {
        decode_step(a0);
      } else {
        decode_step(a1);
      }
    }
    epilogue.place_scales();
    wgmma_wait<0>();
    pin_registers(acc);
    if (last_in_a1) {
      pin_operand(a1);
    } else {
      pin_operand(a0);
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a0[slice][i] = a1[slice][i];
        }
      }
    }
    release_slot(left);
    epilogue.store(acc, shared.staging[self.warpgroup], params.aligned);
  }
  epilogue.finish();
}

template <int kBits, int kTileM, int kStages>
__global__ void __launch_bounds__(kSm90Threads, 1)
    gemm_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap y_map,
                     const __grid_constant__ CUtensorMap residual_map,
                     const __grid_constant__ GemmSm90Params params) {
  using Gemm = GemmSm90<kBits, kTileM, kStages>;
  extern __shared__ __align__(kSwizzleBytes) unsigned char shared_bytes_of_block[];
  auto& shared = *reinterpret_cast<typename Gemm::Shared*>(shared_bytes_of_block);

  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // known uniform
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(shared_address(&shared.full[stage]), 1);
      mbarrier_init(shared_address(&shared.empty[stage]), kSm90ConsumerWarps * params.cluster);
    }
    for (uint64_t& barrier : shared.residual_full) {
      mbarrier_init(shared_address(&barrier), 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();

  if (warp >= kSm90ConsumerWarps) {
    release_registers<kSm90ProducerRegisters>();
    if (warp == kSm90ConsumerWarps && threadIdx.x % 32 == 0) {
      produce<Gemm>(shared, x_map, params, rank);
    }
    __syncwarp();
  } else {
    acquire_registers<kSm90ConsumerRegisters>();
    consume<Gemm>(shared, y_map, residual_map, params, rank);
  }
  // No block may leave while another of its cluster still copies to it or arrives at its barriers.
  cluster_arrive();
  cluster_wait();
}

}  // namespace lrq
