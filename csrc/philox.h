// Philox4x32-10, for host and device: the noise of element e follows from (seed, offset, e) alone.
// Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. Plain-PyTorch twin: reclip_d2/layers/philox.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RECLIP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RECLIP_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace reclip {

// The address of a noise field: two 64-bit words drawn from PyTorch's CPU generator.
struct NoiseKey {
  uint64_t seed;
  uint64_t offset;
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Four random words for the elements 4*index .. 4*index+3 of the noise field.
RECLIP_HOST_DEVICE void philox4x32(uint64_t index, NoiseKey key, uint32_t word[4]) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = static_cast<uint32_t>(key.offset), c3 = static_cast<uint32_t>(key.offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    const uint32_t high0 = static_cast<uint32_t>(product0 >> 32), low0 = static_cast<uint32_t>(product0);
    const uint32_t high1 = static_cast<uint32_t>(product1 >> 32), low1 = static_cast<uint32_t>(product1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

}  // namespace reclip
