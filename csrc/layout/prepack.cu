// Canonical codes <-> packed weight, and packed weight -> matrix. Load-time work, once per layer.
#include "prepack.h"

#include "../device/numeric.cuh"
#include "../device/twin_log.cuh"
#include "packed_weight.h"

namespace lrq {
namespace {

// Canonical code k of a row: bits [k * bits, k * bits + bits) of its little-endian stream.
template <int kBits>
__device__ int load_canonical_code(const uint32_t* row, int64_t k) {
  const int64_t bit = k * kBits;
  const int shift = static_cast<int>(bit % 32);
  uint32_t stream = row[bit / 32] >> shift;
  if (shift + kBits > 32) {
    stream |= row[bit / 32 + 1] << (32 - shift);
  }
  return static_cast<int>(stream & ((1u << kBits) - 1));
}

// One block per half tile, one thread per lane: gathers the lane's 64 codes, writes its words.
template <int kBits>
__global__ void __launch_bounds__(kHalfTileLanes) prepack_kernel(const PrepackArgs args) {
  const int64_t k_tiles = ceil_div<int64_t>(args.k, kTileInputs);
  const int64_t row_words = ceil_div<int64_t>(args.k, kCanonicalRun) * kBits;
  const int64_t half_tile = blockIdx.x;
  const MatrixNK origin = half_tile_to_nk(half_tile, k_tiles);
  const int lane = threadIdx.x;

  uint32_t words[words_per_lane(kBits)] = {};
#pragma unroll
  for (int row = 0; row < kRowsPerLane; ++row) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int position = 0; position < kPositions; ++position) {
        const LaneSlot slot{lane, slice, row, position};
        const HalfTileNK nk = lane_to_nk(slot);
        const int64_t n = origin.n + nk.channel;
        const int64_t k = origin.k + nk.k;
        if (n < args.n && k < args.k) {
          const int code = canonical_to_device_code(
              kBits, load_canonical_code<kBits>(args.codes + n * row_words, k));
#pragma unroll
          for (int plane = 0; plane < kBits; ++plane) {
            const LaneBit at = slot_to_lane_bit(kBits, slot, plane);
            words[at.word] |= static_cast<uint32_t>(code >> plane & 1) << at.bit;
          }
        }
      }
    }
  }
  uint32_t* packed = args.weight + half_tile * half_tile_words(kBits);
#pragma unroll
  for (int word = 0; word < words_per_lane(kBits); ++word) {
    packed[lane_word_to_offset(kBits, lane, word)] = words[word];
  }
}

// One thread per run of 32 codes, which is exactly kBits canonical words.
template <int kBits>
__global__ void unprepack_kernel(const UnprepackArgs args) {
  const int64_t k_tiles = ceil_div<int64_t>(args.k, kTileInputs);
  const int64_t runs = ceil_div<int64_t>(args.k, kCanonicalRun);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= args.n * runs) {
    return;
  }
  const int64_t n = index / runs;
  const int64_t k0 = index % runs * kCanonicalRun;
  uint32_t words[kBits] = {};
#pragma unroll
  for (int i = 0; i < kCanonicalRun; ++i) {
    if (k0 + i < args.k) {
      const uint32_t code =
          device_to_canonical_code(kBits, load_device_code(args.weight, kBits, n, k0 + i, k_tiles));
      const int bit = i * kBits;
      words[bit / 32] |= code << bit % 32;
      if (bit % 32 + kBits > 32) {
        words[bit / 32 + 1] |= code >> (32 - bit % 32);
      }
    }
  }
#pragma unroll
  for (int word = 0; word < kBits; ++word) {
    args.codes[index * kBits + word] = words[word];
  }
}

