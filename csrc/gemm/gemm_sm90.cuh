// The Hopper GEMM: wgmma on int8, for sm_90a.
//
// Y^T = W * X^T, since only operand A of wgmma may come from registers: a consumer warpgroup
// decodes the packed codes of its 64 channels and multiplies them with tile_m tokens. A block has
//
//     warpgroups 0, 1 (, 2)   consumers of 64 channels of the tile each (consumer_sm90.cuh)
//     the last warpgroup      one thread of it asks for copies; its registers go to the consumers
//
//     per stage of 128 k      x  [tile_m][128] int8 by TMA, in the 128-byte swizzle
//                             w  a half tile of the packed weight for each consumer
//
//     full[stage]    completes when the stage's bytes have arrived
//     empty[stage]   completes when every consumer warp that reads the stage has left it
//
// Blocks form clusters in one of two ways:
//
//     cluster = 2   neighbours along the channels share X: each loads half of the tokens into both
//     split_k > 1   the blocks of a cluster own parts of K of one tile; at its end each adds up the
//                   sums of all for its share of the tokens, through distributed shared memory
//
// Integer sums do not depend on the order, so every way gives the same bits.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../device/sm90.cuh"
#include "../layout/packed_weight.h"
#include "config.h"
#include "consumer_sm90.cuh"
#include "epilogue.cuh"
#include "epilogue_sm90.cuh"
#include "pipeline_sm90.cuh"
#include "problem.h"
#include "schedule_sm90.h"

namespace lrq {

// The thread that feeds the ring: asks for stage after stage, as far ahead as there are free slots.
template <typename Gemm>
__device__ __forceinline__ void produce(typename Gemm::Shared& shared, const CUtensorMap& x_map,
                                        const GemmSm90Params& params, const BlockPlace& place) {
  const int cluster = params.cluster;
  const int k_tiles = ceil_div(static_cast<int>(params.args.problem.k), kTileInputs);
  const int half_tiles = 2 * ceil_div(static_cast<int>(params.args.problem.n), kTileChannels);
  const int slice_tokens = Gemm::kTileM / cluster;
  const uint32_t slice_offset = place.channel_rank * slice_tokens * kTileInputs;
  const auto every_block = static_cast<uint16_t>((1 << cluster) - 1);
  const StepRange range = Gemm::step_range(params, place);

  RingSlot<Gemm::kStages> ring;
  for (TileWalk walk(params.schedule, place.cluster); !walk.done(); walk.advance()) {
    const TileOrigin origin = Gemm::tile_origin(walk, cluster, place.channel_rank);
    const int token = origin.m + place.channel_rank * slice_tokens;
    HalfTiles<Gemm::kConsumers, Gemm::kHalfWords> w(params.args.weight, origin.n, half_tiles,
                                                    range.first, k_tiles);
#pragma unroll 1
    for (int k_tile = range.first; k_tile < range.last; ++k_tile) {
      const uint32_t full = shared_address(&shared.full[ring.slot]);
      const uint32_t x = shared_address(shared.x[ring.slot]) + slice_offset;
      mbarrier_wait(shared_address(&shared.empty[ring.slot]), ring.parity ^ 1);
      shared.origin[ring.slot] = origin;  // the arrival publishes it
      mbarrier_arrive_expect(full, Gemm::kXBytes + w.bytes());
      if (cluster > 1) {
        tensor_load_multicast(x, &x_map, k_tile * kTileInputs, token, full, every_block);
      } else {
        tensor_load(x, &x_map, k_tile * kTileInputs, token, full);
      }
      w.load(shared.w[ring.slot], full, k_tile + 1 < k_tiles);  // past K, X is zeros
      ring.advance();
    }
  }
}

// One consumer warpgroup: decodes, multiplies, writes.
template <typename Gemm>
__device__ __forceinline__ void consume(typename Gemm::Shared& shared, const CUtensorMap& y_map,
                                        const CUtensorMap& residual_map,
                                        const GemmSm90Params& params, const BlockPlace& place) {
  const StepRange range = Gemm::step_range(params, place);
  int tiles = tile_count(params.schedule, place.cluster);
  TileEpilogue<typename Gemm::Shared, Gemm::kTileM> epilogue(shared, params.args, params.store,
                                                             y_map, residual_map);
  Consumer<Gemm> consumer(shared, params);
  TileOrigin origin = Gemm::tile_origin(TileWalk(params.schedule, place.cluster), params.cluster,
                                        place.channel_rank);
  origin.n += consumer.warpgroup() * kHalfTileChannels;
  consumer.begin_first(origin.n);
  while (true) {
    epilogue.begin_tile(origin.m, origin.n);
    epilogue.request_residual();
    consumer.multiply(range.last - range.first);
    // The last products are under way: time for all that the epilogue and the next tile need.
    const auto scales = epilogue.request_scales();
    if (Gemm::kBeginsEarly && tiles > 1) {
      origin = consumer.begin_next();
    }
    epilogue.place_scales(scales);
    consumer.finish();
    if (params.split_k > 1) {
      break;  // one tile a cluster
    }
    epilogue.store(consumer.sums(), scales, params.aligned);
    if (--tiles == 0) {
      break;
    }
    if (!Gemm::kBeginsEarly) {
      origin = consumer.begin_next();
    }
  }
  if (params.split_k > 1) {
    named_barrier(kAllConsumersBarrier, Gemm::kConsumers * kWarpgroupThreads);
    epilogue.stage_sums(consumer.sums());  // where the stages were, which no consumer reads now
    cluster_arrive();
    cluster_wait();
    epilogue.store_split(params.split_k, place.k_rank, params.aligned);
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
  const BlockPlace place(params);
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
  cluster_arrive_relaxed();
  cluster_wait();
  grid_dependency_wait();
  grid_dependency_trigger();

  if (warp >= Gemm::kConsumerWarps) {
    release_registers<producer_registers(kConsumers)>();
    if (warp == Gemm::kConsumerWarps && threadIdx.x % 32 == 0) {
      produce<Gemm>(shared, x_map, params, place);
    }
    __syncwarp();
    if (params.split_k > 1) {
      cluster_arrive_relaxed();  // beside the consumers, which exchange sums
      cluster_wait();
    }
  } else {
    acquire_registers<consumer_registers(kConsumers)>();
    consume<Gemm>(shared, y_map, residual_map, params, place);
  }
  // No block may leave while another of its cluster still copies to it, arrives at its barriers or
  // reads its sums.
  cluster_arrive_relaxed();
  cluster_wait();
}

}  // namespace lrq
