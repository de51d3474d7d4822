// Device helpers: element types, packs of elements, logarithm and exponential, dispatch on a dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace reclip::cuda {

template <typename S>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

__device__ __forceinline__ float to_accumulate(float v) { return v; }
__device__ __forceinline__ double to_accumulate(double v) { return v; }
__device__ __forceinline__ float to_accumulate(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_accumulate(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename S>
__device__ __forceinline__ S from_accumulate(typename Accumulate<S>::type v);
template <>
__device__ __forceinline__ float from_accumulate<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ double from_accumulate<double>(double v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_accumulate<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_accumulate<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// N elements moved by one instruction (two for double).
template <typename S, int N>
struct alignas(sizeof(S) * N < 16 ? sizeof(S) * N : 16) Pack {
  S at[N];
};
template <typename S, int N>
__device__ __forceinline__ Pack<S, N> load_pack(const S* p) {
  return *reinterpret_cast<const Pack<S, N>*>(p);
}

template <typename T>
__device__ __forceinline__ T not_a_number() {
  return static_cast<T>(__int_as_float(0x7FC00000));
}
template <typename T>
__device__ __forceinline__ T lowest() {
  return static_cast<T>(-__int_as_float(0x7F800000));
}

// Natural logarithm of positive normal numbers, accurate also near 1 (Cephes logf); the CPU's counterpart is in cpu/simd.inl.
__device__ __forceinline__ float log_positive(float x) {
  const uint32_t shifted = __float_as_uint(x) + (0x3F800000u - 0x3F3504F3u);
  const float exponent = static_cast<float>(static_cast<int>(shifted >> 23) - 127);
  const float f = __uint_as_float((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  const float z = f * f;
  float y = fmaf(f, 7.0376836292e-2f, -1.1514610310e-1f);
  y = fmaf(y, f, 1.1676998740e-1f);
  y = fmaf(y, f, -1.2420140846e-1f);
  y = fmaf(y, f, 1.4249322787e-1f);
  y = fmaf(y, f, -1.6668057665e-1f);
  y = fmaf(y, f, 2.0000714765e-1f);
  y = fmaf(y, f, -2.4999993993e-1f);
  y = fmaf(y, f, 3.3333331174e-1f);
  y = fmaf(y * f, z, fmaf(exponent, -2.12194440e-4f, -0.5f * z));
  return fmaf(exponent, 0.693359375f, f + y);
}
__device__ __forceinline__ double log_positive(double x) { return log(x); }

__device__ __forceinline__ float exp_fast(float x) { return __expf(x); }
__device__ __forceinline__ double exp_fast(double x) { return exp(x); }

// a * b + c, rounded once, regardless of the compiler's contraction settings.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// The larger number; a NaN in second place is ignored.
template <typename T>
__device__ __forceinline__ T max_of(T a, T b) {
  return b > a ? b : a;
}

__device__ __forceinline__ float abs_of(float x) { return fabsf(x); }
__device__ __forceinline__ double abs_of(double x) { return fabs(x); }

template <typename S>
struct Tag {
  using type = S;
};
template <typename Call>
cudaError_t dispatch(ElementType type, const Call& call) {
  switch (type) {
    case ElementType::kFloat64:
      return call(Tag<double>{});
    case ElementType::kFloat32:
      return call(Tag<float>{});
    case ElementType::kFloat16:
      return call(Tag<__half>{});
    default:
      return call(Tag<__nv_bfloat16>{});
  }
}
template <typename Call>
cudaError_t dispatch_accumulate(bool is_double, const Call& call) {
  return is_double ? call(Tag<double>{}) : call(Tag<float>{});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace reclip::cuda
