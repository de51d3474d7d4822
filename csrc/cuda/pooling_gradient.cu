// Gradients of the pooling, for rectify_and_pool and masked_average_pool.
#include "product.cuh"

namespace reclip::cuda {
namespace {

// The product with the pooled row is summed like the products with the features in row_gradient_kernel, one fused term after
// the other, so that the two cancel exactly where they should, as with a single patch, whose feature is the pooled row.
template <typename T>
__global__ void __launch_bounds__(128)
    pooling_gradient_kernel(const T* grad_pooled, const T* grad_area, const T* pooled, const T* area, int64_t width, T* weight,
                            T* shift, T* of_area, T* log_area) {
  __shared__ T weights[128], values[128];
  const int64_t row = blockIdx.x;
  const T a = area[row], divisor = log_area ? T(1) : a;
  T along = T(0);
  for (int64_t first = 0; first < width; first += 128) {
    const int64_t at = row * width + first + threadIdx.x;
    const bool inside = first + threadIdx.x < width;
    weights[threadIdx.x] = inside && a > T(0) ? grad_pooled[at] / divisor : T(0);
    values[threadIdx.x] = inside && a > T(0) ? pooled[at] : T(0);
    if (inside) weight[at] = weights[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0)
      for (int k = 0; k < 128; ++k) along = multiply_add(weights[k], values[k], along);
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  shift[row] = -along;
  const T given = grad_area ? grad_area[row] : T(0);
  of_area[row] = log_area && a > T(0) ? given * a : given;
  if (log_area) log_area[row] = a > T(0) ? log_positive(a) : T(0);
}

// LaneColumns: patches a lane; fewer give more blocks.
template <typename S, int Vector, int LaneColumns>
__global__ void __launch_bounds__(kProductThreads)
    row_gradient_kernel(const typename Accumulate<S>::type* weight, const typename Accumulate<S>::type* shift,
                        const typename Accumulate<S>::type* of_area, DeviceRows rows, const S* features, int64_t image_stride,
                        int64_t patch_stride, int64_t patches, int64_t width, int64_t tiles, int64_t row_tiles,
                        typename Accumulate<S>::type* row_gradient) {
  using T = typename Accumulate<S>::type;
  const int64_t tile = blockIdx.x % tiles, row_tile = blockIdx.x / tiles % row_tiles, image = blockIdx.x / tiles / row_tiles;
  const int64_t first_row = rows.offsets[image], image_rows = rows.offsets[image + 1] - first_row;
  const int64_t row0 = row_tile * kProductRows, column0 = tile * 32 * LaneColumns;
  if (row0 >= image_rows) return;
  T sum[8][LaneColumns] = {};
  tile_product<T, true, Vector, S, true, Vector>({weight + first_row * width, 1, width, width, image_rows},
                                                 {features + image * image_stride, 1, patch_stride, width, patches}, row0, column0,
                                                 sum);
  const int64_t r0 = row0 + threadIdx.x / 32 * 8, i0 = column0 + threadIdx.x % 32 * LaneColumns;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    if (r0 + r >= image_rows) break;
    const T offset = shift[first_row + r0 + r], area_part = of_area[first_row + r0 + r];
#pragma unroll
    for (int c = 0; c < LaneColumns; ++c)
      if (i0 + c < patches) row_gradient[(first_row + r0 + r) * patches + i0 + c] = (sum[r][c] + offset) + area_part;
  }
}

// One block per patch: the gradient of a hard-masked feature is its row's weight.
template <typename S>
__global__ void __launch_bounds__(128) feature_gradient_hard_kernel(const int32_t* row, const typename Accumulate<S>::type* weight,
                                                                    DeviceRows rows, int64_t patches, int64_t width, S* out) {
  using T = typename Accumulate<S>::type;
  const int64_t at = blockIdx.x;
  const int32_t own = row[at];
  const T* from = weight + (rows.offsets[at / patches] + (own >= 0 ? own : 0)) * width;
  for (int64_t d = threadIdx.x; d < width; d += 128) out[at * width + d] = from_accumulate<S>(own >= 0 ? from[d] : T(0));
}

template <typename S, int Vector>
__global__ void __launch_bounds__(kProductThreads)
    feature_gradient_soft_kernel(const typename Accumulate<S>::type* weights, const typename Accumulate<S>::type* weight,
                                 DeviceRows rows, int64_t patches, int64_t width, int64_t slices, int64_t tiles, S* out) {
  using T = typename Accumulate<S>::type;
  const int64_t slice = blockIdx.x % slices, tile = blockIdx.x / slices % tiles, image = blockIdx.x / slices / tiles;
  const int64_t first_row = rows.offsets[image], image_rows = rows.offsets[image + 1] - first_row;
  T sum[8][4] = {};
  if (image_rows > 0)
    tile_product<T, false, 1, T, false, Vector>({weights + first_row * patches, patches, 1, image_rows, patches},
                                                {weight + first_row * width, width, 1, image_rows, width}, tile * kProductRows,
                                                slice * kProductColumns, sum);
  const int64_t i0 = tile * kProductRows + threadIdx.x / 32 * 8, c0 = slice * kProductColumns + threadIdx.x % 32 * 4;
#pragma unroll
  for (int r = 0; r < 8; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (i0 + r < patches && c0 + c < width) out[(image * patches + i0 + r) * width + c0 + c] = from_accumulate<S>(sum[r][c]);
}

}  // namespace

cudaError_t launch_pooling_gradient(const void* grad_pooled, const void* grad_area, const void* pooled, const void* area,
                                    int64_t rows, int64_t width, bool is_double, void* weight, void* shift, void* of_area,
                                    void* log_area, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return dispatch_accumulate(is_double, [&](auto tag) {
    using T = typename decltype(tag)::type;
    pooling_gradient_kernel<T><<<static_cast<unsigned>(rows), 128, 0, stream>>>(
        static_cast<const T*>(grad_pooled), static_cast<const T*>(grad_area), static_cast<const T*>(pooled),
        static_cast<const T*>(area), width, static_cast<T*>(weight), static_cast<T*>(shift), static_cast<T*>(of_area),
        static_cast<T*>(log_area));
    return cudaGetLastError();
  });
}

cudaError_t launch_row_gradient(const void* weight, const void* shift, const void* of_area, const DeviceRows& rows,
                                Batch features, int64_t patches, int64_t width, void* row_gradient, cudaStream_t stream) {
  if (rows.most_rows * patches == 0) return cudaSuccess;
  const int64_t row_tiles = ceil_div(rows.most_rows, kProductRows), wide = ceil_div(patches, kProductColumns);
  const bool narrow = rows.images * row_tiles * wide < 528;  // too few blocks to fill a large GPU
  const int64_t tiles = narrow ? ceil_div(patches, 32) : wide;
  return dispatch(features.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const S* z = static_cast<const S*>(features.data);
    const auto launch = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(rows.images * row_tiles * tiles), kProductThreads, 0, stream>>>(
          static_cast<const T*>(weight), static_cast<const T*>(shift), static_cast<const T*>(of_area), rows, z,
          features.image_stride, features.patch_stride, patches, width, tiles, row_tiles, static_cast<T*>(row_gradient));
      return cudaGetLastError();
    };
    if (in_packs(z, features.image_stride, features.patch_stride, width))
      return narrow ? launch(row_gradient_kernel<S, 4, 1>) : launch(row_gradient_kernel<S, 4, 4>);
    return narrow ? launch(row_gradient_kernel<S, 1, 1>) : launch(row_gradient_kernel<S, 1, 4>);
  });
}

