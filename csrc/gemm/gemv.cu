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
// A group is 16 channels: one warp's share of a half tile, 256 * kBits bytes of every k tile. The
// k tiles are dealt to the warps of a block,
//
//     k tile     0   1   2  ...  7   8   9  ...
//     warp       0   1   2  ...  7   0   1  ...
//
// each of which adds its own in order and needs its own inputs alone. Sums of the warps are added
// in their order. So the bits of a result depend on x, the weight and K, not on the tokens beside
// it, the instance that runs, the grid or the GPU; reference.gemv computes the same bits.
//
// Blocks stay, two an SM, and walk over groups: inputs are converted once, and every warp keeps
// kStages copies of 256 * kBits bytes in flight in a ring of its own, across groups. A lane reads
// what it copied itself, so neither ring nor inputs need a barrier of the block.
#include "../device/numeric.cuh"
#include "../device/twin_log.cuh"
#include "launch.h"

namespace lrq {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kChannels = 16;
constexpr int kBlocksPerSm = 2;
constexpr int kQuad = 4;   // tokens whose limbs fill operand B
constexpr int kLimbs = 2;  // high, low
constexpr int kInputsPerLane = kTileInputs / 32;

template <int kBits, int kQuads>
struct GemvShared {
  static constexpr int kTokens = kQuad * kQuads;
  static constexpr int kWindow = 4 / kQuads;  // k tiles of a warp whose inputs are held at once
  static constexpr int kBatch = 8 / kQuads;   // groups whose sums are held at once
  static constexpr int kStages = 20 / kBits;

  struct Warp {
    uint32_t words[kStages][32 * words_per_lane(kBits)];
    // Operand B of slices 2 half and 2 half + 1, four registers of every lane.
    uint32_t limbs[kWindow][kQuads][kSlices / 2][32][4];
    float sum[kBatch][kQuads][kRowsPerLane][32];
    float step[kWindow][kTokens];
  };

  Warp warp[kWarps];
};

using Raw4 = Pack<uint16_t, kInputsPerLane>;

// Inputs k..k+3 of a token, zeros past K.
__device__ __forceinline__ Raw4 load_inputs(const uint16_t* row, int k, int k_size, bool aligned) {
  if (aligned && k + kInputsPerLane <= k_size) {
    return *reinterpret_cast<const Raw4*>(row + k);
  }
  Raw4 inputs = {};
#pragma unroll
  for (int i = 0; i < kInputsPerLane; ++i) {
    if (k + i < k_size) {
      inputs.value[i] = row[k + i];
    }
  }
  return inputs;
}

template <typename T>
__device__ __forceinline__ float raw_to_float(uint32_t raw) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(raw)));
  } else {
    return __uint_as_float(raw << 16);
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
__device__ __forceinline__ LimbWords split_inputs(const Raw4& inputs) {
  constexpr uint32_t kInfinity = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kInputsPerLane; ++i) {
    largest = max_of(largest, inputs.value[i] & 0x7fffu);
  }
  largest = __reduce_max_sync(0xffffffffu, largest);

  // With |x| = c 2^e, 1 <= c < 2: step = 2^(e - 14), or twice that where c 2^14 could exceed 32639.
  // Below 2^-112 a step of 2^-126 stays, which float can invert.
  const uint32_t bits = __float_as_uint(raw_to_float<T>(largest));
  const uint32_t exponent = max_of((bits + 0x10000u) >> 23, 15u);
  const float inverse = __uint_as_float((268u - exponent) << 23);

  // The sum ends in the bits of q + 128: high in byte 1, low + 128 in byte 0.
  constexpr float kRoundToInteger = 12582912.0f + 128.0f;
  uint32_t sum[kInputsPerLane];
#pragma unroll
  for (int i = 0; i < kInputsPerLane; ++i) {
    sum[i] = __float_as_uint(__fmaf_rn(raw_to_float<T>(inputs.value[i]), inverse, kRoundToInteger));
  }
  LimbWords result;
  result.high = prmt(prmt(sum[0], sum[1], 0x51), prmt(sum[2], sum[3], 0x51), 0x5410);
  result.low = prmt(prmt(sum[0], sum[1], 0x40), prmt(sum[2], sum[3], 0x40), 0x5410) ^ 0x80808080u;
  result.step = __uint_as_float(largest >= kInfinity ? 0x7fffffffu : (exponent - 14u) << 23);
  return result;
}

