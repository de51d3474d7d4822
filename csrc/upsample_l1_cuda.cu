// upsample_l1: a thread takes a column of kStrip rows of pixels through a chunk of the channels; the gradient gathers, see
// cuda/bilinear.cuh.
#include "cuda/bilinear.cuh"

namespace reclip::cuda {
namespace {

constexpr int kStrip = 8;
constexpr int kChannels = 128;

template <typename S, typename R>
__global__ void __launch_bounds__(kThreads)
    upsample_l1_kernel(Map<S> student, Map<R> teacher, const bool* valid, int64_t height, int64_t width, int64_t strips,
                       int64_t columns, int64_t chunks, double* partial) {
  using T = typename Accumulate<S>::type;
  int64_t task = blockIdx.x;
  const int64_t chunk = task % chunks;
  task /= chunks;
  const int64_t x = task % columns * kThreads + threadIdx.x;
  task /= columns;
  const int64_t strip = task % strips, image = task / strips;
  double total = 0, count = 0;
  if (x < width) {
    const T s_scale = static_cast<T>(student.h) / static_cast<T>(height), t_scale = static_cast<T>(teacher.h) / static_cast<T>(height);
    const Position<T> s_px = position<T>(x, student.w, static_cast<T>(student.w) / static_cast<T>(width));
    const Position<T> t_px = position<T>(x, teacher.w, static_cast<T>(teacher.w) / static_cast<T>(width));
    Position<T> s_py[kStrip], t_py[kStrip];
    bool s_fresh[kStrip], t_fresh[kStrip], counts[kStrip];
    T sum[kStrip];
#pragma unroll
    for (int q = 0; q < kStrip; ++q) {
      const int64_t y = strip * kStrip + q;
      counts[q] = y < height && valid[(image * height + y) * width + x];
      count += counts[q] ? 1 : 0;
      s_py[q] = position<T>(y < height ? y : height - 1, student.h, s_scale);
      t_py[q] = position<T>(y < height ? y : height - 1, teacher.h, t_scale);
      s_fresh[q] = q == 0 || s_py[q].below != s_py[q > 0 ? q - 1 : 0].below;
      t_fresh[q] = q == 0 || t_py[q].below != t_py[q > 0 ? q - 1 : 0].below;
      sum[q] = T(0);
    }
    const int last = static_cast<int>((chunk + 1) * kChannels < student.classes ? (chunk + 1) * kChannels : student.classes);
    for (int c = static_cast<int>(chunk * kChannels); c < last; ++c) {
      Column<S> of_student(student, image, c, s_px);
      Column<R> of_teacher(teacher, image, c, t_px);
#pragma unroll
      for (int q = 0; q < kStrip; ++q) {
        const T d = of_student.at(s_py[q], s_fresh[q]) - of_teacher.at(t_py[q], t_fresh[q]);
        sum[q] += d < T(0) ? -d : d;
      }
    }
#pragma unroll
    for (int q = 0; q < kStrip; ++q) total += counts[q] ? static_cast<double>(sum[q]) : 0.0;
  }
  total = sum_threads<0>(total);
  count = sum_threads<1>(chunk == 0 ? count : 0.0);
  if (threadIdx.x != 0) return;
  partial[2 * static_cast<int64_t>(blockIdx.x)] = total;
  partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = count;
}

// sign(student - teacher) at valid pixels.
template <typename R>
struct Sign {
  using T = typename Accumulate<R>::type;
  Map<R> teacher;
  const bool* valid;
  int64_t height, width;
  Position<T> py;

  __device__ __forceinline__ void row(int64_t, int64_t y) {
    py = position<T>(y, teacher.h, static_cast<T>(teacher.h) / static_cast<T>(height));
  }
  __device__ __forceinline__ T operator()(int64_t image, int channel, int64_t y, int64_t x, T value) const {
    if (!valid[(image * height + y) * width + x]) return T(0);
    const Position<T> px = position<T>(x, teacher.w, static_cast<T>(teacher.w) / static_cast<T>(width));
    const R* from = teacher.data + image * teacher.image_stride + channel * teacher.class_stride;
    const R* below = from + py.below * teacher.y_stride;
    const R* above = from + py.above * teacher.y_stride;
    const int64_t left = px.below * teacher.x_stride, right = px.above * teacher.x_stride;
    const T v0 = mix(to_accumulate(below[left]), to_accumulate(above[left]), py.weight);
    const T v1 = mix(to_accumulate(below[right]), to_accumulate(above[right]), py.weight);
    const T d = value - mix(v0, v1, px.weight);
    return d > T(0) ? T(1) : d < T(0) ? T(-1) : T(0);
  }
};

// call(tag of the student's element type, tag of the teacher's): float64 does not mix with the others.
template <typename Call>
cudaError_t dispatch_pair(ElementType student, ElementType teacher, const Call& call) {
  return dispatch(student, [&](auto s) {
    using S = typename decltype(s)::type;
    if constexpr (sizeof(S) == 8) return call(s, s);
    else
      return dispatch(teacher, [&](auto r) {
        using R = typename decltype(r)::type;
        if constexpr (sizeof(R) == 8) return cudaErrorInvalidValue;
        else return call(s, r);
      });
  });
}

}  // namespace

int64_t upsample_l1_blocks(int64_t channels, int64_t height, int64_t width) {
  return ceil_div(height, kStrip) * ceil_div(width, kThreads) * ceil_div(channels, kChannels);
}

cudaError_t launch_upsample_l1(const Grid& student, const Grid& teacher, const bool* valid, int64_t height, int64_t width,
                               double* partial, cudaStream_t stream) {
  const int64_t blocks = student.images * upsample_l1_blocks(student.classes, height, width);
  if (blocks == 0) return cudaSuccess;
  return dispatch_pair(student.type, teacher.type, [&](auto s, auto r) {
    using S = typename decltype(s)::type;
    using R = typename decltype(r)::type;
    upsample_l1_kernel<S, R><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        Map<S>(student), Map<R>(teacher), valid, height, width, ceil_div(height, kStrip), ceil_div(width, kThreads),
        ceil_div(student.classes, kChannels), partial);
    return cudaGetLastError();
  });
}

cudaError_t launch_upsample_l1_backward(const Grid& student, const Grid& teacher, const bool* valid, int64_t height, int64_t width,
                                        const void* grad_loss, const void* weight, const Grid& gradient, cudaStream_t stream) {
  return dispatch_pair(student.type, teacher.type, [&](auto s, auto r) {
    using S = typename decltype(s)::type;
    using R = typename decltype(r)::type;
    const Sign<R> sign{Map<R>(teacher), valid, height, width, {}};
    // Neighbouring threads read neighbouring elements of the teacher, which is read at every pixel.
    const bool channels_inner = teacher.class_stride < teacher.x_stride;
    return launch_upsample_gradient<S>(student, gradient, sign, height, width, channels_inner, grad_loss, weight, stream);
  });
}

}  // namespace reclip::cuda
