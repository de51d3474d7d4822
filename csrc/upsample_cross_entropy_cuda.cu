// upsample_cross_entropy: a thread takes a column of kStrip rows of pixels through all classes, with a running maximum and the sum of
// the exponentials below it. The gradient: see cuda/upsample_gradient.cuh.
#include "cuda/strips.cuh"
#include "cuda/upsample_gradient.cuh"

namespace reclip::cuda {
namespace {

// Exact to the last bits, unlike exp_fast: the loss is compared with PyTorch's.
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

template <typename S>
__global__ void __launch_bounds__(kThreads)
    upsample_cross_entropy_kernel(Map<S> logits, const int64_t* labels, int64_t images, int64_t height, int64_t width, unsigned strips,
                                  unsigned columns, typename Accumulate<S>::type* normalizer, double* partial) {
  using T = typename Accumulate<S>::type;
  __shared__ StripRow<T> rows[kStrip];
  const unsigned line = blockIdx.x / columns;
  const int64_t x = static_cast<int64_t>(blockIdx.x % columns) * kThreads + threadIdx.x, strip = line % strips, image = line / strips;
  find_rows(logits, strip, height, rows);
  __syncthreads();
  double loss = 0, count = 0;
  if (x < width) {
    StripColumn<S> column(logits, image, 0, x, width, rows);
    const S *const first_left = column.left, *const first_right = column.right;
    T top[kStrip], sum[kStrip];
#pragma unroll
    for (int q = 0; q < kStrip; ++q) {
      top[q] = lowest<T>();
      sum[q] = T(0);
    }
    for (int c = 0; c < logits.classes; ++c, column.next_channel()) {
#pragma unroll
      for (int q = 0; q < kStrip; ++q) {
        column.enter(q);
        // The smaller one of the largest score so far and this one counts relative to the larger one.
        const T value = column.at(q), d = value - top[q], share = exp_of(-abs_of(d));
        sum[q] = d > T(0) ? multiply_add(sum[q], share, T(1)) : sum[q] + share;
        sum[q] = multiply_add(value, T(0), sum[q]);  // NaN from a score that is not finite
        top[q] = max_of(top[q], value);
      }
    }
    for (int q = 0; q < kStrip; ++q) {
      const int64_t y = strip * kStrip + q;
      if (y >= height) continue;
      const int64_t at = (image * height + y) * width + x, label = labels[at];
      const bool counts = label != -1, known = label >= 0 && label < logits.classes;
      normalizer[at] = counts ? top[q] : T(0);
      normalizer[images * height * width + at] = counts ? T(1) / sum[q] : T(0);
      if (!counts) continue;
      const int64_t to_class = (known ? label : 0) * logits.class_stride;
      const Ramp<T> chosen =
          read_ramp(first_left + to_class, first_right + to_class, rows[q].below, rows[q].above, column.x_weight);
      const T relative = known ? chosen.at(rows[q].weight) - top[q] : not_a_number<T>();
      loss += log(static_cast<double>(sum[q])) - static_cast<double>(relative);
      count += 1;
    }
  }
  loss = sum_threads<0>(loss);
  count = sum_threads<1>(count);
  if (threadIdx.x != 0) return;
  partial[2 * static_cast<int64_t>(blockIdx.x)] = loss;
  partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = count;
}

// softmax - one-hot at pixels with a label.
template <typename T>
struct Residual {
  struct Row {
    T weight;
  };
  using Column = Row;
  const int64_t* labels;
  const T* top;
  const T* inverse;
  int64_t height, width;
  // Of the thread: its channel, the first pixel of its image and of the row of cells, and the next pixel.
  int channel;
  int64_t image_at, cells_at;
  const int64_t* label_at;
  const T *top_at, *inverse_at;

  __device__ __forceinline__ Row row(int, T weight) const { return {weight}; }
  __device__ __forceinline__ Column column(int, T weight) const { return {weight}; }
  __device__ __forceinline__ void start(int64_t image, int of_channel) { image_at = image * height * width, channel = of_channel; }
  __device__ __forceinline__ void cells_from(int y) { cells_at = image_at + y * width; }
  __device__ __forceinline__ void enter(int x, const Column&) {
    const int64_t at = cells_at + x;
    label_at = labels + at;
    top_at = top + at;
    inverse_at = inverse + at;
  }
  __device__ __forceinline__ T operator()(const Row&, T value) {
    const int64_t label = *label_at;
    const T probability = exp_of(value - *top_at) * *inverse_at;
    label_at += width;
    top_at += width;
    inverse_at += width;
    return label == -1 ? T(0) : probability - (label == channel ? T(1) : T(0));
  }
};

}  // namespace

int64_t upsample_cross_entropy_blocks(int64_t height, int64_t width) { return ceil_div(height, kStrip) * ceil_div(width, kThreads); }

cudaError_t launch_upsample_cross_entropy(const Grid& logits, const int64_t* labels, int64_t height, int64_t width, void* normalizer,
                                          double* partial, cudaStream_t stream) {
  const int64_t blocks = logits.images * upsample_cross_entropy_blocks(height, width);
  if (blocks == 0) return cudaSuccess;
  return dispatch(logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    upsample_cross_entropy_kernel<S><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        Map<S>(logits), labels, logits.images, height, width, static_cast<unsigned>(ceil_div(height, kStrip)),
        static_cast<unsigned>(ceil_div(width, kThreads)), static_cast<T*>(normalizer), partial);
    return cudaGetLastError();
  });
}

cudaError_t launch_upsample_cross_entropy_backward(const Grid& logits, const int64_t* labels, int64_t height, int64_t width,
                                                   const void* normalizer, const void* grad_loss, const void* weight,
                                                   const Grid& gradient, cudaStream_t stream) {
  return dispatch(logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const T* top = static_cast<const T*>(normalizer);
    const Residual<T> residual{labels, top, top + logits.images * height * width, height, width};
    return launch_upsample_gradient<S>(logits, gradient, residual, height, width, grad_loss, weight, stream);
  });
}

}  // namespace reclip::cuda
