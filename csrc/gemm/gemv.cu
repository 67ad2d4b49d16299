// Few tokens, 16-bit activations: y = rn(fma(sum_k x * level, weight_scale, bias)).
//
// The packed weight is operand A of mma.m16n8k32 on int8 once it is decoded, so products cost
// nothing beside decoding. For that the inputs become integers of 16 bits, which the eight columns
// of operand B hold as two bytes each (limbs):
//
//     block of 128 inputs of a token:  step = the least power of two with max|x| <= 32639 step
//                                      q = rint(x / step) = 256 high + low,  low in [-128, 127]
//     column   0       1      2       3      ...  7
//     token    0 high  0 low  1 high  1 low  ...  3 low      a second operand B: tokens 4..7
//
// bf16 within a factor 2^6 of the largest of its block, and fp16 within 2^3, are exact, others are
// wrong by at most step / 2. The sum over a block is exact in int32, sum += float(sum of block) *
// step rounds. A lane of the result holds both limbs of one token in two channels.
//
// A group is 16 channels: one warp's share of a half tile, 256 * kBits bytes of every k tile. A
// team of eight warps multiplies a group; the k tiles are dealt to its warps,
//
//     k tile     0   1   2  ...  7   8   9  ...
//     part       0   1   2  ...  7   0   1  ...
//
// each of which adds its own in order. Sums of the parts are added in their order. So the bits of a
// result depend on x, the weight and K, not on the tokens beside it, the instance that runs, the
// grid or the GPU; reference.gemv computes the same bits.
//
// One block an SM walks over groups with two teams, which share the limbs: all warps convert them,
// once. Every warp keeps kStages copies of 256 * kBits bytes in flight in a ring of its own, across
// groups; a lane reads what it copied itself. For few tokens half of an SM is enough, so that where
// one gemv follows another, the blocks of the next are there before these leave.
#include <type_traits>

#include "../device/numeric.cuh"
#include "../device/twin_log.cuh"
#include "../overlap.h"
#include "launch.h"

namespace lrq {
namespace {

constexpr int kParts = 8;
constexpr int kTeamThreads = 32 * kParts;
constexpr int kChannels = 16;
constexpr int kQuad = 4;   // tokens whose limbs fill operand B
constexpr int kLimbs = 2;  // high, low
constexpr int kInputsPerLane = kTileInputs / 32;

// From 9.0 on kernels overlap, which only those gain from that leave room for another.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kOverlaps = false;
#else
constexpr bool kOverlaps = true;
#endif

template <int kBits_, int kQuads_, int kTeams_>
struct Gemv {
  static constexpr int kBits = kBits_;
  static constexpr int kQuads = kQuads_;
  static constexpr int kTeams = kTeams_;
  static constexpr int kTokens = kQuad * kQuads;
  static constexpr int kThreads = kTeamThreads * kTeams;
  static constexpr int kWarps = kParts * kTeams;
  // Eights of k tiles whose limbs are held at once.
  static constexpr int kWindow = kTeams == 2 || kQuads == 1 ? 3 : 4 / kQuads;
  static constexpr int kBatch = kQuads < 4 ? 5 : 3;  // groups of a team whose sums are held at once
  static constexpr int kConverted = kQuads < 4 ? 6 : 4;  // by a warp at once
  static constexpr int kStages = kBits == 2 ? 8 : 4;
  static constexpr int kBlocksThatFit = kQuads == 1 ? 2 : 1;  // of an SM; one of them is ours

  struct Shared {
    uint32_t words[kWarps][kStages][32 * words_per_lane(kBits)];
    // Operand B of slices 2 half and 2 half + 1, four registers of every lane.
    uint32_t limbs[kWindow * kParts][kQuads][kSlices / 2][32][4];
    float step[kWindow * kParts][kTokens];
    float sum[kTeams][kBatch][kQuads][kRowsPerLane][kParts][32];
    LevelTable<kBits> tables[kTeams][kBatch][kChannels];
    float weight_scale[kTeams][kBatch][kChannels];
    float bias[kTeams][kBatch][kChannels];
  };
};

// Inputs k..k+3 of a token, two in a word, zeros past K. kWhole: no four of them straddle K or an
// address that is not a multiple of 8.
template <bool kWhole>
__device__ __forceinline__ uint2 load_inputs(const uint16_t* row, int k, int k_size) {
  uint2 inputs = {0, 0};
  if constexpr (kWhole) {
    if (k < k_size) {
      inputs = __ldcg(reinterpret_cast<const uint2*>(row + k));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kInputsPerLane; ++i) {
      if (k + i < k_size) {
        (i < 2 ? inputs.x : inputs.y) |= static_cast<uint32_t>(__ldcg(row + k + i)) << i % 2 * 16;
      }
    }
  }
  return inputs;
}

// One of the two in a word.
template <typename T>
__device__ __forceinline__ float input_to_float(uint32_t word, int which) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * which)));
  } else {
    return __uint_as_float(which == 0 ? word << 16 : word & 0xffff0000u);
  }
}

