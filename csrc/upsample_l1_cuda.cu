// upsample_l1: a thread takes a column of kStrip rows of pixels through a chunk of the channels; the gradient: see
// cuda/upsample_gradient.cuh.
#include "cuda/strips.cuh"
#include "cuda/upsample_gradient.cuh"

namespace reclip::cuda {
namespace {

constexpr int kChannels = 128;

template <typename S, typename R>
__global__ void __launch_bounds__(kThreads)
    upsample_l1_kernel(Map<S> student, Map<R> teacher, const bool* valid, int64_t height, int64_t width, unsigned strips,
                       unsigned columns, unsigned chunks, double* partial) {
  using T = typename Accumulate<S>::type;
  __shared__ StripRow<T> student_rows[kStrip], teacher_rows[kStrip];
  const unsigned chunk = blockIdx.x % chunks, place = blockIdx.x / chunks, line = place / columns;
  const int64_t x = static_cast<int64_t>(place % columns) * kThreads + threadIdx.x, strip = line % strips, image = line / strips;
  find_rows(student, strip, height, student_rows);
  find_rows(teacher, strip, height, teacher_rows);
  __syncthreads();
  double total = 0, count = 0;
  if (x < width) {
    const int first = static_cast<int>(chunk) * kChannels;
    const int last = first + kChannels < student.classes ? first + kChannels : student.classes;
    StripColumn<S> of_student(student, image, first, x, width, student_rows);
    StripColumn<R> of_teacher(teacher, image, first, x, width, teacher_rows);
    T sum[kStrip];
#pragma unroll
    for (int q = 0; q < kStrip; ++q) sum[q] = T(0);
    const unsigned fresh = of_student.fresh | of_teacher.fresh;
    for (int c = first; c < last; ++c, of_student.next_channel(), of_teacher.next_channel())
#pragma unroll
      for (int q = 0; q < kStrip; ++q) {
        if (fresh >> q & 1u) {
          of_student.enter(q);
          of_teacher.enter(q);
        }
        sum[q] += abs_of(of_student.at(q) - of_teacher.at(q));
      }
#pragma unroll
    for (int q = 0; q < kStrip; ++q) {
      const int64_t y = strip * kStrip + q;
      if (y >= height || !valid[(image * height + y) * width + x]) continue;
      total += static_cast<double>(sum[q]);
      count += 1;
    }
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
  struct Row {
    T weight, teacher_weight;
    int fresh;             // whether the teacher's grid rows are others than those of the row before
    int64_t below, above;  // their offsets
  };
  struct Column {
    T weight, teacher_weight;
    int64_t left, right;
  };
  Map<R> teacher;
  const bool* valid;
  int64_t height, width;
  T y_scale, x_scale;  // of the teacher
  // Of the thread: its channel, the first pixel of its image and of the row of cells, the next pixel, and the teacher's values there.
  const R *from, *left, *right;
  const bool *valid_image, *valid_cells, *valid_at;
  bool entered;
  T x_weight;
  Ramp<T> ramp;

  __device__ __forceinline__ Row row(int y, T weight) const {
    const Position<T> p = position<T>(y, teacher.h, y_scale);
    const bool fresh = y > 0 && position<T>(y - 1, teacher.h, y_scale).below != p.below;
    return {weight, p.weight, fresh, p.below * teacher.y_stride, p.above * teacher.y_stride};
  }
  __device__ __forceinline__ Column column(int x, T weight) const {
    const Position<T> p = position<T>(x, teacher.w, x_scale);
    return {weight, p.weight, p.below * teacher.x_stride, p.above * teacher.x_stride};
  }
  __device__ __forceinline__ void start(int64_t image, int channel) {
    from = teacher.data + image * teacher.image_stride + channel * teacher.class_stride;
    valid_image = valid + image * height * width;
  }
  __device__ __forceinline__ void cells_from(int y) { valid_cells = valid_image + y * width; }
  __device__ __forceinline__ void enter(int x, const Column& column) {
    valid_at = valid_cells + x;
    left = from + column.left;
    right = from + column.right;
    x_weight = column.teacher_weight;
    entered = true;
  }
  __device__ __forceinline__ T operator()(const Row& row, T value) {
    if (entered || row.fresh) ramp = read_ramp(left, right, row.below, row.above, x_weight);
    entered = false;
    const bool counts = *valid_at;
    valid_at += width;
    const T other = ramp.at(row.teacher_weight);
    return static_cast<T>(counts && value > other) - static_cast<T>(counts && value < other);
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
        Map<S>(student), Map<R>(teacher), valid, height, width, static_cast<unsigned>(ceil_div(height, kStrip)),
        static_cast<unsigned>(ceil_div(width, kThreads)), static_cast<unsigned>(ceil_div(student.classes, kChannels)), partial);
    return cudaGetLastError();
  });
}

cudaError_t launch_upsample_l1_backward(const Grid& student, const Grid& teacher, const bool* valid, int64_t height, int64_t width,
                                        const void* grad_loss, const void* weight, const Grid& gradient, cudaStream_t stream) {
  return dispatch_pair(student.type, teacher.type, [&](auto s, auto r) {
    using S = typename decltype(s)::type;
    using R = typename decltype(r)::type;
    using T = typename Accumulate<S>::type;
    const T y_scale = scale_of<T>(teacher.height, height), x_scale = scale_of<T>(teacher.width, width);
    const Sign<R> sign{Map<R>(teacher), valid, height, width, y_scale, x_scale};
    return launch_upsample_gradient<S>(student, gradient, sign, height, width, grad_loss, weight, stream);
  });
}

}  // namespace reclip::cuda
