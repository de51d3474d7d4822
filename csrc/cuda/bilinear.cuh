// Bilinear upsampling on the device: positions of pixels between grid lines, and values between them.
#pragma once

#include "device.cuh"

namespace reclip::cuda {

template <typename T>
struct Position {
  int below, above;
  T weight;  // of `above`; 0 beyond the last line
};

// Grid lines per pixel, the scale of position().
template <typename T>
__host__ __device__ T scale_of(int64_t in, int64_t out) {
  return static_cast<T>(in) / static_cast<T>(out);
}

// Where output coordinate `at` lies, as F.interpolate(align_corners=False) has it; scale = in / out.
template <typename T, typename Index>
__device__ __forceinline__ Position<T> position(Index at, int in, T scale) {
  T source = scale * (static_cast<T>(at) + T(0.5)) - T(0.5);
  source = source > T(0) ? source : T(0);
  int below = static_cast<int>(source);
  below = below < in - 1 ? below : in - 1;
  T weight = source - static_cast<T>(below);
  weight = weight > T(0) ? (weight < T(1) ? weight : T(1)) : T(0);
  return below < in - 1 ? Position<T>{below, below + 1, weight} : Position<T>{below, below, T(0)};
}

// The first output coordinate that lies at or above grid line `line`, or `out`. From a guess, by position() itself, so that
// rounding cannot assign a pixel twice or not at all.
template <typename T>
__device__ __forceinline__ int64_t first_at(int line, int in, int64_t out, T scale) {
  if (line <= 0) return 0;
  if (line >= in) return out;
  int64_t at = static_cast<int64_t>((static_cast<T>(line) + T(0.5)) / scale);
  at = at < out ? at : out;
  while (at > 0 && position<T>(at - 1, in, scale).below >= line) --at;
  while (at < out && position<T>(at, in, scale).below < line) ++at;
  return at;
}

// A (B, C, h, w) map of any strides on the device.
template <typename S>
struct Map {
  const S* data;
  int64_t image_stride, class_stride, y_stride, x_stride;
  int classes, h, w;

  explicit Map(const Grid& grid)
      : data(static_cast<const S*>(grid.data)), image_stride(grid.image_stride), class_stride(grid.class_stride),
        y_stride(grid.y_stride), x_stride(grid.x_stride), classes(static_cast<int>(grid.classes)), h(static_cast<int>(grid.height)),
        w(static_cast<int>(grid.width)) {}
};

// (1 - t) * a + t * b.
template <typename T>
__device__ __forceinline__ T mix(T a, T b, T t) {
  return multiply_add(t, b, (T(1) - t) * a);
}

// The values of a pixel column between two grid rows. Rounded alike wherever it is inlined: forward and backward passes see
// the same values.
template <typename T>
struct Ramp {
  T start, rise;

  Ramp() = default;
  __device__ __forceinline__ Ramp(T below_left, T below_right, T above_left, T above_right, T x_weight)
      : start(mix(below_left, below_right, x_weight)), rise(mix(above_left, above_right, x_weight) - start) {}
  __device__ __forceinline__ T at(T y_weight) const { return multiply_add(y_weight, rise, start); }
};

// The Ramp of a channel between the grid columns `left` and `right`, at offsets of the grid rows.
template <typename S, typename T = typename Accumulate<S>::type>
__device__ __forceinline__ Ramp<T> read_ramp(const S* left, const S* right, int64_t below, int64_t above, T x_weight) {
  return {to_accumulate(left[below]), to_accumulate(right[below]), to_accumulate(left[above]), to_accumulate(right[above]), x_weight};
}

// The sum of a value over a block of kThreads threads, in a fixed order, for thread 0. Once a kernel for each Slot.
constexpr int kThreads = 128;
template <int Slot>
__device__ __forceinline__ double sum_threads(double value) {
  __shared__ double of_warp[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, step);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  return of_warp[0] + of_warp[1] + of_warp[2] + of_warp[3];
}

}  // namespace reclip::cuda