// The order of a warp's k tiles: those of one group after the other while their inputs are held.
template <typename Shared>
struct Walk {
  int batch = 0;   // first group of those whose sums are held
  int window = 0;  // first of the warp's tiles whose inputs are held
  int group = 0;
  int tile = 0;

  // Whether the next tile is of another group or window.
  __device__ __forceinline__ bool advance(int groups, int tiles) {
    if (++tile < min_of(window + Shared::kWindow, tiles)) {
      return false;
    }
    if (++group == min_of(batch + Shared::kBatch, groups)) {
      window += Shared::kWindow;
      if (window >= tiles) {
        window = 0;
        batch += Shared::kBatch;
      }
      group = batch;
    }
    tile = window;
    return true;
  }
};

template <int kBits, int kQuads>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gemv_kernel(const __grid_constant__ A16Args args, const bool aligned) {
  using Shared = GemvShared<kBits, kQuads>;
  constexpr int kWindow = Shared::kWindow;
  constexpr int kStages = Shared::kStages;
  extern __shared__ __align__(128) unsigned char shared[];
  Shared& all = *reinterpret_cast<Shared*>(shared);

  const int m_size = static_cast<int>(args.problem.m);
  const int n_size = static_cast<int>(args.problem.n);
  const int k_size = static_cast<int>(args.problem.k);
  const int k_tiles = ceil_div(k_size, kTileInputs);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int row_of_lane = lane / 4;    // mma's g
  const int token_of_lane = lane % 4;  // mma's t: of the result, a token of the quad
  typename Shared::Warp& mine = all.warp[warp];

  // Counts of this block and of this warp; group i of the block is group block + i * blocks.
  const int first_group = blockIdx.x;
  const int groups = ceil_div(ceil_div(n_size, kChannels) - first_group, int(gridDim.x));
  const int tiles = warp < k_tiles ? ceil_div(k_tiles - warp, kWarps) : 0;

  Walk<Shared> ahead;
  int to_copy = groups * tiles;
  int copy_stage = 0;
  const uint32_t* source = nullptr;
  int second_piece = 0;  // from the words 0..3 of the lane to its others
  const auto find_source = [&]() {
    const int n0 = (first_group + ahead.group * int(gridDim.x)) * kChannels;
    const int64_t k0 = (warp + ahead.tile * int64_t{kWarps}) * kTileInputs;
    const int half_tile_lane = n0 % kHalfTileChannels / kChannels * 32 + lane;
    source = args.weight + nk_to_half_tile(n0, k0, k_tiles) * half_tile_words(kBits) +
             lane_word_to_offset(kBits, half_tile_lane, 0);
    second_piece = lane_word_to_offset(kBits, half_tile_lane, 4) -
                   lane_word_to_offset(kBits, half_tile_lane, 0);
  };
  const auto copy_next = [&]() {
    if (to_copy > 0) {
      uint32_t* target = mine.words[copy_stage];
      cp_async_16(shared_address(target + 4 * lane), source, 16);
      if constexpr (kBits == 4) {
        cp_async_16(shared_address(target + 128 + 4 * lane), source + second_piece, 16);
      } else if constexpr (kBits == 3) {
        cp_async_8(shared_address(target + 128 + 2 * lane), source + second_piece);
      }
      --to_copy;
      if (ahead.advance(groups, tiles)) {
        find_source();
      } else {
        source += kWarps * 2 * half_tile_words(kBits);
      }
    }
    // Empty groups count too, so that "all but kStages - 2" means "this tile".
    cp_async_commit();
    copy_stage = copy_stage + 1 == kStages ? 0 : copy_stage + 1;
  };
  find_source();
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    copy_next();
  }

  const auto load_levels = [&](CanonicalLevels<kBits>(&levels)[kRowsPerLane], int group) {
    const int n0 = (first_group + group * int(gridDim.x)) * kChannels;
#pragma unroll
    for (int row = 0; row < kRowsPerLane; ++row) {
      const int64_t n = min_of(n0 + row_of_lane + 8 * row, n_size - 1);
      levels[row] = load_canonical_levels<kBits>(args.levels + (n << kBits));
    }
  };
  CanonicalLevels<kBits> next_levels[kRowsPerLane];
  load_levels(next_levels, 0);

  // Puts the limbs of a window into shared memory, a quad of tokens of a k tile at a time, whose
  // inputs are read while the quad before is converted. Limbs of tokens past M are never written;
  // what they multiply to is never stored.
  const auto hold_inputs = [&](auto type_tag, int window) {
    using T = decltype(type_tag);
    const int held_tiles = min_of(kWindow, tiles - window);
    Raw4 next[kQuad];
    const auto fetch = [&](int held, int quad) {
      const int k = (warp + (window + held) * kWarps) * kTileInputs + kInputsPerLane * lane;
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const int m = kQuad * quad + i;
        if (m < m_size && held < held_tiles) {
          const auto* row = static_cast<const uint16_t*>(args.x) + m * args.x_stride;
          next[i] = load_inputs(row, k, k_size, aligned);
        }
      }
    };
    fetch(0, 0);
    __syncwarp();  // all lanes have left the window before
