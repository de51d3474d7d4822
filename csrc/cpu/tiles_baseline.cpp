// Tile operations for any CPU of the architecture: 16-byte vectors.
#include <cstdint>
#include <type_traits>
#include <utility>

#include "tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace reclip::cpu::baseline {
#define RECLIP_VECTOR_BYTES 16
#include "simd.inl"
#include "noise.inl"
#include "tiles.inl"
}  // namespace reclip::cpu::baseline
