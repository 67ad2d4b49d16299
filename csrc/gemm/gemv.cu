// Few tokens, 16-bit activations: y = rn(fma(sum_k x * level, weight_scale, bias)), summed in fp32.
//
// A block owns 16 channels, which are one warp's share of a half tile, and its warps deal out the k
// tiles among themselves:
//
//     k tile     0   1   2  ...  7   8   9  ...
//     warp       0   1   2  ...  7   0   1  ...
//
// so a warp's weights are contiguous 16-byte pieces of its lanes, and its 128 inputs of every token
// are its own: they go through its own part of shared memory as fp32, without a block barrier. A
// lane sums its positions, then four lanes of a row by shuffles, then the warps in their order: the
// order of additions depends on K alone, so runs, and tokens among different neighbours, are
// bit-identical.
#include "../device/numeric.cuh"
#include "../device/twin_log.cuh"
#include "launch.h"

namespace lrq {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kChannels = 16;
constexpr int kInputsPerLane = kTileInputs / 32;

template <int kTokens>
struct GemvShared {
  float x[kWarps][kTokens][kTileInputs];
  float sum[kWarps][kTokens][kChannels];
};

// Blocks of an SM by the registers that the sums and inputs of so many tokens need.
constexpr int min_blocks(int tokens) { return tokens <= 2 ? 4 : 2; }

using Raw4 = Pack<uint16_t, kInputsPerLane>;

__device__ __forceinline__ float raw_to_float(uint16_t raw, OutType type) {
  return type == OutType::kBFloat16 ? __uint_as_float(static_cast<uint32_t>(raw) << 16)
                                    : __half2float(__ushort_as_half(raw));
}

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

template <int kBits, int kTokens>
__global__ void __launch_bounds__(kThreads, min_blocks(kTokens))
    gemv_kernel(const __grid_constant__ GemvArgs args, const bool aligned) {
  extern __shared__ __align__(128) unsigned char shared[];
  auto& scratch = *reinterpret_cast<GemvShared<kTokens>*>(shared);

  const int m_size = static_cast<int>(args.problem.m);
  const int n_size = static_cast<int>(args.problem.n);
  const int k_size = static_cast<int>(args.problem.k);
  const int k_tiles = ceil_div(k_size, kTileInputs);
  const int n0 = blockIdx.x * kChannels;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int group = lane / 4;
  const int thread = lane % 4;
  const int half_tile_lane = n0 % kHalfTileChannels / kChannels * 32 + lane;

  LevelTable<kBits> tables[kRowsPerLane];
#pragma unroll
  for (int row = 0; row < kRowsPerLane; ++row) {
    const int64_t n = min_of(n0 + group + 8 * row, n_size - 1);
    tables[row] = load_level_table<kBits>(args.levels + (n << kBits));
  }

  // Weights are fetched one k tile ahead; so are inputs, while they leave registers for it.
  constexpr bool kInputsAhead = kTokens <= 4;
  uint32_t next_words[words_per_lane(kBits)];
  Raw4 inputs[kTokens];
  const auto fetch_words = [&](int k_tile) {
    const int64_t half_tile = nk_to_half_tile(n0, k_tile * kTileInputs, k_tiles);
    load_lane_words<kBits>(next_words, args.weight + half_tile * half_tile_words(kBits),
                           half_tile_lane);
  };
  const auto fetch_inputs = [&](int k_tile) {
    const int k = k_tile * kTileInputs + kInputsPerLane * lane;
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      inputs[m] = {};
      if (m < m_size) {
        inputs[m] = load_inputs(static_cast<const uint16_t*>(args.x) + m * args.x_stride, k, k_size,
                                aligned);
      }
    }
  };

