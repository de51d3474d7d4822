// Choice of the instruction set, once per process.
#include <cstdlib>
#include <cstring>

#include "tiles.h"

namespace reclip::cpu {
namespace {

enum class Capability { kBaseline, kAvx2, kAvx512 };

Capability detect() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const bool only_baseline = wish && std::strcmp(wish, "default") == 0;
  const bool only_avx2 = wish && std::strcmp(wish, "avx2") == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && !only_baseline && !only_avx2) return Capability::kAvx512;
  if (avx2 && !only_baseline) return Capability::kAvx2;
#endif
  return Capability::kBaseline;
}

Capability capability() {
  static const Capability value = detect();
  return value;
}

}  // namespace

const char* tile_capability() {
  switch (capability()) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

template <>
const TileOps<float>& tile_ops<float>(ElementType type) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (capability() == Capability::kAvx512) return avx512::tiles_float(type);
  if (capability() == Capability::kAvx2) return avx2::tiles_float(type);
#endif
  return baseline::tiles_float(type);
}

template <>
const TileOps<double>& tile_ops<double>(ElementType) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (capability() == Capability::kAvx512) return avx512::tiles_double();
  if (capability() == Capability::kAvx2) return avx2::tiles_double();
#endif
  return baseline::tiles_double();
}

}  // namespace reclip::cpu
