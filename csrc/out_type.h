// The types in which kernels write results.
#pragma once

namespace lrq {

enum class OutType : int { kBFloat16, kFloat16, kFloat32, kInt32 };

constexpr int out_type_bytes(OutType type) {
  return type == OutType::kBFloat16 || type == OutType::kFloat16 ? 2 : 4;
}

}  // namespace lrq
