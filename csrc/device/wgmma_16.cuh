// wgmma on bf16 or fp16 with operand A in registers, fp32 accumulation: one PTX instruction per
// function.
//
//     d[64, n] (+)= a[64, 16] * b[16, n]        a: 4 registers a lane, b: a descriptor, d: n / 2
//     fp32
//
// With w = warp of the warpgroup, g = lane / 4, t = lane % 4:
//
//     a[r], a[2 + r]   row 16w + g + 8r, k 2t, 2t+1 and 2t+8, 2t+9     (r = 0, 1)
//     d[4j + 2r + e]   row 16w + g + 8r, column 8j + 2t + e            (e = 0, 1)
//
// The lists of operands are those of wgmma_s8.cuh, whose registers have no type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "wgmma_s8.cuh"

namespace lrq {

template <typename T, int kColumns>
__device__ __forceinline__ void wgmma_m64k16(uint32_t (&d)[kColumns / 2], const uint32_t (&a)[4],
                                             uint64_t b, int accumulate);

// d = a * b, plus d if `accumulate`. Asynchronous: neither d nor a may be touched before wgmma_wait
// says so (PTX ISA, wgmma.mma_async).
#define LRQ_DEFINE_WGMMA_16(type, name, columns, count, a0, a1, a2, a3, descriptor, predicate) \
  template <>                                                                                  \
  __device__ __forceinline__ void wgmma_m64k16<type, columns>(                                 \
      uint32_t (&d)[columns / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #predicate                               \
                 ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name         \
                 " {" LRQ_WGMMA_NAMES_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3        \
                                              "}, %" #descriptor ", p, 1, 1, 0;\n}"            \
                 : LRQ_WGMMA_OUTPUTS_##count                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));       \
  }
#define LRQ_DEFINE_WGMMA_16_BOTH(...)                     \
  LRQ_DEFINE_WGMMA_16(__nv_bfloat16, "bf16", __VA_ARGS__) \
  LRQ_DEFINE_WGMMA_16(__half, "f16", __VA_ARGS__)

LRQ_DEFINE_WGMMA_16_BOTH(64, 32, 32, 33, 34, 35, 36, 37)
LRQ_DEFINE_WGMMA_16_BOTH(128, 64, 64, 65, 66, 67, 68, 69)
LRQ_DEFINE_WGMMA_16_BOTH(192, 96, 96, 97, 98, 99, 100, 101)
LRQ_DEFINE_WGMMA_16_BOTH(256, 128, 128, 129, 130, 131, 132, 133)

#undef LRQ_DEFINE_WGMMA_16_BOTH
#undef LRQ_DEFINE_WGMMA_16

}  // namespace lrq
