// upsample_cross_entropy: a thread takes a column of kStrip rows of pixels through all classes, twice: for the largest score,
// then for the sum of the exponentials. The gradient gathers, see cuda/bilinear.cuh.
#include "cuda/bilinear.cuh"

namespace reclip::cuda {
namespace {

constexpr int kStrip = 8;

// Exact to the last bits, unlike exp_fast: the loss is compared with PyTorch's.
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

template <typename S>
__global__ void __launch_bounds__(kThreads)
    upsample_cross_entropy_kernel(Map<S> logits, const int64_t* labels, int64_t images, int64_t height, int64_t width, int64_t strips,
                                  int64_t columns, typename Accumulate<S>::type* normalizer, double* partial) {
  using T = typename Accumulate<S>::type;
  const int64_t x = blockIdx.x % columns * kThreads + threadIdx.x, strip = blockIdx.x / columns % strips;
  const int64_t image = blockIdx.x / columns / strips;
  double loss = 0, count = 0;
  if (x < width) {
    const T y_scale = static_cast<T>(logits.h) / static_cast<T>(height);
    const Position<T> px = position<T>(x, logits.w, static_cast<T>(logits.w) / static_cast<T>(width));
    Position<T> py[kStrip];
    bool fresh[kStrip];
    int64_t label[kStrip];
    T top[kStrip], sum[kStrip], chosen[kStrip], nonfinite[kStrip];
#pragma unroll
    for (int q = 0; q < kStrip; ++q) {
      const int64_t y = strip * kStrip + q;
      label[q] = y < height ? labels[(image * height + y) * width + x] : -1;
      py[q] = position<T>(y < height ? y : height - 1, logits.h, y_scale);
      fresh[q] = q == 0 || py[q].below != py[q > 0 ? q - 1 : 0].below;
      top[q] = lowest<T>();
      sum[q] = nonfinite[q] = T(0);
      chosen[q] = not_a_number<T>();  // stays if the label is no class
    }
    for (int c = 0; c < logits.classes; ++c) {
      Column<S> column(logits, image, c, px);
#pragma unroll
      for (int q = 0; q < kStrip; ++q) {
        const T value = column.at(py[q], fresh[q]);
        nonfinite[q] += value * T(0);
        top[q] = max_of(top[q], value);
        chosen[q] = label[q] == c ? value : chosen[q];
      }
    }
    for (int c = 0; c < logits.classes; ++c) {
      Column<S> column(logits, image, c, px);
#pragma unroll
      for (int q = 0; q < kStrip; ++q) sum[q] += exp_of(column.at(py[q], fresh[q]) - top[q]);
    }
#pragma unroll
    for (int q = 0; q < kStrip; ++q) {
      const int64_t y = strip * kStrip + q;
      if (y >= height) continue;
      const int64_t at = (image * height + y) * width + x;
      const bool counts = label[q] != -1;
      normalizer[at] = counts ? top[q] : T(0);
      normalizer[images * height * width + at] = counts ? T(1) / sum[q] : T(0);
      if (!counts) continue;
      loss += log(static_cast<double>(sum[q])) - static_cast<double>(chosen[q] - top[q]) + static_cast<double>(nonfinite[q]);
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
  const int64_t* labels;
  const T* top;
  const T* inverse;
  int64_t height, width;

  __device__ __forceinline__ void row(int64_t, int64_t) {}
  __device__ __forceinline__ T operator()(int64_t image, int channel, int64_t y, int64_t x, T value) const {
    const int64_t at = (image * height + y) * width + x, label = labels[at];
    if (label == -1) return T(0);
    return exp_of(value - top[at]) * inverse[at] - (label == channel ? T(1) : T(0));
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
        Map<S>(logits), labels, logits.images, height, width, ceil_div(height, kStrip), ceil_div(width, kThreads),
        static_cast<T*>(normalizer), partial);
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
    // Neighbouring threads are classes of one pixel: they read the same label and normaliser.
    return launch_upsample_gradient<S>(logits, gradient, residual, height, width, true, grad_loss, weight, stream);
  });
}

}  // namespace reclip::cuda