#pragma unroll 1
    for (int i = 0; i < held_tiles * kQuads; ++i) {
      const int held = i / kQuads;
      const int quad = i % kQuads;
      Raw4 inputs[kQuad];
#pragma unroll
      for (int token = 0; token < kQuad; ++token) {
        inputs[token] = next[token];
      }
      fetch((i + 1) / kQuads, (i + 1) % kQuads);
      // Inputs 4 lane .. 4 lane + 3: slice lane / 8, register lane / 4 % 2, mma's t = lane % 4.
      auto& target = mine.limbs[held][quad][lane / 16];
#pragma unroll
      for (int token = 0; token < kQuad; ++token) {
        if (kQuad * quad + token < m_size) {
          const LimbWords words = split_inputs<T>(inputs[token]);
          const int high = kLimbs * token;  // a column of operand B
          target[4 * high + lane % 4][lane / 4 % 4] = words.high;
          target[4 * (high + 1) + lane % 4][lane / 4 % 4] = words.low;
          if (lane == 0) {
            mine.step[held][kQuad * quad + token] = words.step;
          }
        }
      }
    }
    __syncwarp();
  };

  int stage = 0;
  float sum[kQuads][kRowsPerLane];
  const auto add_tile = [&](const LevelTable<kBits>(&tables)[kRowsPerLane], int held) {
    cp_async_wait<kStages - 2>();
    uint32_t words[words_per_lane(kBits)];
    load_ring_words<kBits>(words, mine.words[stage], lane);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    copy_next();  // into the stage of the tile before

    int d[kQuads][4] = {};
#pragma unroll
    for (int half = 0; half < kSlices / 2; ++half) {
      uint4 b[kQuads];
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        b[quad] = *reinterpret_cast<const uint4*>(mine.limbs[held][quad][half][lane]);
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
      const float step = mine.step[held][kQuad * quad + token_of_lane];
#pragma unroll
      for (int row = 0; row < kRowsPerLane; ++row) {
        const int exact = 256 * d[quad][2 * row] + d[quad][2 * row + 1];
        sum[quad][row] = __fmaf_rn(__int2float_rn(exact), step, sum[quad][row]);
      }
    }
  };

