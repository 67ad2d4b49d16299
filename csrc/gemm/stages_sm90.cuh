// What both Hopper GEMMs (gemm_sm90.cuh, gemm_a16_sm90.cuh) feed their rings of stages with.
#pragma once

#include <cstdint>

#include "../device/sm90.cuh"
#include "../int_math.h"
#include "../layout/packed_weight.h"

namespace lrq {

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

// Half tiles of the packed weight, one for each consumer, k tile after k tile. Past the last
// channel there is none: those consumers multiply what lies there.
template <int kConsumers, int kHalfWords>
class HalfTiles {
 public:
  // From channel `channel` and k tile `k_tile` on; half_tiles: of all channels.
  __device__ __forceinline__ HalfTiles(const uint32_t* weight, int channel, int half_tiles,
                                       int k_tile, int k_tiles) {
    const int half_tile = channel / kHalfTileChannels;
    halves_ = min_of(half_tiles - half_tile, kConsumers);
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      const int64_t first = nk_to_half_tile(static_cast<int64_t>(half_tile + i) * kHalfTileChannels,
                                            static_cast<int64_t>(k_tile) * kTileInputs, k_tiles);
      next_[i] = weight + first * kHalfWords;
    }
  }

  __device__ __forceinline__ uint32_t bytes() const { return halves_ * kHalfBytes; }

  // Asks for those of one k tile, and goes on to the next where there are `more`.
  __device__ __forceinline__ void load(uint32_t (&stage)[kConsumers][kHalfWords], uint32_t full,
                                       bool more) {
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      if (i < halves_) {
        bulk_load(shared_address(stage[i]), next_[i], kHalfBytes, full);
        next_[i] += more ? 2 * kHalfWords : 0;
      }
    }
  }

 private:
  static constexpr uint32_t kHalfBytes = kHalfWords * 4;

  const uint32_t* next_[kConsumers];
  int halves_;
};

}  // namespace lrq