  float sum[kTokens][kRowsPerLane] = {};
  const auto accumulate = [&](const uint32_t (&words)[words_per_lane(kBits)]) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      uint32_t a[4];
      decode_slice<kBits>(a, words, tables, slice);
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        float level[kRowsPerLane][4];
#pragma unroll
        for (int row = 0; row < kRowsPerLane; ++row) {
          levels_to_float(level[row], a[2 * upper + row]);
        }
        const int k = lane_to_nk({lane, slice, 0, 4 * upper}).k;
#pragma unroll
        for (int m = 0; m < kTokens; ++m) {
          const float4 x = *reinterpret_cast<const float4*>(&scratch.x[warp][m][k]);
#pragma unroll
          for (int row = 0; row < kRowsPerLane; ++row) {
            float total = sum[m][row];
            total = __fmaf_rn(x.x, level[row][0], total);
            total = __fmaf_rn(x.y, level[row][1], total);
            total = __fmaf_rn(x.z, level[row][2], total);
            sum[m][row] = __fmaf_rn(x.w, level[row][3], total);
          }
        }
      }
    }
  };

  if (warp < k_tiles) {
    fetch_words(warp);
    if constexpr (kInputsAhead) {
      fetch_inputs(warp);
    }
  }
#pragma unroll 1
  for (int k_tile = warp; k_tile < k_tiles; k_tile += kWarps) {
    uint32_t words[words_per_lane(kBits)];
#pragma unroll
    for (int i = 0; i < words_per_lane(kBits); ++i) {
      words[i] = next_words[i];
    }
    if constexpr (!kInputsAhead) {
      fetch_inputs(k_tile);
    }
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      const uint16_t (&raw)[kInputsPerLane] = inputs[m].value;
      *reinterpret_cast<float4*>(&scratch.x[warp][m][kInputsPerLane * lane]) =
          make_float4(raw_to_float(raw[0], args.type), raw_to_float(raw[1], args.type),
                      raw_to_float(raw[2], args.type), raw_to_float(raw[3], args.type));
    }
    __syncwarp();
    if (k_tile + kWarps < k_tiles) {
      fetch_words(k_tile + kWarps);
      if constexpr (kInputsAhead) {
        fetch_inputs(k_tile + kWarps);
      }
    }
    accumulate(words);
    __syncwarp();
  }

#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
#pragma unroll
    for (int row = 0; row < kRowsPerLane; ++row) {
      float total = sum[m][row];
      total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, 1));
      total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, 2));
      if (thread == 0) {
        scratch.sum[warp][m][group + 8 * row] = total;
      }
    }
  }
  __syncthreads();
  const int m = threadIdx.x / kChannels;
  const int channel = threadIdx.x % kChannels;
  const int n = n0 + channel;
  if (m >= kTokens || m >= m_size || n >= n_size) {
    return;
  }
  float total = scratch.sum[0][m][channel];
#pragma unroll
  for (int other = 1; other < kWarps; ++other) {
    total = __fadd_rn(total, scratch.sum[other][m][channel]);
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

template <int kBits, int kTokens>
cudaError_t launch_instance(const GemvArgs& args, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % sizeof(Raw4) == 0 &&
                       args.x_stride % kInputsPerLane == 0;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(args.problem.n, kChannels));
  static_assert(sizeof(GemvShared<kTokens>) <= 48 * 1024, "more would have to be asked for");
  gemv_kernel<kBits, kTokens>
      <<<blocks, kThreads, sizeof(GemvShared<kTokens>), stream>>>(args, aligned);
  return cudaGetLastError();
}

// The smallest instance that holds the tokens: registers and shared memory grow with it.
template <int kBits>
cudaError_t launch_tokens(const GemvArgs& args, cudaStream_t stream) {
  if (args.problem.m <= 1) {
    return launch_instance<kBits, 1>(args, stream);
  }
  if (args.problem.m <= 2) {
    return launch_instance<kBits, 2>(args, stream);
  }
  if (args.problem.m <= 4) {
    return launch_instance<kBits, 4>(args, stream);
  }
  return launch_instance<kBits, kGemvMaxTokens>(args, stream);
}

}  // namespace

cudaError_t launch_gemv(const GemvArgs& args, cudaStream_t stream) {
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
