// wgmma on int8 with operand A in registers: one PTX instruction per function, one function per
// width.
//
//     d[64, n] (+)= a[64, 32] * b[32, n]        a: 4 registers a lane, b: a descriptor, d: n / 2
//     int32
//
// With w = warp of the warpgroup, g = lane / 4, t = lane % 4:
//
//     a[r], a[2 + r]   row 16w + g + 8r, k 4t..4t+3 and 16 + 4t..     (r = 0, 1; as mma.m16n8k32)
//     d[4j + 2r + e]   row 16w + g + 8r, column 8j + 2t + e           (e = 0, 1)
//
// An asm statement cannot count its operands, so the macros below spell them: LRQ_WGMMA_NAMES_n is
// "%0, ..., %(n-1)", LRQ_WGMMA_OUTPUTS_n the n registers of d.
#pragma once

#include <cstdint>

namespace lrq {

#define LRQ_WGMMA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LRQ_WGMMA_NAMES_16 \
  LRQ_WGMMA_NAMES_8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LRQ_WGMMA_NAMES_32 \
  LRQ_WGMMA_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LRQ_WGMMA_NAMES_64                                                           \
  LRQ_WGMMA_NAMES_32                                                                 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LRQ_WGMMA_NAMES_72 \
  LRQ_WGMMA_NAMES_64       \
  ", %64, %65, %66, %67, %68, %69, %70, %71"
#define LRQ_WGMMA_NAMES_96                                                           \
  LRQ_WGMMA_NAMES_72                                                                 \
  ", %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87" \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define LRQ_WGMMA_NAMES_112 \
  LRQ_WGMMA_NAMES_96        \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define LRQ_WGMMA_NAMES_128                                                                      \
  LRQ_WGMMA_NAMES_112                                                                            \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"

#define LRQ_WGMMA_OUTPUTS_8_AT(i)                                                             \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), \
      "+r"(d[i + 6]), "+r"(d[i + 7])
#define LRQ_WGMMA_OUTPUTS_8 LRQ_WGMMA_OUTPUTS_8_AT(0)
#define LRQ_WGMMA_OUTPUTS_16 LRQ_WGMMA_OUTPUTS_8, LRQ_WGMMA_OUTPUTS_8_AT(8)
#define LRQ_WGMMA_OUTPUTS_32 \
  LRQ_WGMMA_OUTPUTS_16, LRQ_WGMMA_OUTPUTS_8_AT(16), LRQ_WGMMA_OUTPUTS_8_AT(24)
#define LRQ_WGMMA_OUTPUTS_64                                                    \
  LRQ_WGMMA_OUTPUTS_32, LRQ_WGMMA_OUTPUTS_8_AT(32), LRQ_WGMMA_OUTPUTS_8_AT(40), \
      LRQ_WGMMA_OUTPUTS_8_AT(48), LRQ_WGMMA_OUTPUTS_8_AT(56)
#define LRQ_WGMMA_OUTPUTS_72 LRQ_WGMMA_OUTPUTS_64, LRQ_WGMMA_OUTPUTS_8_AT(64)
#define LRQ_WGMMA_OUTPUTS_96                                                    \
  LRQ_WGMMA_OUTPUTS_72, LRQ_WGMMA_OUTPUTS_8_AT(72), LRQ_WGMMA_OUTPUTS_8_AT(80), \
      LRQ_WGMMA_OUTPUTS_8_AT(88)
#define LRQ_WGMMA_OUTPUTS_112 \
  LRQ_WGMMA_OUTPUTS_96, LRQ_WGMMA_OUTPUTS_8_AT(96), LRQ_WGMMA_OUTPUTS_8_AT(104)
#define LRQ_WGMMA_OUTPUTS_128 \
  LRQ_WGMMA_OUTPUTS_112, LRQ_WGMMA_OUTPUTS_8_AT(112), LRQ_WGMMA_OUTPUTS_8_AT(120)

template <int kColumns>
__device__ __forceinline__ void wgmma_m64k32_s8(int (&d)[kColumns / 2], const uint32_t (&a)[4],
                                                uint64_t b, int accumulate);

// d = a * b, plus d if `accumulate`; int32 without saturation. Asynchronous: neither d nor a may be
// touched before wgmma_wait says so (PTX ISA, wgmma.mma_async).
#define LRQ_DEFINE_WGMMA(columns, count, a0, a1, a2, a3, descriptor, predicate)                   \
  template <>                                                                                     \
  __device__ __forceinline__ void wgmma_m64k32_s8<columns>(                                       \
      int (&d)[columns / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #predicate                                  \
                 ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #columns                                     \
                 "k32.s32.s8.s8 {" LRQ_WGMMA_NAMES_##count "}, {%" #a0 ", %" #a1 ", %" #a2        \
                                                           ", %" #a3 "}, %" #descriptor ", p;\n}" \
                 : LRQ_WGMMA_OUTPUTS_##count                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));          \
  }

LRQ_DEFINE_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
LRQ_DEFINE_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
LRQ_DEFINE_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
LRQ_DEFINE_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
LRQ_DEFINE_WGMMA(144, 72, 72, 73, 74, 75, 76, 77)
LRQ_DEFINE_WGMMA(192, 96, 96, 97, 98, 99, 100, 101)
LRQ_DEFINE_WGMMA(224, 112, 112, 113, 114, 115, 116, 117)
LRQ_DEFINE_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)

#undef LRQ_DEFINE_WGMMA

}  // namespace lrq