// The words of a lane from a stage of the ring: pieces of 16 bytes of all lanes, then the rest.
template <int kBits>
__device__ __forceinline__ void load_ring_words(uint32_t (&words)[words_per_lane(kBits)],
                                                const uint32_t* stage, int lane) {
  const uint4 four = *reinterpret_cast<const uint4*>(stage + 4 * lane);
  words[0] = four.x;
  words[1] = four.y;
  words[2] = four.z;
  words[3] = four.w;
  if constexpr (kBits == 4) {
    const uint4 rest = *reinterpret_cast<const uint4*>(stage + 128 + 4 * lane);
    words[4] = rest.x;
    words[5] = rest.y;
    words[6] = rest.z;
    words[7] = rest.w;
  } else if constexpr (kBits == 3) {
    const uint2 rest = *reinterpret_cast<const uint2*>(stage + 128 + 2 * lane);
    words[4] = rest.x;
    words[5] = rest.y;
  }
}

struct LimbWords {
  uint32_t high, low;  // of four inputs
  float step;          // of their block; NaN where it holds inf or NaN
};

// Called by a whole warp, whose lanes hold the 128 inputs of a block.
template <typename T>
__device__ __forceinline__ LimbWords split_inputs(uint2 inputs) {
  constexpr uint32_t kInfinity = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
  const uint32_t x = inputs.x & 0x7fff7fffu;
  const uint32_t y = inputs.y & 0x7fff7fffu;
  // A word's larger half decides beside what the other half is, which the shift drops.
  const uint32_t largest = reduce_max_u32(max_of(max_of(x, y), max_of(x << 16, y << 16))) >> 16;

  // With |x| = c 2^e, 1 <= c < 2: step = 2^(e - 14), or twice that where c 2^14 could exceed 32639.
  // Below 2^-112 a step of 2^-126 stays, which float can invert.
  const uint32_t bits = __float_as_uint(input_to_float<T>(largest, 0));
  const uint32_t exponent = max_of((bits + 0x10000u) >> 23, 15u);
  const float inverse = __uint_as_float((268u - exponent) << 23);

  // The sum ends in the bits of q + 128: high in byte 1, low + 128 in byte 0.
  constexpr float kRoundToInteger = 12582912.0f + 128.0f;
  uint32_t sum[kInputsPerLane];
#pragma unroll
  for (int i = 0; i < kInputsPerLane; ++i) {
    const float input = input_to_float<T>(i < 2 ? inputs.x : inputs.y, i % 2);
    sum[i] = __float_as_uint(__fmaf_rn(input, inverse, kRoundToInteger));
  }
  LimbWords result;
  result.high = prmt(prmt(sum[0], sum[1], 0x51), prmt(sum[2], sum[3], 0x51), 0x5410);
  result.low = prmt(prmt(sum[0], sum[1], 0x40), prmt(sum[2], sum[3], 0x40), 0x5410) ^ 0x80808080u;
  result.step = __uint_as_float(largest >= kInfinity ? 0x7fffffffu : (exponent - 14u) << 23);
  return result;
}

// The order of a warp's k tiles: those of one group after the other while their inputs are held.
template <typename G>
struct Walk {
  int batch = 0;   // first group of those whose sums are held
  int window = 0;  // first of the warp's tiles whose inputs are held
  int group = 0;
  int tile = 0;

  // Whether the next tile is of another group or window.
  __device__ __forceinline__ bool advance(int groups, int tiles) {
    if (++tile < min_of(window + G::kWindow, tiles)) {
      return false;
    }
    if (++group == min_of(batch + G::kBatch, groups)) {
      window += G::kWindow;
      if (window >= tiles) {
        window = 0;
        batch += G::kBatch;
      }
      group = batch;
    }
    tile = window;
    return true;
  }
};

