// Device helpers: element types, packs of elements, dispatch on a dtype.
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

// N elements that one instruction (two for double) moves.
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