#pragma unroll 1
  for (int batch = 0; batch < groups; batch += Shared::kBatch) {
    const int batch_groups = min_of(Shared::kBatch, groups - batch);
    int window = 0;
    do {  // once without tiles, for the zeros
      if (batch == 0 || tiles > kWindow) {
        if (args.type == OutType::kBFloat16) {
          hold_inputs(__nv_bfloat16{}, window);
        } else {
          hold_inputs(__half{}, window);
        }
      }
      const int held_tiles = min_of(kWindow, tiles - window);
#pragma unroll 1
      for (int group = 0; group < batch_groups; ++group) {
        LevelTable<kBits> tables[kRowsPerLane];
#pragma unroll
        for (int row = 0; row < kRowsPerLane; ++row) {
          tables[row] = make_level_table<kBits>(next_levels[row]);
        }
        // The group that follows, of this batch once more when a window is left.
        const bool last = group + 1 == batch_groups;
        const int next = !last ? group + 1 : window + kWindow < tiles ? 0 : batch_groups;
        load_levels(next_levels, min_of(batch + next, groups - 1));

        auto& held_sum = mine.sum[group];
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
          for (int row = 0; row < kRowsPerLane; ++row) {
            sum[quad][row] = window == 0 ? 0.0f : held_sum[quad][row][lane];
          }
        }
#pragma unroll 1
        for (int held = 0; held < held_tiles; ++held) {
          add_tile(tables, held);
        }
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
          for (int row = 0; row < kRowsPerLane; ++row) {
            held_sum[quad][row][lane] = sum[quad][row];
          }
        }
      }
      window += kWindow;
    } while (window < tiles);

    __syncthreads();
    for (int i = threadIdx.x; i < batch_groups * m_size * kChannels; i += kThreads) {
      const int channel = i % kChannels;
      const int m = i / kChannels % m_size;
      const int group = i / kChannels / m_size;
      const int n = (first_group + (batch + group) * int(gridDim.x)) * kChannels + channel;
      if (n >= n_size) {
        continue;
      }
      const int owner = 4 * (channel % 8) + m % kQuad;
      float total = all.warp[0].sum[group][m / kQuad][channel / 8][owner];
#pragma unroll
      for (int other = 1; other < kWarps; ++other) {
        total = __fadd_rn(total, all.warp[other].sum[group][m / kQuad][channel / 8][owner]);
      }
      // fma(a, b, -0) is rn(a * b) in every case, sign of zero included.
      const float y =
          __fmaf_rn(total, args.weight_scale[n], args.bias == nullptr ? -0.0f : args.bias[n]);
      const int64_t at = static_cast<int64_t>(m) * n_size + n;
      if (args.type == OutType::kBFloat16) {
        static_cast<__nv_bfloat16*>(args.y)[at] = round_to<__nv_bfloat16>(y);
      } else {
        static_cast<__half*>(args.y)[at] = round_to<__half>(y);
      }
    }
    __syncthreads();
  }
}

// As many blocks as are resident at once, or as there are groups.
cudaError_t resident_blocks(int shared_bytes, int* blocks) {
  int device = 0;
  int sms = 0;
  int shared_per_sm = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error =
        cudaDeviceGetAttribute(&shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  constexpr int kReserved = 1024;  // of shared memory, by the system, for every block
  *blocks = sms * max_of(1, min_of(kBlocksPerSm, shared_per_sm / (shared_bytes + kReserved)));
  return error;
}

template <int kBits, int kQuads>
cudaError_t launch_instance(const A16Args& args, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(GemvShared<kBits, kQuads>);
  static_assert(kSharedBytes <= 99 * 1024, "what every architecture from 8.0 has for a block");
  const auto kernel = gemv_kernel<kBits, kQuads>;
  int blocks = 0;
  cudaError_t error = resident_blocks(kSharedBytes, &blocks);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t groups = ceil_div<int64_t>(args.problem.n, kChannels);
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % sizeof(Raw4) == 0 &&
                       args.x_stride % kInputsPerLane == 0;
  kernel<<<static_cast<unsigned>(min_of<int64_t>(blocks, groups)), kThreads, kSharedBytes,
           stream>>>(args, aligned);
  return cudaGetLastError();
}

template <int kBits>
cudaError_t launch_tokens(const A16Args& args, cudaStream_t stream) {
  return args.problem.m <= kQuad ? launch_instance<kBits, 1>(args, stream)
                                 : launch_instance<kBits, kGemvMaxTokens / kQuad>(args, stream);
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