template <typename G>
__global__ void __launch_bounds__(G::kThreads, kOverlaps ? G::kBlocksThatFit : 1)
    gemv_kernel(const __grid_constant__ A16Args args, const bool whole) {
  constexpr int kBits = G::kBits;
  constexpr int kQuads = G::kQuads;
  constexpr int kStages = G::kStages;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename G::Shared*>(shared_bytes);

  const int m_size = static_cast<int>(args.problem.m);
  const int n_size = static_cast<int>(args.problem.n);
  const int k_size = static_cast<int>(args.problem.k);
  const int k_tiles = ceil_div(k_size, kTileInputs);
  const int rounds = ceil_div(k_tiles, kParts);  // of dealing k tiles out
  const int token_bits =
      (m_size > 1) + (m_size > 2) + (m_size > 4) + (m_size > 8);  // of a token's number
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // known uniform
  const int part = warp % kParts;
  const int team = warp / kParts;

  // Group i of a team is the weight's group_of(team, i).
  const int all_groups = ceil_div(n_size, kChannels);
  const int team_groups = G::kTeams * static_cast<int>(gridDim.x);
  const auto group_of = [&](int of_team, int i) {
    return static_cast<int>(blockIdx.x + of_team * gridDim.x) + i * team_groups;
  };
  const int groups = ceil_div(all_groups - group_of(team, 0), team_groups);
  const int tiles = part < k_tiles ? ceil_div(k_tiles - part, kParts) : 0;  // of this warp

  struct Source {
    const uint32_t* words;  // the lane's 0..3
    int others;             // from there
  };
  const auto source_of = [&](const Walk<G>& walk) -> Source {
    // nk_to_half_tile of the group's first channel, in 32 bits as far as it goes.
    constexpr int kGroupsOfHalf = kHalfTileChannels / kChannels;
    const int group = group_of(team, walk.group);
    const int half_tile = (group / (2 * kGroupsOfHalf) * k_tiles + walk.tile * kParts + part) * 2 +
                          group / kGroupsOfHalf % 2;
    const int half_tile_lane = group % kGroupsOfHalf * 32 + lane;
    const int first = lane_word_to_offset(kBits, half_tile_lane, 0);
    return {args.weight + static_cast<int64_t>(half_tile) * half_tile_words(kBits) + first,
            lane_word_to_offset(kBits, half_tile_lane, 4) - first};
  };

  grid_dependency_wait();
  grid_dependency_trigger();

  Walk<G> ahead;
  int to_copy = groups * tiles;
  int stage = 0;  // of the tile that comes next; copies land behind it
  Source source = source_of(ahead);
  const auto copy_into = [&](int copy_stage) {
    if (to_copy > 0) {
      uint32_t* target = shared.words[warp][copy_stage];
      cp_async_16(shared_address(target + 4 * lane), source.words, 16);
      if constexpr (kBits == 4) {
        cp_async_16(shared_address(target + 128 + 4 * lane), source.words + source.others, 16);
      } else if constexpr (kBits == 3) {
        cp_async_8(shared_address(target + 128 + 2 * lane), source.words + source.others);
      }
      --to_copy;
      if (ahead.advance(groups, tiles)) {
        source = source_of(ahead);
      } else {
        source.words += kParts * 2 * half_tile_words(kBits);
      }
    }
    // Empty groups count too, so that "all but kStages - 2" means "this tile".
    cp_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    copy_into(i);
  }

  // What channels need, of all groups whose sums will be held; past N that of the last channel.
  const auto hold_constants = [&](int batch) {
    const int i = thread_of_block();
    if (i < G::kTeams * G::kBatch * kChannels) {
      const int of_team = i / (G::kBatch * kChannels);
      const int held = i / kChannels % G::kBatch;
      const int channel = i % kChannels;
      const int n = min_of(group_of(of_team, batch + held) * kChannels + channel, n_size - 1);
      shared.tables[of_team][held][channel] =
          load_level_table<kBits>(args.levels, args.table_of_row, n);
      shared.weight_scale[of_team][held][channel] = __ldg(args.weight_scale + n);
      // fma(a, b, -0) is rn(a * b) in every case, sign of zero included.
      shared.bias[of_team][held][channel] = args.bias == nullptr ? -0.0f : __ldg(args.bias + n);
    }
  };

  // Puts the limbs of a window into shared memory: a warp takes every kWarps-th pair of a k tile
  // and a token, and asks for several before it converts the first. Limbs of tokens past M are
  // never written; what they multiply to is never stored.
  const auto hold_inputs = [&](auto type_tag, int window) {
    using T = decltype(type_tag);
    const int first_tile = window * kParts;
    const int pairs = min_of(G::kWindow * kParts, k_tiles - first_tile) << token_bits;
    const int token_mask = (1 << token_bits) - 1;
#pragma unroll 1
    for (int first = warp; first < pairs; first += G::kWarps * G::kConverted) {
      uint2 inputs[G::kConverted];
      const auto fetch = [&](auto whole_tag) {
#pragma unroll
        for (int i = 0; i < G::kConverted; ++i) {
          const int pair = first + i * G::kWarps;
          const int m = pair & token_mask;
          if (pair < pairs && m < m_size) {
            const auto* row = static_cast<const uint16_t*>(args.x) + m * args.x_stride;
            const int k = (first_tile + (pair >> token_bits)) * kTileInputs + kInputsPerLane * lane;
            inputs[i] = load_inputs<decltype(whole_tag)::value>(row, k, k_size);
          }
        }
      };
      if (whole) {
        fetch(std::true_type{});
      } else {
        fetch(std::false_type{});
      }
#pragma unroll
      for (int i = 0; i < G::kConverted; ++i) {
        const int pair = first + i * G::kWarps;
        const int m = pair & token_mask;
        const int held = pair >> token_bits;
        if (pair < pairs && m < m_size) {
          const LimbWords words = split_inputs<T>(inputs[i]);
          // Inputs 4 lane .. 4 lane + 3: slice lane / 8, register lane / 4 % 2, mma's t = lane % 4.
          auto& target = shared.limbs[held][m / kQuad][lane / 16];
          const int high = kLimbs * (m % kQuad);  // a column of operand B
          target[4 * high + lane % 4][lane / 4 % 4] = words.high;
          target[4 * (high + 1) + lane % 4][lane / 4 % 4] = words.low;
          if (lane == 0) {
            shared.step[held][m] = words.step;
          }
        }
      }
    }
  };

  float sum[kQuads][kRowsPerLane];
  const auto add_tile = [&](const LevelTable<kBits>(&tables)[kRowsPerLane], int held) {
    cp_async_wait<kStages - 2>();
    uint32_t words[words_per_lane(kBits)];
    load_ring_words<kBits>(words, shared.words[warp][stage], lane);
    copy_into((stage + kStages - 1) % kStages);  // that of the tile before
    stage = (stage + 1) % kStages;

    int d[kQuads][4] = {};
#pragma unroll
    for (int half = 0; half < kSlices / 2; ++half) {
      uint4 b[kQuads];
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        b[quad] = *reinterpret_cast<const uint4*>(shared.limbs[held][quad][half][lane]);
      }
      uint32_t a[4];
      decode_slice<kBits>(a, words, tables, 2 * half);
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        mma_m16n8k32_s8(d[quad], a, b[quad].x, b[quad].y);
      }
      decode_slice<kBits>(a, words, tables, 2 * half + 1);
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        mma_m16n8k32_s8(d[quad], a, b[quad].z, b[quad].w);
      }
    }
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const float step = shared.step[held][kQuad * quad + lane % 4];  // mma's t: a token
#pragma unroll
      for (int row = 0; row < kRowsPerLane; ++row) {
        const int exact = 256 * d[quad][2 * row] + d[quad][2 * row + 1];
        sum[quad][row] = __fmaf_rn(__int2float_rn(exact), step, sum[quad][row]);
      }
    }
  };

  // Adds the parts of one team's sums and stores the results.
  const auto store_sums = [&](int batch, int batch_groups) {
#pragma unroll 1
    for (int i = thread_of_block() % kTeamThreads; i < batch_groups * kChannels << token_bits;
         i += kTeamThreads) {
      const int channel = i % kChannels;
      const int m = i / kChannels & ((1 << token_bits) - 1);
      const int held = i / kChannels >> token_bits;
      const int n = group_of(team, batch + held) * kChannels + channel;
      if (n >= n_size || m >= m_size) {
        continue;
      }
      const auto& parts = shared.sum[team][held][m / kQuad][channel / 8];
      const int owner = 4 * (channel % 8) + m % kQuad;
      float total = parts[0][owner];
#pragma unroll
      for (int other = 1; other < kParts; ++other) {
        total = __fadd_rn(total, parts[other][owner]);
      }
      const float y = __fmaf_rn(total, shared.weight_scale[team][held][channel],
                                shared.bias[team][held][channel]);
      const int64_t at = static_cast<int64_t>(m) * n_size + n;
      if (args.type == OutType::kBFloat16) {
        static_cast<__nv_bfloat16*>(args.y)[at] = round_to<__nv_bfloat16>(y);
      } else {
        static_cast<__half*>(args.y)[at] = round_to<__half>(y);
      }
    }
  };

