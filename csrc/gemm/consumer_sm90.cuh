// The main loop of a consumer warpgroup of the Hopper GEMM, in two forms.
//
// Two operands, where registers allow: a stage is decoded under the product of the stage before.
//
//     step s - 1     | wgmma a0 ........................|
//     step s         wait full, load, decode a1 | wgmma a1 .....................|
//                              wait until step s - 1 is done, release its stage |
//     step s + 1                                   wait full, load, decode a0   | wgmma a0 ...
//
// One operand, for three consumers: a stage is four products of 32 k, each with a quarter (slice)
// of the operand, and two products are under way while the slice that the one before them has read
// is decoded anew, for the product after them.
//
//     product   | s, 0 | s, 1 | s, 2   | s, 3   | s+1, 0 | s+1, 1 | ...
//     decode           | s, 2 | s, 3   | s+1, 0 | s+1, 1 | s+1, 2 | ...
#pragma once

#include <cstdint>
#include <type_traits>

#include "../device/sm90.cuh"
#include "../device/twin_log.cuh"
#include "../device/wgmma_s8.cuh"
#include "pipeline_sm90.cuh"

namespace lrq {

// What both forms need. A thread's accumulators are in sums_, as wgmma_s8.cuh lays them out.
template <typename Gemm>
class ConsumerBase {
 public:
  using Ring = RingSlot<Gemm::kStages>;

  __device__ __forceinline__ int warpgroup() const { return warpgroup_; }

  // The stage that is next, for another consumer to go on with.
  __device__ __forceinline__ Ring ring() const { return ring_; }

  __device__ __forceinline__ const int (&sums() const)[Gemm::kTileM / 2] { return sums_; }

 protected:
  using Shared = typename Gemm::Shared;
  static constexpr int kBits = Gemm::kBits;

  __device__ __forceinline__ ConsumerBase(Shared& shared, const GemmSm90Params& params,
                                          const Ring& ring)
      : shared_(shared),
        params_(params),
        warpgroup_(__shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0)),
        ring_(ring) {}

  // The lookup tables of this lane's rows. Rows past N decode to anything: they are not stored.
  __device__ __forceinline__ void load_tables(int channel0) {
    const int n_size = static_cast<int>(params_.args.problem.n);
#pragma unroll
    for (int row = 0; row < kRowsPerLane; ++row) {
      const int64_t n = min_of(channel0 + self_.channel + 8 * row, n_size - 1);
      tables_[row] = load_level_table<kBits>(params_.args.levels, params_.args.table_of_row, n);
    }
  }

  __device__ __forceinline__ void await_stage() {
    mbarrier_wait(shared_address(&shared_.full[ring_.slot]), ring_.parity);
  }

  // Of the stage that has arrived, moved on to this warpgroup's channels.
  __device__ __forceinline__ TileOrigin arrived_origin() const {
    const TileOrigin origin = shared_.origin[ring_.slot];
    return {origin.m, origin.n + warpgroup_ * kHalfTileChannels};
  }

  __device__ __forceinline__ uint64_t x_descriptor(int slot) const {
    return swizzled_descriptor(shared_address(shared_.x[slot]));
  }

  // To every block that shares X; a block that splits K has its stages to itself.
  __device__ __forceinline__ void release_slot(int slot) {
    if (self_.lane < params_.cluster) {
      const uint32_t block = params_.split_k > 1 ? cluster_rank() : self_.lane;
      mbarrier_arrive_cluster(cluster_address(shared_address(&shared_.empty[slot]), block));
    }
  }

  Shared& shared_;
  const GemmSm90Params& params_;
  const WarpgroupThread self_;
  const int warpgroup_;  // known uniform
  Ring ring_;
  LevelTable<kBits> tables_[kRowsPerLane];
  int sums_[Gemm::kTileM / 2];
};

using Operand = uint32_t[kSlices][4];

// Nothing else is in the operand's registers until here.
__device__ __forceinline__ void pin_operand(Operand& a) {
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    pin_registers(a[slice]);
  }
}

template <typename Gemm>
class TwoOperandConsumer : public ConsumerBase<Gemm> {
  using Base = ConsumerBase<Gemm>;

 public:
  __device__ __forceinline__ TwoOperandConsumer(typename Gemm::Shared& shared,
                                                const GemmSm90Params& params,
                                                const typename Base::Ring& ring = {})
      : Base(shared, params, ring) {}

  // The block's first tile, whose place is known before its first stage has arrived.
  __device__ __forceinline__ void begin_first(int channel0) {
    this->load_tables(channel0);
    this->await_stage();
    decode(a0_);
  }

  // A later one, under the last product of the one before.
  __device__ __forceinline__ TileOrigin begin_next() {
    this->await_stage();
    const TileOrigin origin = this->arrived_origin();
    this->load_tables(origin.n);
    if (last_in_a1_) {
      decode(a0_);
    } else {
      decode(a1_);
    }
    return origin;
  }

