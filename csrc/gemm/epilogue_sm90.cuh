// The epilogue of one consumer warpgroup of the Hopper GEMM: 64 channels x tile_m tokens, from the
// accumulators of wgmma to global memory, by the arithmetic of epilogue.cuh.
//
// Lane (g, t) of warp w holds channels 16w + g + 8r (r = 0, 1), tokens 8j + 2t + e (e = 0, 1) in
// acc[4j + 2r + e]. Two ways out (TileStore):
//
//   kTensor: 16-bit results, whole and aligned rows. Registers become a [token][channel] tile by
//     stmatrix.trans: per pair of eight tokens, warp w writes four 8 x 8 matrices,
//
//         16-byte chunk of a token's 128 bytes    0  1 | 2  3 | 4  5 | 6  7     stored at chunk ^
//         warp                                      0  |   1  |   2  |   3      (token % 8), as the
//                                                                               swizzle of TMA does
//     and TMA writes the tile out, without what lies past M and N, while the next one is
//     multiplied. A residual comes in the same way before: TMA loads it into the staging under the
//     main loop, ldmatrix.trans hands every lane the elements that it will overwrite.
//
//   kPlain: anything else, as int32 through store_tile of epilogue.cuh, part by part.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../device/numeric.cuh"
#include "../device/sm90.cuh"
#include "config.h"
#include "epilogue.cuh"
#include "problem.h"

namespace lrq {

enum class TileStore : int { kPlain, kTensor };

// Where tensor stores apply. Activation together with a residual, which no transformer asks for,
// samples so short that one tile meets three of them, and blocks that split K take the plain way.
inline TileStore choose_store(const GemmArgs& args, const GemmConfig& config, bool aligned_octets) {
  const bool samples_fit = args.gate == nullptr || args.tokens_per_sample >= config.tile_m;
  const bool one_extra = args.residual == nullptr || args.activation == Activation::kNone;
  return config.split_k == 1 && aligned_octets && out_type_bytes(args.out_type) == 2 &&
                 samples_fit && one_extra
             ? TileStore::kTensor
             : TileStore::kPlain;
}

// Tokens of one tensor store: two or three stores a large tile, so that writing starts early.
constexpr int tensor_store_tokens(int tile_m) {
  return tile_m <= 64 ? tile_m : tile_m % 32 == 0 ? tile_m / 2 : tile_m / 3;
}

// Who a thread is among the 128 of its consumer warpgroup. Asked anew wherever it is made: kept
// over the main loop it would cost registers.
struct WarpgroupThread {
  int warpgroup;
  int thread;   // in the warpgroup
  int lane;     // in the warp
  int warp;     // in the warpgroup
  int channel;  // its first of 64, the other is 8 further
  int token;    // its first of every eight, the other is the next

  __device__ __forceinline__ WarpgroupThread() {
    const int of_block = thread_of_block();
    warpgroup = of_block / kWarpgroupThreads;
    thread = of_block % kWarpgroupThreads;
    lane = thread % 32;
    warp = thread / 32;
    channel = 16 * warp + lane / 4;
    token = lane % 4 * 2;
  }
};

// Two neighbouring tokens as they lie in a 32-bit register.
template <typename Out>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  const Pack<Out, 2> pair = {round_to<Out>(low), round_to<Out>(high)};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

template <typename Out>
__device__ __forceinline__ void widen_pair(float (&value)[2], uint32_t bits) {
  Pack<Out, 2> pair;
  memcpy(&pair, &bits, sizeof(bits));
  value[0] = to_float(pair.value[0]);
  value[1] = to_float(pair.value[1]);
}

// Sums of a tile that the blocks of a cluster have staged at the same offset, from token `first`
// on.
struct ClusterSums {
  static constexpr int kBatch = 4;  // loads from another block take hundreds of clocks
  uint32_t staging;
  int first;
  int blocks;

  template <int kCount>
  __device__ __forceinline__ void load(Pack<int, kCount> (&sums)[kBatch],
                                       const int (&token)[kBatch], int channel) const {
    static_assert(kCount == 4, "one piece of 16 bytes");
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      sums[i] = {};
    }
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      int4 part[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int offset = token_channel_to_staging(first + token[i], channel, kHalfTileChannels);
        part[i] = load_cluster_16(cluster_address(staging + 4 * offset, block));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        sums[i].value[0] += part[i].x;
        sums[i].value[1] += part[i].y;
        sums[i].value[2] += part[i].z;
        sums[i].value[3] += part[i].w;
      }
    }
  }
};

