// Gumbel noise of a run of elements. Included inside namespace reclip::cpu::<isa> after simd.inl.

constexpr int kNoiseBlock = 64;  // counters per step: four planes of 64 words stay in the first-level cache

RECLIP_INLINE FloatV to_gumbel(const uint32_t* word, const float*) {
  UintV x;
  __builtin_memcpy(&x, word, sizeof(x));
  const FloatV uniform = (__builtin_convertvector(bit_cast<IntV>(x >> 9), FloatV) + 0.5f) * 0x1p-23f;
  return -log_positive(-log_positive(uniform));
}
RECLIP_INLINE DoubleV to_gumbel(const uint32_t* word, const double*) {
  DoubleV uniform;
  for (int i = 0; i < kLanes<double>; ++i) uniform[i] = (static_cast<double>(word[i] >> 9) + 0.5) * 0x1p-23;
  return -log_positive(-log_positive(uniform));
}

// High and low halves of the 32 x 32-bit products. x86 has an instruction for every second lane, which compilers do not use:
// they multiply 64 x 64 bits.
RECLIP_INLINE void multiply(UintV a, uint32_t multiplier, UintV& high, UintV& low) {
  typedef uint64_t Wide __attribute__((vector_size(kBytes)));
  const Wide source = bit_cast<Wide>(a), odd = source >> 32;
#if RECLIP_VECTOR_BYTES == 64 && defined(__x86_64__)
  const __m512i m = _mm512_set1_epi32(static_cast<int>(multiplier));
  const Wide even_product = bit_cast<Wide>(_mm512_maskz_mul_epu32(0xFF, bit_cast<__m512i>(source), m));
  const Wide odd_product = bit_cast<Wide>(_mm512_maskz_mul_epu32(0xFF, bit_cast<__m512i>(odd), m));
#elif RECLIP_VECTOR_BYTES == 32 && defined(__x86_64__)
  const __m256i m = _mm256_set1_epi32(static_cast<int>(multiplier));
  const Wide even_product = bit_cast<Wide>(_mm256_mul_epu32(bit_cast<__m256i>(source), m));
  const Wide odd_product = bit_cast<Wide>(_mm256_mul_epu32(bit_cast<__m256i>(odd), m));
#elif defined(__x86_64__)
  const __m128i m = _mm_set1_epi32(static_cast<int>(multiplier));
  const Wide even_product = bit_cast<Wide>(_mm_mul_epu32(bit_cast<__m128i>(source), m));
  const Wide odd_product = bit_cast<Wide>(_mm_mul_epu32(bit_cast<__m128i>(odd), m));
#else
  const Wide even_product = (source & 0xFFFFFFFFu) * multiplier;
  const Wide odd_product = odd * multiplier;
#endif
  const Wide low_half = Wide{} + 0xFFFFFFFFu;
  high = bit_cast<UintV>((even_product >> 32) | (odd_product & ~low_half));
  low = bit_cast<UintV>((even_product & low_half) | (odd_product << 32));
}

// The words of kNoiseBlock counters from `first` on, plane k holding each counter's word k: philox4x32 of philox.h, a vector
// of counters at a time.
inline void philox_block(uint64_t first, NoiseKey key, uint32_t (*plane)[kNoiseBlock]) {
  constexpr int n = kLanes<float>;
  uint32_t low_words[kNoiseBlock], high_words[kNoiseBlock];
  for (int j = 0; j < kNoiseBlock; ++j) {
    low_words[j] = static_cast<uint32_t>(first + static_cast<uint64_t>(j));
    high_words[j] = static_cast<uint32_t>((first + static_cast<uint64_t>(j)) >> 32);
  }
  for (int j = 0; j < kNoiseBlock; j += n) {
    UintV c0, c1;
    __builtin_memcpy(&c0, low_words + j, sizeof(c0));
    __builtin_memcpy(&c1, high_words + j, sizeof(c1));
    UintV c2 = UintV{} + static_cast<uint32_t>(key.offset), c3 = UintV{} + static_cast<uint32_t>(key.offset >> 32);
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      UintV high0, low0, high1, low1;
      multiply(c0, kPhiloxMultiplier0, high0, low0);
      multiply(c2, kPhiloxMultiplier1, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    __builtin_memcpy(plane[0] + j, &c0, sizeof(c0));
    __builtin_memcpy(plane[1] + j, &c1, sizeof(c1));
    __builtin_memcpy(plane[2] + j, &c2, sizeof(c2));
    __builtin_memcpy(plane[3] + j, &c3, sizeof(c3));
  }
}

// Interleaves a and b, `Unit` lanes at a time, and returns the low or the high half.
template <bool High, int Unit, typename V, int... Lane>
RECLIP_INLINE V interleave(V a, V b, std::integer_sequence<int, Lane...>) {
  constexpr int n = sizeof...(Lane);
  return shuffle<((Lane / Unit % 2) * n + (High ? n / 2 : 0) + Lane / (2 * Unit) * Unit + Lane % Unit)...>(a, b);
}

// Writes the noise of a run of elements, in whole counters: element first + i is at out[(first & 3) + i]. `out` has room for
// count + kNoiseSlack values.
template <typename T>
int64_t gumbel_run(T* out, uint64_t first, int64_t count, NoiseKey key) {
  alignas(64) uint32_t plane[4][kNoiseBlock];
  using Lanes = std::make_integer_sequence<int, kLanes<T>>;
  const int64_t lead = static_cast<int64_t>(first & 3);
  uint64_t counter = first >> 2;
  for (int64_t written = 0; written < lead + count; written += 4 * kNoiseBlock, counter += kNoiseBlock) {
    philox_block(counter, key, plane);
    for (int j = 0; j < kNoiseBlock; j += kLanes<T>) {
      Vec<T> word[4];
      for (int k = 0; k < 4; ++k) word[k] = to_gumbel(&plane[k][j], static_cast<T*>(nullptr));
      const Vec<T> low01 = interleave<false, 1>(word[0], word[1], Lanes{}), high01 = interleave<true, 1>(word[0], word[1], Lanes{});
      const Vec<T> low23 = interleave<false, 1>(word[2], word[3], Lanes{}), high23 = interleave<true, 1>(word[2], word[3], Lanes{});
      T* to = out + written + 4 * j;
      store(to, interleave<false, 2>(low01, low23, Lanes{}));
      store(to + kLanes<T>, interleave<true, 2>(low01, low23, Lanes{}));
      store(to + 2 * kLanes<T>, interleave<false, 2>(high01, high23, Lanes{}));
      store(to + 3 * kLanes<T>, interleave<true, 2>(high01, high23, Lanes{}));
    }
  }
  return lead;
}
