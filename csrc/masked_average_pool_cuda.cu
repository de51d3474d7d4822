// Kernels of masked_average_pool alone: copy the masks of the hypothesis rows from and to (B, n, C) tensors. The pooling is in
// cuda/pooling.cu and cuda/pooling_gradient.cu, shared with rectify_and_pool.
#include "cuda/device.cuh"

namespace reclip::cuda {
namespace {

template <typename S>
__global__ void gather_rows_kernel(const S* masks, int64_t image_stride, int64_t patch_stride, int64_t class_stride,
                                   DeviceRows rows, int64_t patches, bool nan_to_zero, typename Accumulate<S>::type* weights) {
  using T = typename Accumulate<S>::type;
  const int64_t image = blockIdx.x;
  for (int64_t r = rows.offsets[image] + blockIdx.y; r < rows.offsets[image + 1]; r += gridDim.y)
    for (int64_t i = threadIdx.x; i < patches; i += blockDim.x) {
      const T value = to_accumulate(masks[image * image_stride + i * patch_stride + rows.class_of_row[r] * class_stride]);
      weights[r * patches + i] = nan_to_zero && value != value ? T(0) : value;
    }
}

template <typename S>
__global__ void scatter_rows_kernel(const typename Accumulate<S>::type* row_gradient, DeviceRows rows, int64_t patches, S* masks,
                                    int64_t image_stride, int64_t patch_stride, int64_t class_stride) {
  const int64_t image = blockIdx.x;
  for (int64_t r = rows.offsets[image] + blockIdx.y; r < rows.offsets[image + 1]; r += gridDim.y)
    for (int64_t i = threadIdx.x; i < patches; i += blockDim.x)
      masks[image * image_stride + i * patch_stride + rows.class_of_row[r] * class_stride] =
          from_accumulate<S>(row_gradient[r * patches + i]);
}

}  // namespace

cudaError_t launch_gather_rows(Batch masks, const DeviceRows& rows, int64_t patches, bool nan_to_zero, void* weights,
                               cudaStream_t stream) {
  if (rows.most_rows * patches == 0) return cudaSuccess;
  return dispatch(masks.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const dim3 blocks(static_cast<unsigned>(rows.images), static_cast<unsigned>(rows.most_rows < 64 ? rows.most_rows : 64));
    gather_rows_kernel<S><<<blocks, 256, 0, stream>>>(static_cast<const S*>(masks.data), masks.image_stride, masks.patch_stride,
                                                      masks.column_stride, rows, patches, nan_to_zero, static_cast<T*>(weights));
    return cudaGetLastError();
  });
}

cudaError_t launch_scatter_rows(const void* row_gradient, const DeviceRows& rows, int64_t patches, Batch grad_masks,
                                cudaStream_t stream) {
  if (rows.most_rows * patches == 0) return cudaSuccess;
  return dispatch(grad_masks.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const dim3 blocks(static_cast<unsigned>(rows.images), static_cast<unsigned>(rows.most_rows < 64 ? rows.most_rows : 64));
    scatter_rows_kernel<S><<<blocks, 256, 0, stream>>>(static_cast<const T*>(row_gradient), rows, patches,
                                                       static_cast<S*>(const_cast<void*>(grad_masks.data)), grad_masks.image_stride,
                                                       grad_masks.patch_stride, grad_masks.column_stride);
    return cudaGetLastError();
  });
}

}  // namespace reclip::cuda
