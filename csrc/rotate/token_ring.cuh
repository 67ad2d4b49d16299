// How tokens come to the teams of a thread block, one at a time to each.
#pragma once

#include "rotate_quantize.h"
#include "token_team.cuh"
#include "token_words.cuh"

namespace lrq {

// The tokens of a team that are in shared memory or on their way there, one after another. A token
// lies as its warps hold it, k in order.
class TokenRing {
  using Team = TeamOfBlock;
  using Layout = TeamLayout<1>;

 public:
  // barriers: kRotateMaxSlots of them; tokens: plan.slots times the bytes of a team.
  __device__ __forceinline__ TokenRing(uint64_t* barriers, const void* tokens,
                                       const RotateRowsArgs& args, const RotateRowsPlan& plan,
                                       int sample)
      : barriers_(shared_address(barriers)),
        tokens_(shared_address(tokens)),
        args_(args),
        plan_(plan),
        sample_(sample) {}

#if __CUDA_ARCH__ >= 900
  // A barrier of the thread block must follow.
  __device__ __forceinline__ void initialize() const {
    if (Team::thread() == 0) {
#pragma unroll
      for (int slot = 0; slot < kRotateMaxSlots; ++slot) {
        mbarrier_init(barriers_ + 8 * slot, 1);
      }
      fence_mbarrier_init();
    }
  }

  // Asks for a token, if there is one. What the slot held must have been read by all threads.
  __device__ __forceinline__ void request(int slot, int token) const {
    if (Team::thread() != 0) {
      return;
    }
    if (token >= static_cast<int>(args_.tokens)) {
      return;
    }
    const uint32_t barrier = barriers_ + 8 * slot;
    const uint32_t target = tokens_ + slot * kLaneBytes * Team::threads();
    const uint32_t first_bytes = 2 * args_.first.features;
    mbarrier_arrive_expect(barrier, 2 * args_.features);
    bulk_load(target, row(args_.first, token), first_bytes, barrier);
    if (args_.second.features > 0) {
      bulk_load(target + first_bytes, row(args_.second, token), 2 * args_.second.features, barrier);
    }
  }

  __device__ __forceinline__ void wait(int slot, uint32_t parity) const {
    mbarrier_wait(barriers_ + 8 * slot, parity);
  }
#else
  __device__ __forceinline__ void initialize() const {}

  // The same, of what this thread reads.
  __device__ __forceinline__ void request(int slot, int token) const {
    const int k = Layout::unit_k(Team::thread());
    if (k < args_.features && token < static_cast<int>(args_.tokens)) {
      const bool in_first = k < args_.first.features;
      const char* const source = in_first
                                     ? row(args_.first, token) + 2 * k
                                     : row(args_.second, token) + 2 * (k - args_.first.features);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        cp_async_16((place(slot) ^ 16 * (chunk % 2)) + 128 * (chunk / 2),
                    source + 2 * chunk_of_unit(Team::thread() % 32, chunk), 16);
      }
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void wait(int, uint32_t) const {
    if (plan_.slots > 1) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
  }
#endif

  // Of this lane's words, for load_words.
  __device__ __forceinline__ uint32_t place(int slot) const {
    const int thread = Team::thread();
    const int k = Layout::unit_k(thread) + chunk_of_unit(thread % 32, 0);
    return tokens_ + slot * kLaneBytes * Team::threads() + 2 * k;
  }

 private:
  __device__ __forceinline__ const char* row(const RowSource& source, int token) const {
    return static_cast<const char*>(source.data) +
           2 * (sample_ * source.sample_stride + int64_t{token} * source.token_stride);
  }

  uint32_t barriers_;
  uint32_t tokens_;
  const RotateRowsArgs& args_;
  const RotateRowsPlan& plan_;
  int sample_;
};

}  // namespace lrq