#pragma unroll 1
  for (int batch = 0; group_of(0, batch) < all_groups; batch += G::kBatch) {  // of any team
    const int batch_groups = max_of(min_of(G::kBatch, groups - batch), 0);
    int window = 0;
    do {  // once without tiles, for the zeros
      const bool new_inputs = batch == 0 || rounds > G::kWindow;
      if (new_inputs || window == 0) {
        __syncthreads();  // all have left what is replaced
        if (window == 0) {
          hold_constants(batch);
        }
        if (new_inputs && args.type == OutType::kBFloat16) {
          hold_inputs(__nv_bfloat16{}, window);
        } else if (new_inputs) {
          hold_inputs(__half{}, window);
        }
        __syncthreads();
      }
      const int held_tiles = min_of(G::kWindow, tiles - window);
#pragma unroll 1
      for (int group = 0; group < batch_groups; ++group) {
        LevelTable<kBits> tables[kRowsPerLane];
#pragma unroll
        for (int row = 0; row < kRowsPerLane; ++row) {
          tables[row] = shared.tables[team][group][lane / 4 + 8 * row];
        }
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
          for (int row = 0; row < kRowsPerLane; ++row) {
            sum[quad][row] = window == 0 ? 0.0f : shared.sum[team][group][quad][row][part][lane];
          }
        }
#pragma unroll 1
        for (int held = 0; held < held_tiles; ++held) {
          add_tile(tables, held * kParts + part);
        }
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
          for (int row = 0; row < kRowsPerLane; ++row) {
            shared.sum[team][group][quad][row][part][lane] = sum[quad][row];
          }
        }
      }
      window += G::kWindow;
    } while (window < rounds);
    __syncthreads();
    store_sums(batch, batch_groups);
  }
}

