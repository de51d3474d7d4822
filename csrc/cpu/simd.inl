// Vectors of one instruction set: loads and stores of every dtype, log and exp. Included inside namespace
// reclip::cpu::<isa> with RECLIP_VECTOR_BYTES set; uses GCC's and Clang's vector extensions.

constexpr int kBytes = RECLIP_VECTOR_BYTES;
#define RECLIP_INLINE inline __attribute__((always_inline))

typedef float FloatV __attribute__((vector_size(kBytes)));
typedef uint32_t UintV __attribute__((vector_size(kBytes)));
typedef int32_t IntV __attribute__((vector_size(kBytes)));
typedef uint16_t HalfBitsV __attribute__((vector_size(kBytes / 2)));
typedef double DoubleV __attribute__((vector_size(kBytes)));
typedef int64_t LongV __attribute__((vector_size(kBytes)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatV;
  using index = IntV;
};
template <>
struct VectorOf<double> {
  using type = DoubleV;
  using index = LongV;
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
using Index = typename VectorOf<T>::index;
template <typename T>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));

template <typename To, typename From>
RECLIP_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V, typename T>
RECLIP_INLINE V splat(T value) {
  return V{} + value;
}

// -- loads: accumulation type from any element type ------------------------------------------------------------------------

RECLIP_INLINE FloatV load(const float* p) {
  FloatV v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
RECLIP_INLINE DoubleV load(const double* p) {
  DoubleV v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
RECLIP_INLINE FloatV load(const BFloat16* p) {
  HalfBitsV h;
  __builtin_memcpy(&h, p, sizeof(h));
  return bit_cast<FloatV>(__builtin_convertvector(h, UintV) << 16);
}
// Shifting a half's exponent and mantissa into place leaves the value times 2**-112; the product is exact, subnormals too.
RECLIP_INLINE FloatV load(const Half* p) {
  HalfBitsV h;
  __builtin_memcpy(&h, p, sizeof(h));
  const UintV wide = __builtin_convertvector(h, UintV);
  const UintV magnitude = (wide & 0x7FFFu) << 13;
  const UintV value = bit_cast<UintV>(bit_cast<FloatV>(magnitude) * 0x1p112f);
  const UintV special = magnitude >= 0x0F800000u ? UintV{} + 0x7F800000u : UintV{};
  return bit_cast<FloatV>(value | special | ((wide & 0x8000u) << 16));
}

// -- stores: round to nearest even -----------------------------------------------------------------------------------------

RECLIP_INLINE void store(float* p, FloatV v) { __builtin_memcpy(p, &v, sizeof(v)); }
RECLIP_INLINE void store(double* p, DoubleV v) { __builtin_memcpy(p, &v, sizeof(v)); }
RECLIP_INLINE void store(BFloat16* p, FloatV v) {
  const UintV bits = bit_cast<UintV>(v);
  const UintV rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const UintV result = (bits & 0x7FFFFFFFu) > 0x7F800000u ? UintV{} + 0x7FC0u : rounded;
  const HalfBitsV h = __builtin_convertvector(result, HalfBitsV);
  __builtin_memcpy(p, &h, sizeof(h));
}
RECLIP_INLINE void store(Half* p, FloatV v) {
  const UintV bits = bit_cast<UintV>(v);
  const UintV magnitude = bits & 0x7FFFFFFFu;
  // Adding this constant makes the hardware round a subnormal result; its bits are then subtracted.
  const UintV magic = UintV{} + (126u << 23);
  const UintV subnormal = bit_cast<UintV>(bit_cast<FloatV>(magnitude) + bit_cast<FloatV>(magic)) - magic;
  const UintV normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const UintV special = magnitude > 0x7F800000u ? UintV{} + 0x7E00u : UintV{} + 0x7C00u;
  const UintV small_or_normal = magnitude < 0x38800000u ? subnormal : normal;
  const UintV result = (magnitude >= 0x47800000u ? special : small_or_normal) | ((bits >> 16) & 0x8000u);
  const HalfBitsV h = __builtin_convertvector(result, HalfBitsV);
  __builtin_memcpy(p, &h, sizeof(h));
}

// Up to one vector of elements; the lanes beyond `count` are zero (load) or not written (store).
template <typename T, typename S>
RECLIP_INLINE Vec<T> load_some(const S* p, int64_t count) {
  if (count >= kLanes<T>) return load(p);
  S buffer[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <typename T, typename S>
RECLIP_INLINE void store_some(S* p, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) return store(p, v);
  S buffer[kLanes<T>];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}
template <typename T, typename S>
RECLIP_INLINE Vec<T> load_strided(const S* p, int64_t stride, int64_t count) {
  if (stride == 1) return load_some<T>(p, count);
  S buffer[kLanes<T>] = {};
  for (int64_t i = 0; i < (count < kLanes<T> ? count : kLanes<T>); ++i) buffer[i] = p[i * stride];
  return load(buffer);
}
template <typename T, typename S>
RECLIP_INLINE void store_strided(S* p, int64_t stride, Vec<T> v, int64_t count) {
  if (stride == 1) return store_some<T>(p, v, count);
  S buffer[kLanes<T>];
  store(buffer, v);
  for (int64_t i = 0; i < (count < kLanes<T> ? count : kLanes<T>); ++i) p[i * stride] = buffer[i];
}

template <typename V>
RECLIP_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
RECLIP_INLINE V minimum(V a, V b) {
  return a < b ? a : b;
}
// Lanes of a and b (numbered after the lanes of a), chosen at compile time. GCC has Clang's builtin since release 12.
template <int... Lane, typename V>
RECLIP_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Lane...);
#else
  using Lanes = decltype(a < b);
  return __builtin_shuffle(a, b, Lanes{Lane...});
#endif
}

// The sum of all lanes, in a fixed tree order: each step adds the lane that is `Step` lanes away.
template <int Step, typename V, int... Lane>
RECLIP_INLINE V add_across(V v, std::integer_sequence<int, Lane...>) {
  return v + shuffle<(Lane ^ Step)...>(v, v);
}
template <typename V>
RECLIP_INLINE auto sum_lanes(V v) {
  constexpr int n = static_cast<int>(sizeof(V) / sizeof(v[0]));
  using Lanes = std::make_integer_sequence<int, n>;
  if constexpr (n > 8) v = add_across<8>(v, Lanes{});
  if constexpr (n > 4) v = add_across<4>(v, Lanes{});
  if constexpr (n > 2) v = add_across<2>(v, Lanes{});
  return add_across<1>(v, Lanes{})[0];
}

// -- elementary functions --------------------------------------------------------------------------------------------------

// Natural logarithm of positive normal numbers, within about one unit in the last place, even near 1 (Cephes logf).
RECLIP_INLINE FloatV log_positive(FloatV x) {
  const UintV shifted = bit_cast<UintV>(x) + (0x3F800000u - 0x3F3504F3u);
  const FloatV exponent = __builtin_convertvector(bit_cast<IntV>(shifted >> 23) - 127, FloatV);
  const FloatV f = bit_cast<FloatV>((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;  // mantissa in [sqrt(1/2), sqrt(2)) less 1
  const FloatV z = f * f;
  FloatV y = f * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z - exponent * 2.12194440e-4f - z * 0.5f;
  return f + y + exponent * 0.693359375f;
}
RECLIP_INLINE DoubleV log_positive(DoubleV x) {
  DoubleV y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_log(x[i]);
  return y;
}

// exp of numbers up to 0; below -87 the result is about 1e-38, which is negligible next to the maximum's 1 (Cephes expf).
RECLIP_INLINE FloatV exp_nonpositive(FloatV x) {
  x = maximum(x, splat<FloatV>(-87.0f));
  const IntV n = __builtin_convertvector(x * 1.44269504f - 0.5f, IntV);  // truncation: rounds to nearest for x <= 0
  const FloatV fn = __builtin_convertvector(n, FloatV);
  const FloatV r = x - fn * 0.693359375f + fn * 2.12194440e-4f;
  FloatV y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return bit_cast<FloatV>(bit_cast<IntV>(y) + (n << 23));
}
RECLIP_INLINE DoubleV exp_nonpositive(DoubleV x) {
  DoubleV y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}