  // Multiplies `steps` stages, of which the last is still under way at the end.
  __device__ __forceinline__ void multiply(int steps) {
    multiply_stage(a0_, 0);
    int step = 1;
#pragma unroll 1
    for (; step + 1 < steps; step += 2) {
      next_step(a1_, a0_);
      next_step(a0_, a1_);
    }
    last_in_a1_ = step < steps;
    if (last_in_a1_) {
      next_step(a1_, a0_);
    }
    left_ = this->ring_.slot;
    this->ring_.advance();
  }

  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();
    pin_registers(this->sums_);
    if (last_in_a1_) {
      pin_operand(a1_);
    } else {
      pin_operand(a0_);
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a0_[slice][i] = a1_[slice][i];
        }
      }
    }
    this->release_slot(left_);
  }

 private:
  __device__ __forceinline__ void decode(Operand& a) {
    uint32_t words[words_per_lane(Gemm::kBits)];
    load_lane_words<Gemm::kBits>(words, this->shared_.w[this->ring_.slot][this->warpgroup_],
                                 this->self_.thread);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      decode_slice<Gemm::kBits>(a[slice], words, this->tables_, slice);
    }
  }

  __device__ __forceinline__ void multiply_stage(const Operand& a, int accumulate) {
    const uint64_t x = this->x_descriptor(this->ring_.slot);
    pin_registers(this->sums_);
    wgmma_fence();
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      wgmma_m64k32_s8<Gemm::kTileM>(this->sums_, a[slice], x + slice * kSliceDescriptorStep,
                                    slice > 0 ? 1 : accumulate);
    }
    wgmma_commit();
    pin_registers(this->sums_);
  }

  // One stage later than `in_flight`: decodes, multiplies, then leaves the stage before.
  __device__ __forceinline__ void next_step(Operand& a, Operand& in_flight) {
    const int left = this->ring_.slot;
    this->ring_.advance();
    this->await_stage();
    decode(a);
    multiply_stage(a, 1);
    wgmma_wait<1>();
    pin_operand(in_flight);
    this->release_slot(left);
  }

  Operand a0_;
  Operand a1_;
  bool last_in_a1_ = false;
  int left_ = 0;
};

template <typename Gemm>
class OneOperandConsumer : public ConsumerBase<Gemm> {
  using Base = ConsumerBase<Gemm>;
  static constexpr int kBits = Gemm::kBits;

 public:
  __device__ __forceinline__ OneOperandConsumer(typename Gemm::Shared& shared,
                                                const GemmSm90Params& params,
                                                const typename Base::Ring& ring = {})
      : Base(shared, params, ring) {}

  __device__ __forceinline__ void begin_first(int channel0) {
    this->load_tables(channel0);
    enter_stage();
    decode_first_slices();
  }

  // With nothing under way.
  __device__ __forceinline__ TileOrigin begin_next() {
    this->await_stage();
    const TileOrigin origin = this->arrived_origin();
    this->load_tables(origin.n);
    enter_stage();
    decode_first_slices();
    return origin;
  }

  // At least two stages.
  __device__ __forceinline__ void multiply(int steps) {
    step(true);
#pragma unroll 1
    for (int i = 2; i < steps; ++i) {
      step(false);
    }
    const uint64_t x = this->x_descriptor(slot_);
    multiply_slice(x, 0, 1);
    decode(2);
    multiply_slice(x, 1, 1);
    decode(3);
    this->release_slot(left_);
    left_ = slot_;
    multiply_slice(x, 2, 1);
    multiply_slice(x, 3, 1);
  }

  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();
    pin_registers(this->sums_);
    pin_operand(a_);
    this->release_slot(left_);
  }

 private:
  // One stage of the main loop. The first of a tile starts the sums; the others find the stage
  // `left_` behind them read.
  __device__ __forceinline__ void step(bool first) {
    const uint64_t x = this->x_descriptor(slot_);
    multiply_slice(x, 0, first ? 0 : 1);
    decode(2);
    multiply_slice(x, 1, 1);
    decode(3);
    if (!first) {
      this->release_slot(left_);
    }
    left_ = slot_;
    multiply_slice(x, 2, 1);
    enter_stage();
    decode(0);
    multiply_slice(x, 3, 1);
    decode(1);
    load_words(2);
  }

  __device__ __forceinline__ void enter_stage() {
    this->await_stage();
    slot_ = this->ring_.slot;
    this->ring_.advance();
    load_words(0);
  }

  // The first words are asked for before any is used, the others when those are used up.
  __device__ __forceinline__ void load_words(int slice) {
    load_slice_words<kBits>(words_, this->shared_.w[slot_][this->warpgroup_], this->self_.thread,
                            slice);
  }

  __device__ __forceinline__ void decode_first_slices() {
    decode_slice<kBits>(a_[0], words_, this->tables_, 0);
    decode_slice<kBits>(a_[1], words_, this->tables_, 1);
    load_words(2);
  }

  // Once two products are under way at most, which read other slices.
  __device__ __forceinline__ void decode(int slice) {
    wgmma_wait<2>();
    pin_registers(a_[slice]);
#pragma unroll
    for (int word = 0; word < words_per_lane(kBits); ++word) {
      if (slice_reads_word(kBits, slice, word)) {
        pin_register(words_[word]);
      }
    }
    decode_slice<kBits>(a_[slice], words_, this->tables_, slice);
  }

  __device__ __forceinline__ void multiply_slice(uint64_t x, int slice, int accumulate) {
    wgmma_fence();
    wgmma_m64k32_s8<Gemm::kTileM>(this->sums_, a_[slice], x + slice * kSliceDescriptorStep,
                                  accumulate);
    wgmma_commit();
  }

  // Slices 0 and 1 of a_ belong to stage slot_; 2 and 3 still to the stage before, until the first
  // two products of slot_ are under way.
  Operand a_;
  uint32_t words_[words_per_lane(kBits)];
  int slot_ = 0;
  int left_ = 0;
};

template <typename Gemm>
using Consumer =
    std::conditional_t<Gemm::kTwoOperands, TwoOperandConsumer<Gemm>, OneOperandConsumer<Gemm>>;

}  // namespace lrq