// Starts one block an SM, where kernels can be told to overlap (9.0) before the one in front ends.
template <typename G>
cudaError_t launch_instance(const A16Args& args, int device, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(typename G::Shared);
  const auto kernel = gemv_kernel<G>;
  int sms = 0;
  int code_arch = 0;
  cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = query_code_arch(kernel, device, &code_arch);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t groups = ceil_div<int64_t>(args.problem.n, kChannels);
  const bool whole = reinterpret_cast<uintptr_t>(args.x) % sizeof(uint2) == 0 &&
                     args.x_stride % kInputsPerLane == 0 && args.problem.k % kInputsPerLane == 0;
  cudaLaunchAttribute overlap = overlap_attribute();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(min_of<int64_t>(sms, groups)));
  config.blockDim = dim3(G::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = can_overlap(code_arch) ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args, whole);
}

// Two teams where a block may have that much shared memory (9.0 and 10.0, few tokens on 8.0 too),
// else one.
template <int kBits, int kQuads>
cudaError_t launch_teams(const A16Args& args, cudaStream_t stream) {
  using One = Gemv<kBits, kQuads, 1>;
  using Two = Gemv<kBits, kQuads, 2>;
  static_assert(sizeof(typename One::Shared) <= 99 * 1024, "what every architecture has");
  static_assert(sizeof(typename Two::Shared) <= (Two::kBlocksThatFit == 2 ? 113 : 227) * 1024,
                "so many blocks on an SM of 9.0");
  int device = 0;
  int shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) {
    return error;
  }
  return shared_bytes >= static_cast<int>(sizeof(typename Two::Shared))
             ? launch_instance<Two>(args, device, stream)
             : launch_instance<One>(args, device, stream);
}

template <int kBits>
cudaError_t launch_tokens(const A16Args& args, cudaStream_t stream) {
  static_assert(kGemvMaxTokens == 4 * kQuad, "the last instance's");
  if (args.problem.m <= kQuad) {
    return launch_teams<kBits, 1>(args, stream);
  }
  return args.problem.m <= 2 * kQuad ? launch_teams<kBits, 2>(args, stream)
                                     : launch_teams<kBits, 4>(args, stream);
}

}  // namespace

cudaError_t launch_gemv(const A16Args& args, cudaStream_t stream) {
  if (args.problem.m < 1 || args.problem.m > kGemvMaxTokens) {
    return cudaErrorInvalidValue;
  }
  switch (args.problem.weight_bits) {
    case 4:
      return launch_tokens<4>(args, stream);
    case 3:
      return launch_tokens<3>(args, stream);
    case 2:
      return launch_tokens<2>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lrq
