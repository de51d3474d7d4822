// Bilinear upsampling on the device: positions of pixels between grid lines, a thread's column of pixels, and the gradient of
// a grid from that of its pixels.
#pragma once

#include "device.cuh"

namespace reclip::cuda {

template <typename T>
struct Position {
  int below, above;
  T weight;  // of `above`
};

// Where output coordinate `at` lies, as F.interpolate(align_corners=False) has it; scale = in / out.
template <typename T, typename Index>
__device__ __forceinline__ Position<T> position(Index at, int in, T scale) {
  T source = scale * (static_cast<T>(at) + T(0.5)) - T(0.5);
  source = source > T(0) ? source : T(0);
  int below = static_cast<int>(source);
  below = below < in - 1 ? below : in - 1;
  T weight = source - static_cast<T>(below);
  weight = weight > T(0) ? (weight < T(1) ? weight : T(1)) : T(0);
  return {below, below + (below < in - 1 ? 1 : 0), weight};
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

// (1 - t) * a + t * b, rounded alike wherever it is inlined: forward and backward passes see the same values.
template <typename T>
__device__ __forceinline__ T mix(T a, T b, T t) {
  return multiply_add(t, b, (T(1) - t) * a);
}

// Values of one channel at a pixel column, row by row in ascending order: the grid is read where the grid rows change.
template <typename S>
struct Column {
  using T = typename Accumulate<S>::type;
  const S* left;
  const S* right;
  int64_t y_stride;
  T weight, top_left, top_right, bottom_left, bottom_right;

  __device__ __forceinline__ Column(const Map<S>& map, int64_t image, int64_t channel, const Position<T>& px)
      : y_stride(map.y_stride), weight(px.weight), top_left(0), top_right(0), bottom_left(0), bottom_right(0) {
    const S* from = map.data + image * map.image_stride + channel * map.class_stride;
    left = from + px.below * map.x_stride;
    right = from + px.above * map.x_stride;
  }
  // `fresh`: the grid rows are others than those of the call before.
  __device__ __forceinline__ T at(const Position<T>& py, bool fresh) {
    if (fresh) {
      const int64_t y0 = py.below * y_stride, y1 = py.above * y_stride;
      top_left = to_accumulate(left[y0]), top_right = to_accumulate(right[y0]);
      bottom_left = to_accumulate(left[y1]), bottom_right = to_accumulate(right[y1]);
    }
    return mix(mix(top_left, bottom_left, py.weight), mix(top_right, bottom_right, py.weight), weight);
  }
};

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

// Gradient of a map from that of its upsampled pixels. A thread owns one channel of one grid column, for kGridRows grid rows,
// and gathers the pixels on both sides of it: nothing is shared, each output is summed in one order. A pixel is computed by
// the threads of its two columns, and those at the seams of the row chunks twice.
//
// `pixel` is a Pixel: pixel.row(image, y) before each row of pixels, then pixel(image, channel, y, x, value) is the gradient of
// the interpolated value.
constexpr int kGridRows = 8;

template <typename S, typename Pixel>
__global__ void __launch_bounds__(kThreads)
    upsample_gradient_kernel(Map<S> map, Map<S> gradient, Pixel pixel, int64_t height, int64_t width, int64_t chunks,
                             int64_t threads, bool channels_inner, const typename Accumulate<S>::type* grad_loss,
                             const typename Accumulate<S>::type* weight) {
  using T = typename Accumulate<S>::type;
  int64_t task = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (task >= threads) return;
  int channel, j;
  if (channels_inner) {
    channel = static_cast<int>(task % map.classes), task /= map.classes;
    j = static_cast<int>(task % map.w), task /= map.w;
  } else {
    j = static_cast<int>(task % map.w), task /= map.w;
    channel = static_cast<int>(task % map.classes), task /= map.classes;
  }
  const int64_t image = task / chunks;
  const int first_row = static_cast<int>(task % chunks) * kGridRows;
  const int last_row = first_row + kGridRows < map.h ? first_row + kGridRows : map.h;
  const T x_scale = static_cast<T>(map.w) / static_cast<T>(width), y_scale = static_cast<T>(map.h) / static_cast<T>(height);
  const int64_t x0 = first_at<T>(j - 1, map.w, width, x_scale), x1 = first_at<T>(j, map.w, width, x_scale),
                x2 = first_at<T>(j + 1, map.w, width, x_scale);
  const bool last_column = j == map.w - 1;
  const S* from = map.data + image * map.image_stride + channel * map.class_stride;
  const int64_t at0 = (j > 0 ? j - 1 : 0) * map.x_stride, at1 = j * map.x_stride, at2 = (last_column ? j : j + 1) * map.x_stride;
  const T factor = grad_loss[image] * weight[image];
  S* to = const_cast<S*>(gradient.data) + image * gradient.image_stride + channel * gradient.class_stride + j * gradient.x_stride;

  T own = T(0), next = T(0);
  int64_t y = first_at<T>(first_row > 0 ? first_row - 1 : 0, map.h, height, y_scale);
  for (int k = first_row > 0 ? first_row - 1 : 0; k < last_row; ++k) {
    const bool last = k == map.h - 1;
    const S* below = from + k * map.y_stride;
    const S* above = from + (last ? k : k + 1) * map.y_stride;
    const T b0 = to_accumulate(below[at0]), b1 = to_accumulate(below[at1]), b2 = to_accumulate(below[at2]);
    const T a0 = to_accumulate(above[at0]), a1 = to_accumulate(above[at1]), a2 = to_accumulate(above[at2]);
    for (; y < height; ++y) {
      const Position<T> py = position<T>(y, map.h, y_scale);
      if (py.below > k) break;
      const T v0 = mix(b0, a0, py.weight), v1 = mix(b1, a1, py.weight), v2 = mix(b2, a2, py.weight);
      pixel.row(image, y);
      T sum = T(0);
      for (int64_t x = x0; x < x1; ++x) {  // columns j-1 and j
        const T t = position<T>(x, map.w, x_scale).weight;
        sum += t * pixel(image, channel, y, x, mix(v0, v1, t));
      }
      for (int64_t x = x1; x < x2; ++x) {  // columns j and j+1; beyond the last, j alone
        const T t = position<T>(x, map.w, x_scale).weight;
        const T g = pixel(image, channel, y, x, mix(v1, v2, t));
        sum += last_column ? g : (T(1) - t) * g;
      }
      own += last ? sum : (T(1) - py.weight) * sum;
      next += py.weight * sum;
    }
    if (k >= first_row) to[k * gradient.y_stride] = from_accumulate<S>(own * factor);
    own = next;
    next = T(0);
  }
}

template <typename S, typename Pixel>
cudaError_t launch_upsample_gradient(const Grid& grid, const Grid& gradient, const Pixel& pixel, int64_t height, int64_t width,
                                     bool channels_inner, const void* grad_loss, const void* weight, cudaStream_t stream) {
  using T = typename Accumulate<S>::type;
  const int64_t chunks = ceil_div(grid.height, kGridRows), threads = grid.images * chunks * grid.classes * grid.width;
  if (threads == 0) return cudaSuccess;
  upsample_gradient_kernel<S, Pixel><<<static_cast<unsigned>(ceil_div(threads, kThreads)), kThreads, 0, stream>>>(
      Map<S>(grid), Map<S>(gradient), pixel, height, width, chunks, threads, channels_inner, static_cast<const T*>(grad_loss),
      static_cast<const T*>(weight));
  return cudaGetLastError();
}

}  // namespace reclip::cuda