// One block per half tile. A lane decodes its A fragments, each register of which is four
// neighbours along K of one row: 32-byte runs of a row for four neighbouring lanes.
template <int kBits, typename Out>
__global__ void __launch_bounds__(kHalfTileLanes) dequantize_kernel(const DequantizeArgs args) {
  const int64_t k_tiles = ceil_div<int64_t>(args.k, kTileInputs);
  const int64_t half_tile = blockIdx.x;
  const MatrixNK origin = half_tile_to_nk(half_tile, k_tiles);
  const int lane = threadIdx.x;
  if (origin.n >= args.n) {
    return;
  }
  LevelTable<kBits> tables[kRowsPerLane];
  float scale[kRowsPerLane];
#pragma unroll
  for (int row = 0; row < kRowsPerLane; ++row) {
    const int64_t n = min_of(origin.n + lane_to_nk({lane, 0, row, 0}).channel, args.n - 1);
    tables[row] = load_level_table<kBits>(args.levels, args.table_of_row, n);
    scale[row] = args.scale[n];
  }
  uint32_t words[words_per_lane(kBits)];
  load_lane_words<kBits>(words, args.weight + half_tile * half_tile_words(kBits), lane);

#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    uint32_t a[4];
    decode_slice<kBits>(a, words, tables, slice);
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
      const int row = reg % 2;
      const HalfTileNK nk = lane_to_nk({lane, slice, row, reg / 2 * 4});
      const int64_t n = origin.n + nk.channel;
      const int64_t k = origin.k + nk.k;
      if (n >= args.n || k >= args.k) {
        continue;
      }
      float level[4];
      levels_to_float(level, a[reg]);
      Pack<Out, 4> four;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        four.value[i] = round_to<Out>(__fmul_rn(level[i], scale[row]));
      }
      Out* out = static_cast<Out*>(args.out) + n * args.k + k;
      if (args.k % 4 == 0) {
        store_pack(out, four);
      } else {
        for (int i = 0; i < 4 && k + i < args.k; ++i) {
          out[i] = four.value[i];
        }
      }
    }
  }
}

unsigned half_tile_count(int64_t n, int64_t k) {
  return static_cast<unsigned>(ceil_div<int64_t>(n, kTileChannels) *
                               ceil_div<int64_t>(k, kTileInputs) * 2);
}

template <int kBits>
cudaError_t launch_dequantize_as(const DequantizeArgs& args, cudaStream_t stream) {
  const unsigned blocks = half_tile_count(args.n, args.k);
  switch (args.out_type) {
    case OutType::kBFloat16:
      dequantize_kernel<kBits, __nv_bfloat16><<<blocks, kHalfTileLanes, 0, stream>>>(args);
      break;
    case OutType::kFloat16:
      dequantize_kernel<kBits, __half><<<blocks, kHalfTileLanes, 0, stream>>>(args);
      break;
    case OutType::kFloat32:
      dequantize_kernel<kBits, float><<<blocks, kHalfTileLanes, 0, stream>>>(args);
      break;
    case OutType::kInt32:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_prepack(const PrepackArgs& args, cudaStream_t stream) {
  const unsigned blocks = half_tile_count(args.n, args.k);
  switch (args.bits) {
    case 4:
      prepack_kernel<4><<<blocks, kHalfTileLanes, 0, stream>>>(args);
      break;
    case 3:
      prepack_kernel<3><<<blocks, kHalfTileLanes, 0, stream>>>(args);
      break;
    case 2:
      prepack_kernel<2><<<blocks, kHalfTileLanes, 0, stream>>>(args);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

cudaError_t launch_unprepack(const UnprepackArgs& args, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const unsigned blocks = static_cast<unsigned>(
      ceil_div<int64_t>(args.n * ceil_div<int64_t>(args.k, kCanonicalRun), kThreads));
  switch (args.bits) {
    case 4:
      unprepack_kernel<4><<<blocks, kThreads, 0, stream>>>(args);
      break;
    case 3:
      unprepack_kernel<3><<<blocks, kThreads, 0, stream>>>(args);
      break;
    case 2:
      unprepack_kernel<2><<<blocks, kThreads, 0, stream>>>(args);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

cudaError_t launch_dequantize(const DequantizeArgs& args, cudaStream_t stream) {
  switch (args.bits) {
    case 4:
      return launch_dequantize_as<4>(args, stream);
    case 3:
      return launch_dequantize_as<3>(args, stream);
    case 2:
      return launch_dequantize_as<2>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lrq