// Shared is the block's shared memory, in which every warpgroup has its own
//     staging        sm90_staging_bytes, in the swizzle
//     x_scale        [tile_m] fp32
//     residual_full  mbarrier
template <typename Shared, int kTileM>
class TileEpilogue {
 public:
  static constexpr int kStoreTokens = tensor_store_tokens(kTileM);
  static constexpr int kStores = kTileM / kStoreTokens;
  static constexpr int kStagedTokens = sm90_staged_tokens(kTileM);
  static constexpr int kTokenBytes = kHalfTileChannels * 2;
  static constexpr int kScalesPerThread = (kTileM + kWarpgroupThreads - 1) / kWarpgroupThreads;
  static_assert(kStoreTokens % 16 == 0, "stmatrix stores sixteen tokens");

  // tiles: how many the warpgroup has stored before.
  __device__ __forceinline__ TileEpilogue(Shared& shared, const GemmArgs& args, TileStore store,
                                          const CUtensorMap& y_map, const CUtensorMap& residual_map,
                                          int tiles = 0)
      : shared_(shared),
        args_(args),
        y_map_(y_map),
        residual_map_(residual_map),
        tensor_(store == TileStore::kTensor),
        residual_parity_(tiles % 2) {}

  // The tile whose sums follow: its first token, and the warpgroup's first channel.
  __device__ __forceinline__ void begin_tile(int m0, int n0) {
    m0_ = m0;
    n0_ = n0;
  }

  // Early in the main loop: asks for the residual, once the staging's last store has left it.
  __device__ __forceinline__ void request_residual() {
    const WarpgroupThread self;
    if (!tensor_ || args_.residual == nullptr || self.thread != 0) {
      return;
    }
    bulk_wait_read();
    const uint32_t full = shared_address(&shared_.residual_full[self.warpgroup]);
    mbarrier_arrive_expect(full, kTileM * kTokenBytes);
#pragma unroll
    for (int part = 0; part < kStores; ++part) {
      tensor_load(part_address(self, part), &residual_map_, n0_, m0_ + part * kStoreTokens, full);
    }
  }

  // What a tile's conversion needs from memory, on its way to registers and to shared memory.
  struct Scales {
    float x[kScalesPerThread];
    float weight[kRowsPerLane];
    float bias[kRowsPerLane];
  };