cudaError_t launch_feature_gradient_hard(const int32_t* row, const void* weight, const DeviceRows& rows, int64_t patches,
                                         int64_t width, Batch grad_features, cudaStream_t stream) {
  if (rows.images * patches * width == 0) return cudaSuccess;
  return dispatch(grad_features.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    feature_gradient_hard_kernel<S><<<static_cast<unsigned>(rows.images * patches), 128, 0, stream>>>(
        row, static_cast<const T*>(weight), rows, patches, width, static_cast<S*>(const_cast<void*>(grad_features.data)));
    return cudaGetLastError();
  });
}

cudaError_t launch_feature_gradient_soft(const void* weights, const void* weight, const DeviceRows& rows, int64_t patches,
                                         int64_t width, Batch grad_features, cudaStream_t stream) {
  if (rows.images * patches * width == 0) return cudaSuccess;
  const int64_t slices = ceil_div(width, kProductColumns), tiles = ceil_div(patches, kProductRows);
  return dispatch(grad_features.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const auto launch = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(rows.images * slices * tiles), kProductThreads, 0, stream>>>(
          static_cast<const T*>(weights), static_cast<const T*>(weight), rows, patches, width, slices, tiles,
          static_cast<S*>(const_cast<void*>(grad_features.data)));
      return cudaGetLastError();
    };
    return width % 4 == 0 ? launch(feature_gradient_soft_kernel<S, 4>) : launch(feature_gradient_soft_kernel<S, 1>);
  });
}

}  // namespace reclip::cuda
