// Means over an image's pixels from the partial sums of blocks.
#include "bilinear.cuh"

namespace reclip::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) image_means_kernel(const double* partial, int64_t blocks, T* loss, T* weight) {
  const double* own = partial + blockIdx.x * blocks * 2;
  double sum = 0, count = 0;
  for (int64_t k = threadIdx.x; k < blocks; k += kThreads) {
    sum += own[2 * k];
    count += own[2 * k + 1];
  }
  sum = sum_threads<0>(sum);
  count = sum_threads<1>(count);
  if (threadIdx.x != 0) return;
  count = count > 1 ? count : 1;
  loss[blockIdx.x] = static_cast<T>(sum / count);
  weight[blockIdx.x] = T(1) / static_cast<T>(count);
}

}  // namespace

cudaError_t launch_image_means(const double* partial, int64_t images, int64_t blocks, bool is_double, void* loss, void* weight,
                               cudaStream_t stream) {
  if (images == 0) return cudaSuccess;
  return dispatch_accumulate(is_double, [&](auto tag) {
    using T = typename decltype(tag)::type;
    image_means_kernel<T><<<static_cast<unsigned>(images), kThreads, 0, stream>>>(partial, blocks, static_cast<T*>(loss),
                                                                                 static_cast<T*>(weight));
    return cudaGetLastError();
  });
}

}  // namespace reclip::cuda
