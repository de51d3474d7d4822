// Tile operations for x86-64 CPUs with AVX2: 32-byte vectors. The pragma comes after the standard headers, so that no
// inline function shared with other translation units is compiled for these instructions.
#include <cstdint>
#include <type_traits>
#include <utility>

#include "tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
namespace reclip::cpu::avx2 {
#define RECLIP_VECTOR_BYTES 32
#include "simd.inl"
#include "noise.inl"
#include "tiles.inl"
}  // namespace reclip::cpu::avx2
#endif