  // Under the last products: starts reading them.
  __device__ __forceinline__ Scales request_scales() const {
    Scales scales = {};
    if (!tensor_) {
      return scales;
    }
    const WarpgroupThread self;
    const int m_size = static_cast<int>(args_.problem.m);
    const int n_size = static_cast<int>(args_.problem.n);
#pragma unroll
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int m = m0_ + self.thread + i * kWarpgroupThreads;
      scales.x[i] = m < m_size ? __ldg(args_.x_scale + m) : 0.0f;
    }
#pragma unroll
    for (int row = 0; row < kRowsPerLane; ++row) {
      const int n = min_of(n0_ + self.channel + 8 * row, n_size - 1);
      scales.weight[row] = __ldg(args_.weight_scale + n);
      scales.bias[row] = args_.bias != nullptr ? __ldg(args_.bias + n) : kNoBias;
    }
    return scales;
  }

  // Only now to shared memory: before, the thread would wait for them instead of multiplying.
  __device__ __forceinline__ void place_scales(const Scales& scales) {
    if (!tensor_) {
      return;
    }
    const WarpgroupThread self;
#pragma unroll
    for (int i = 0; i < kScalesPerThread; ++i) {
      const int token = self.thread + i * kWarpgroupThreads;
      if (kTileM % kWarpgroupThreads == 0 || token < kTileM) {
        shared_.x_scale[self.warpgroup][token] = scales.x[i];
      }
    }
  }

  // Writes the tile.
  __device__ __forceinline__ void store(const int (&acc)[kTileM / 2], const Scales& scales,
                                        bool aligned) {
    if (!tensor_) {
      store_plain(acc, aligned);
    } else if (args_.out_type == OutType::kBFloat16) {
      store_tensor_as<__nv_bfloat16>(acc, scales);
    } else {
      store_tensor_as<__half>(acc, scales);
    }
  }

  // Split K: the warpgroup's sums of the whole tile as int32, where stages and staging were.
  __device__ __forceinline__ void stage_sums(const int (&acc)[kTileM / 2]) {
    const WarpgroupThread self;
    int* const staging = split_staging(self);
#pragma unroll
    for (int i = 0; i < kTileM / 2; ++i) {
      const int token = i / 4 * 8 + self.token + i % 2;
      const int channel = self.channel + i % 4 / 2 * 8;
      staging[token_channel_to_staging(token, channel, kHalfTileChannels)] = acc[i];
    }
  }

  // Writes this block's share of the tokens, adding up what all blocks of the cluster have staged.
  __device__ __forceinline__ void store_split(int split_k, int k_rank, bool aligned) {
    const WarpgroupThread self;
    const int first = kTileM * k_rank / split_k;
    const int last = kTileM * (k_rank + 1) / split_k;
    store_tile_as<kHalfTileChannels, kWarpgroupThreads, 4>(
        ClusterSums{shared_address(split_staging(self)), first, split_k}, args_, m0_ + first, n0_,
        last - first, self.thread, aligned);
  }

  // After the last tile: shared memory must outlive the stores that read it.
  __device__ __forceinline__ void finish() {
    const WarpgroupThread self;
    if (self.thread == 0) {
      bulk_wait();
    }
    __syncwarp();
  }

 private:
  __device__ __forceinline__ static void synchronize(const WarpgroupThread& self) {
    named_barrier(1 + self.warpgroup, kWarpgroupThreads);
  }

  __device__ __forceinline__ int* split_staging(const WarpgroupThread& self) const {
    static_assert(offsetof(Shared, x) == 0 && offsetof(Shared, staging) == sizeof(Shared::x),
                  "one piece of memory");
    return reinterpret_cast<int*>(&shared_) + self.warpgroup * kTileM * (kStagedTokenBytes / 4);
  }

  __device__ __forceinline__ uint32_t part_address(const WarpgroupThread& self, int part) const {
    return shared_address(shared_.staging[self.warpgroup]) + part * kStoreTokens * kTokenBytes;
  }

  // The loop over parts is not unrolled, for the size of store_tile; registers have to be named, so
  // each turn picks its own.
  __device__ __forceinline__ void store_plain(const int (&acc)[kTileM / 2], bool aligned) {
    const WarpgroupThread self;
    int* const staging = reinterpret_cast<int*>(shared_.staging[self.warpgroup]);
    constexpr int kParts = kTileM / kStagedTokens;
    const int tokens = static_cast<int>(min_of<int64_t>(args_.problem.m - m0_, kTileM));
#pragma unroll 1
    for (int part = 0; part < kParts && part * kStagedTokens < tokens; ++part) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        if (p == part) {
#pragma unroll
          for (int i = 0; i < kStagedTokens / 2; ++i) {
            const int token = i / 4 * 8 + self.token + i % 2;
            const int channel = self.channel + i % 4 / 2 * 8;
            staging[token_channel_to_staging(token, channel, kHalfTileChannels)] =
                acc[p * (kStagedTokens / 2) + i];
          }
        }
      }
      synchronize(self);
      store_tile_as<kHalfTileChannels, kWarpgroupThreads, 4>(StagedSums<kHalfTileChannels>{staging},
                                                             args_, m0_ + part * kStagedTokens, n0_,
                                                             kStagedTokens, self.thread, aligned);
      synchronize(self);
    }
  }

  template <typename Out>
  __device__ __forceinline__ void store_tensor_as(const int (&acc)[kTileM / 2],
                                                  const Scales& scales) {
    if (args_.residual != nullptr) {
      store_tensor<Out, false, true>(acc, scales);
    } else if (args_.activation == Activation::kGeluTanh) {
      store_tensor<Out, true, false>(acc, scales);
    } else {
      store_tensor<Out, false, false>(acc, scales);
    }
  }

  // The gates of this lane's channels: those of the tile's first sample, and from token `boundary`
  // of the tile on those of the next.
  struct Gates {
    float first[kRowsPerLane];
    float second[kRowsPerLane];
    int boundary;
  };

  template <typename Out>
  __device__ __forceinline__ Gates load_gates() const {
    const WarpgroupThread self;
    Gates gates = {{1.0f, 1.0f}, {1.0f, 1.0f}, kTileM};
    const auto m_size = static_cast<uint32_t>(args_.problem.m);
    // A part of the tail may lie past the last token, where there is no sample.
    if (args_.gate != nullptr && static_cast<uint32_t>(m0_) < m_size) {
      const auto tokens = static_cast<uint32_t>(args_.tokens_per_sample);
      const uint32_t sample = static_cast<uint32_t>(m0_) / tokens;
      const uint32_t next = (sample + 1) * tokens;
      gates.boundary = static_cast<int>(min_of<uint32_t>(next - m0_, kTileM));
      const Out* const gate = static_cast<const Out*>(args_.gate) + sample * args_.gate_stride;
#pragma unroll
      for (int row = 0; row < kRowsPerLane; ++row) {
        const int n = min_of(n0_ + self.channel + 8 * row, static_cast<int>(args_.problem.n) - 1);
        gates.first[row] = to_float(gate[n]);
        gates.second[row] = next < m_size ? to_float(gate[args_.gate_stride + n]) : 0.0f;
      }
    }
    return gates;
  }

  template <typename Out, bool kGelu, bool kResidual>
  __device__ __forceinline__ void store_tensor(const int (&acc)[kTileM / 2], const Scales& scales) {
    const WarpgroupThread self;
    if (self.thread == 0) {
      bulk_wait_read();
    }
    synchronize(self);  // the staging is free, x_scale is there

    Gates gates;
    if constexpr (kResidual) {
      gates = load_gates<Out>();
      mbarrier_wait(shared_address(&shared_.residual_full[self.warpgroup]), residual_parity_);
      residual_parity_ ^= 1;
    }

    // Lane l addresses row l % 8 of matrix l / 8: tokens 0-7 channels 0-7, tokens 0-7 channels
    // 8-15, the same of tokens 8-15.
    const int matrix_token = self.lane / 16 * 8 + self.lane % 8;
    const int matrix_chunk = (self.warp * 2 + self.lane / 8 % 2) ^ self.lane % 8;
    const uint32_t matrix_row =
        part_address(self, 0) + matrix_token * kTokenBytes + matrix_chunk * 16;
    const float* const x_scales = shared_.x_scale[self.warpgroup] + self.token;
#pragma unroll
    for (int part = 0; part < kStores; ++part) {
#pragma unroll
      for (int token = part * kStoreTokens; token < (part + 1) * kStoreTokens; token += 16) {
        const uint32_t row_address = matrix_row + token * kTokenBytes;
        uint32_t matrix[4];
        if constexpr (kResidual) {
          ldmatrix_x4_trans(matrix, row_address);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // matrix i: channel row i % 2, tokens 8 (i / 2) ..
          const int row = i % 2;
          const int first = token + i / 2 * 8;
          const float2 x_scale = *reinterpret_cast<const float2*>(x_scales + first);
          const int* const sum = &acc[first / 2 + 2 * row];
          float y[2] = {dequantize_sum(sum[0], x_scale.x, scales.weight[row], scales.bias[row]),
                        dequantize_sum(sum[1], x_scale.y, scales.weight[row], scales.bias[row])};
          if constexpr (kGelu) {
            y[0] = gelu_tanh<Out>(y[0]);
            y[1] = gelu_tanh<Out>(y[1]);
          }
          if constexpr (kResidual) {
            float residual[2];
            widen_pair<Out>(residual, matrix[i]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const bool next = first + self.token + e >= gates.boundary;
              y[e] = add_residual(y[e], next ? gates.second[row] : gates.first[row], residual[e]);
            }
          }
          matrix[i] = round_pair<Out>(y[0], y[1]);
        }
        stmatrix_x4_trans(row_address, matrix);
      }
      fence_proxy_async();
      synchronize(self);
      if (self.thread == 0) {
        tensor_store(&y_map_, n0_, m0_ + part * kStoreTokens, part_address(self, part));
        bulk_commit();
      }
    }
  }

  Shared& shared_;
  const GemmArgs& args_;
  const CUtensorMap& y_map_;
  const CUtensorMap& residual_map_;
  const bool tensor_;
  int m0_ = 0;
  int n0_ = 0;
  uint32_t residual_parity_;
};

}  // namespace lrq
