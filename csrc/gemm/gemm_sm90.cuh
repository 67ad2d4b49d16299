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
// Integer sums do not depend on the order, so every way gives the same bits. So does the tail: a
// last wave of few tiles, cut into tiles of fewer tokens (schedule_sm90.h), over the same stages.
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
class Producer {
 public:
  __device__ __forceinline__ Producer(typename Gemm::Shared& shared, const GemmSm90Params& params,
                                      const BlockPlace& place)
      : shared_(shared),
        params_(params),
        place_(place),
        range_(Gemm::step_range(params, place)),
        k_tiles_(ceil_div(static_cast<int>(params.args.problem.k), kTileInputs)),
        half_tiles_(2 * ceil_div(static_cast<int>(params.args.problem.n), kTileChannels)) {}

  // All stages of a tile of so many tokens.
  __device__ __forceinline__ void feed(const TileOrigin& origin, int tokens,
                                       const CUtensorMap& x_map) {
    const int cluster = params_.cluster;
    const int slice_tokens = tokens / cluster;
    const int token = origin.m + place_.channel_rank * slice_tokens;
    const uint32_t slice_offset = place_.channel_rank * slice_tokens * kTileInputs;
    const auto every_block = static_cast<uint16_t>((1 << cluster) - 1);
    HalfTiles<Gemm::kConsumers, Gemm::kHalfWords> w(params_.args.weight, origin.n, half_tiles_,
                                                    range_.first, k_tiles_);
#pragma unroll 1
    for (int k_tile = range_.first; k_tile < range_.last; ++k_tile) {
      const uint32_t full = shared_address(&shared_.full[ring_.slot]);
      const uint32_t x = shared_address(shared_.x[ring_.slot]) + slice_offset;
      mbarrier_wait(shared_address(&shared_.empty[ring_.slot]), ring_.parity ^ 1);
      shared_.origin[ring_.slot] = origin;  // the arrival publishes it
      mbarrier_arrive_expect(full, tokens * kTileInputs + w.bytes());
      if (cluster > 1) {
        tensor_load_multicast(x, &x_map, k_tile * kTileInputs, token, full, every_block);
      } else {
        tensor_load(x, &x_map, k_tile * kTileInputs, token, full);
      }
      w.load(shared_.w[ring_.slot], full, k_tile + 1 < k_tiles_);  // past K, X is zeros
      ring_.advance();
    }
  }

 private:
  typename Gemm::Shared& shared_;
  const GemmSm90Params& params_;
  const BlockPlace& place_;
  const StepRange range_;
  const int k_tiles_;
  const int half_tiles_;
  RingSlot<Gemm::kStages> ring_;
};

template <typename Gemm>
__device__ __forceinline__ void produce(typename Gemm::Shared& shared, const TensorMaps& maps,
                                        const TensorMaps& tail_maps, const GemmSm90Params& params,
                                        const BlockPlace& place) {
  Producer<Gemm> producer(shared, params, place);
  for (TileWalk walk(params.schedule, place.cluster); !walk.done(); walk.advance()) {
    producer.feed(Gemm::tile_origin(walk, params.cluster, place.channel_rank), Gemm::kTileM,
                  maps.x);
  }
  if (Gemm::kHasTail && place.cluster < params.schedule.tail_tiles) {
    producer.feed(Gemm::tail_origin(params, place), params.schedule.tail_tokens, tail_maps.x);
  }
}

// The part of the tail that a consumer warpgroup multiplies after its `tiles` whole tiles.
template <typename Gemm, int kTokens>
__device__ __forceinline__ void consume_tail(typename Gemm::Shared& shared, const TensorMaps& maps,
                                             const GemmSm90Params& params, const BlockPlace& place,
                                             const RingSlot<Gemm::kStages>& ring, int tiles) {
  using Tail = TailOf<Gemm, kTokens>;
  const StepRange range = Gemm::step_range(params, place);
  TileEpilogue<typename Gemm::Shared, Tail::kTileM> epilogue(shared, params.args, params.store,
                                                             maps.y, maps.residual, tiles);
  Consumer<Tail> consumer(shared, params, ring);
  TileOrigin origin = Gemm::tail_origin(params, place);
  origin.n += consumer.warpgroup() * kHalfTileChannels;
  consumer.begin_first(origin.n);
  epilogue.begin_tile(origin.m, origin.n);
  epilogue.request_residual();
  consumer.multiply(range.last - range.first);
  const auto scales = epilogue.request_scales();
  epilogue.place_scales(scales);
  consumer.finish();
  epilogue.store(consumer.sums(), scales, params.aligned);
}

// One consumer warpgroup: decodes, multiplies, writes.
template <typename Gemm>
__device__ __forceinline__ void consume(typename Gemm::Shared& shared, const TensorMaps& maps,
                                        const TensorMaps& tail_maps, const GemmSm90Params& params,
                                        const BlockPlace& place) {
  const StepRange range = Gemm::step_range(params, place);
  int tiles = tile_count(params.schedule, place.cluster);
  TileEpilogue<typename Gemm::Shared, Gemm::kTileM> epilogue(shared, params.args, params.store,
                                                             maps.y, maps.residual);
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
  if constexpr (Gemm::kHasTail) {
    if (place.cluster < params.schedule.tail_tiles) {
      const int whole = tile_count(params.schedule, place.cluster);
      switch (params.schedule.tail_tokens) {
        case kSm90TailTokens[0]:
          consume_tail<Gemm, kSm90TailTokens[0]>(shared, tail_maps, params, place, consumer.ring(),
                                                 whole);
          break;
        case kSm90TailTokens[1]:
          consume_tail<Gemm, kSm90TailTokens[1]>(shared, tail_maps, params, place, consumer.ring(),
                                                 whole);
          break;
        default:
          consume_tail<Gemm, kSm90TailTokens[2]>(shared, tail_maps, params, place, consumer.ring(),
                                                 whole);
      }
    }
  }
  epilogue.finish();
}

template <int kBits, int kTileM, int kConsumers, int kStages>
__global__ void __launch_bounds__(GemmSm90<kBits, kTileM, kConsumers, kStages>::kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ TensorMaps maps,
                     const __grid_constant__ TensorMaps tail_maps,
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
      produce<Gemm>(shared, maps, tail_maps, params, place);
    }
    __syncwarp();
    if (params.split_k > 1) {
      cluster_arrive_relaxed();  // beside the consumers, which exchange sums
      cluster_wait();
    }
  } else {
    acquire_registers<consumer_registers(kConsumers)>();
    consume<Gemm>(shared, maps, tail_maps, params, place);
  }
  // No block may leave while another of its cluster still copies to it, arrives at its barriers or
  // reads its sums.
  cluster_arrive_relaxed();
  cluster_wait();
}

}  // namespace lrq
