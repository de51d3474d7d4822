// Sums of features over rows of patches, for rectify_and_pool and masked_average_pool.
#include <limits>

#include "product.cuh"

namespace reclip::cuda {
namespace {

constexpr int kSlice = 128;       // columns of D that a block sums
constexpr int kPoolWarps = 4;     // each sums every fourth patch; their sums are then added in order
constexpr int kRowsAtOnce = 24;   // rows in shared memory: 48 KiB of float with 4 warps
constexpr int kUnroll = 4;        // patches in flight per warp

template <typename T>
constexpr int rows_at_once() {
  return sizeof(T) == 4 ? kRowsAtOnce : kRowsAtOnce / 2;
}

// Hard masks: each patch's feature is added to the sums of its row, in shared memory. A lane owns its columns and a warp its
// sums: no atomics. `row_tiles` blocks share the rows of an image; each reads only the features of its own rows.
template <typename S, int Vector>
__global__ void __launch_bounds__(32 * kPoolWarps)
    pool_hard_kernel(const int32_t* row, DeviceRows rows, const S* features, int64_t image_stride, int64_t patch_stride,
                     int64_t patches, int64_t width, int64_t slices, int64_t chunks, int64_t row_tiles,
                     typename Accumulate<S>::type* partial) {
  using T = typename Accumulate<S>::type;
  constexpr int kRows = rows_at_once<T>(), kColumns = 32 * Vector;
  __shared__ __align__(16) T sums[kPoolWarps][kRows][kColumns];
  const int lane = threadIdx.x, warp = threadIdx.y;
  int64_t task = blockIdx.x;
  const int64_t slice = task % slices;
  task /= slices;
  const int64_t chunk = task % chunks;
  task /= chunks;
  const int64_t row_tile = task % row_tiles, image = task / row_tiles;
  const int64_t first_row = rows.offsets[image], image_rows = rows.offsets[image + 1] - first_row;
  const int64_t tile_first = row_tile * kRows;
  if (tile_first >= image_rows) return;
  const int tile_rows = static_cast<int>(image_rows - tile_first < kRows ? image_rows - tile_first : kRows);
  for (int r = 0; r < tile_rows; ++r)
#pragma unroll
    for (int v = 0; v < Vector; ++v) sums[warp][r][lane * Vector + v] = T(0);

  const int64_t column = slice * kColumns + lane * Vector;
  const bool inside = column < width;
  const int64_t begin = chunk * patches / chunks, end = (chunk + 1) * patches / chunks;
  const S* from = features + image * image_stride + column;
  const int32_t* own_row = row + image * patches;
  for (int64_t i = begin + warp; i < end; i += kPoolWarps * kUnroll) {
    int r[kUnroll];
    Pack<S, Vector> z[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t patch = i + u * kPoolWarps;
      const int64_t in_tile = patch < end ? own_row[patch] - tile_first : -1;
      r[u] = in_tile >= 0 && in_tile < tile_rows ? static_cast<int>(in_tile) : -1;
      if (r[u] >= 0 && inside) z[u] = load_pack<S, Vector>(from + patch * patch_stride);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (r[u] < 0 || !inside) continue;
      Pack<T, Vector>* sum = reinterpret_cast<Pack<T, Vector>*>(&sums[warp][r[u]][lane * Vector]);
      Pack<T, Vector> value = *sum;
#pragma unroll
      for (int v = 0; v < Vector; ++v) value.at[v] += to_accumulate(z[u].at[v]);
      *sum = value;
    }
  }
  __syncthreads();
  T* to = partial + (chunk * rows.rows + first_row + tile_first) * width;
  for (int at = warp * 32 + lane; at < tile_rows * kColumns; at += 32 * kPoolWarps) {
    const int r = at / kColumns, c = at % kColumns;
    if (slice * kColumns + c >= width) continue;
    T total = sums[0][r][c];
#pragma unroll
    for (int w = 1; w < kPoolWarps; ++w) total += sums[w][r][c];
    to[r * width + slice * kColumns + c] = total;
  }
}

// Soft masks: sum_i weights[row][i] * features[i][d] over a chunk of patches.
template <typename S, int Vector>
__global__ void __launch_bounds__(kProductThreads)
    pool_soft_kernel(const typename Accumulate<S>::type* weights, DeviceRows rows, const S* features, int64_t image_stride,
                     int64_t patch_stride, int64_t patches, int64_t width, int64_t slices, int64_t chunks, int64_t row_tiles,
                     typename Accumulate<S>::type* partial) {
  using T = typename Accumulate<S>::type;
  int64_t task = blockIdx.x;
  const int64_t slice = task % slices;
  task /= slices;
  const int64_t chunk = task % chunks;
  task /= chunks;
  const int64_t row_tile = task % row_tiles, image = task / row_tiles;
  const int64_t first_row = rows.offsets[image], image_rows = rows.offsets[image + 1] - first_row;
  const int64_t row0 = row_tile * kProductRows, column0 = slice * kProductColumns;
  if (row0 >= image_rows) return;
  const int64_t begin = chunk * patches / chunks, depth = (chunk + 1) * patches / chunks - begin;
  T sum[8][4] = {};
  tile_product<T, true, 1, S, false, Vector>(
      {weights + first_row * patches + begin, 1, patches, depth, image_rows},
      {features + image * image_stride + begin * patch_stride, patch_stride, 1, depth, width}, row0, column0, sum);
  const int64_t r0 = row0 + threadIdx.x / 32 * 8, c0 = column0 + threadIdx.x % 32 * 4;
#pragma unroll
  for (int r = 0; r < 8; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (r0 + r < image_rows && c0 + c < width)
        partial[(chunk * rows.rows + first_row + r0 + r) * width + c0 + c] = sum[r][c];
}

// The mean of a row: its parts in order, over its area. Rows without area have no parts.
template <typename T>
__device__ __forceinline__ T mean_of_parts(const T* partial, int64_t chunks, int64_t size, int64_t at, T area) {
  if (!(area > T(0))) return area != area ? area : T(0);
  T sum = T(0);
#pragma unroll 8  // the loads of several parts are in flight at once
  for (int64_t c = 0; c < chunks; ++c) sum += partial[c * size + at];
  return sum / area;
}

template <typename T>
__global__ void pool_finish_kernel(const T* partial, const T* total, int64_t chunks, int64_t rows, int64_t width, T* pooled) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < rows * width) pooled[at] = mean_of_parts(partial, chunks, rows * width, at, total[at / width]);
}

// One block per row.
template <typename T>
__global__ void __launch_bounds__(128)
    pool_finish_hard_kernel(const T* partial, const int32_t* count, const int32_t* bad, DeviceRows rows, int64_t chunks,
                            int64_t width, T* pooled, T* area) {
  const int64_t row = blockIdx.x;
  const int32_t image = rows.image_of_row[row];
  bool valid = !rows.bad || rows.bad[rows.images] == 0;
  if (image >= 0) valid = valid && bad[image] == 0 && (!rows.bad || rows.bad[image] == 0);
  const T own = !valid ? not_a_number<T>() : image < 0 ? T(0) : static_cast<T>(count[row]);
  if (threadIdx.x == 0) area[row] = own;
  for (int64_t d = threadIdx.x; d < width; d += 128)
    pooled[row * width + d] = mean_of_parts(partial, chunks, rows.rows * width, row * width + d, own);
}

// Sum, or maximum, of a value over a block of 128 threads, in a fixed order, returned to all of them. Once per kernel.
template <typename T>
__device__ __forceinline__ T sum_block(T value) {
  __shared__ T of_warp[4];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, step);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  return of_warp[0] + of_warp[1] + of_warp[2] + of_warp[3];
}
template <typename T>
__device__ __forceinline__ T max_block(T value) {
  __shared__ T of_warp[4];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = max_of(value, __shfl_down_sync(0xFFFFFFFFu, value, step));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  return max_of(max_of(of_warp[0], of_warp[1]), max_of(of_warp[2], of_warp[3]));
}

// Whether the block's row belongs to no image.
__device__ __forceinline__ bool is_padding(const DeviceRows& rows) {
  return static_cast<int64_t>(blockIdx.x) >= rows.offsets[rows.images];
}

template <typename T>
__global__ void __launch_bounds__(128) area_of_weights_kernel(const T* weights, DeviceRows rows, int64_t patches, T* area) {
  if (is_padding(rows)) {
    if (threadIdx.x == 0) area[blockIdx.x] = T(0);
    return;
  }
  T total = T(0);
  for (int64_t i = threadIdx.x; i < patches; i += 128) total += weights[blockIdx.x * patches + i];
  total = sum_block(total);
  if (threadIdx.x == 0) area[blockIdx.x] = total > T(0) && total < T(kSmallArea) ? T(0) : total;
}

// The largest of a row's logarithms; NaN is ignored.
template <typename T>
__device__ __forceinline__ T top_of_row(const T* row, int64_t patches) {
  T top = lowest<T>();
  for (int64_t i = threadIdx.x; i < patches; i += 128) top = max_of(top, row[i]);
  return max_block(top);
}

template <typename T>
__global__ void __launch_bounds__(128) scale_log_masks_kernel(T* log_masks, DeviceRows rows, int64_t patches, T smallest, T* total, T* area) {
  if (is_padding(rows)) {
    if (threadIdx.x == 0) total[blockIdx.x] = area[blockIdx.x] = T(0);
    return;
  }
  T* row = log_masks + blockIdx.x * patches;
  const T top = top_of_row(row, patches);
  T sum = T(0);
  for (int64_t i = threadIdx.x; i < patches; i += 128) {
    const T weight = exp_fast(row[i] - top);
    row[i] = weight;
    sum += weight;
  }
  sum = sum_block(sum);
  if (threadIdx.x != 0) return;
  const T a = exp_fast(top) * sum;
  total[blockIdx.x] = sum;
  area[blockIdx.x] = a < smallest ? smallest : a;
}

template <typename T>
__global__ void __launch_bounds__(128)
    small_log_areas_kernel(const T* log_masks, const T* area, DeviceRows rows, int64_t patches, T* log_area) {
  if (is_padding(rows) || !(area[blockIdx.x] < T(kSmallArea))) return;
  const T* row = log_masks + blockIdx.x * patches;
  const T top = top_of_row(row, patches);
  T sum = T(0);
  for (int64_t i = threadIdx.x; i < patches; i += 128) sum += exp_fast(row[i] - top);
  sum = sum_block(sum);
  if (threadIdx.x == 0) log_area[blockIdx.x] = top + log_positive(sum);
}

}  // namespace

// Depends on the shapes alone, so that the order of summation is the same on every device.
int64_t pooling_chunks(int64_t images, int64_t patches, int64_t width) {
  const int64_t blocks = images * ceil_div(width, kSlice);
  const int64_t wanted = ceil_div(528, blocks > 0 ? blocks : 1), most = ceil_div(patches, 64);
  const int64_t chunks = wanted < most ? wanted : most;
  return chunks > 0 ? chunks : 1;
}

cudaError_t launch_pool_hard(const int32_t* row, const DeviceRows& rows, Batch features, int64_t patches, int64_t width,
                             void* partial, cudaStream_t stream) {
  if (rows.most_rows * width == 0) return cudaSuccess;
  const int64_t chunks = pooling_chunks(rows.images, patches, width);
  return dispatch(features.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const S* z = static_cast<const S*>(features.data);
    const int64_t row_tiles = ceil_div(rows.most_rows, rows_at_once<T>());
    const auto launch = [&](auto kernel, int vector) {
      const int64_t slices = ceil_div(width, 32 * vector), blocks = rows.images * row_tiles * chunks * slices;
      kernel<<<static_cast<unsigned>(blocks), dim3(32, kPoolWarps), 0, stream>>>(
          row, rows, z, features.image_stride, features.patch_stride, patches, width, slices, chunks, row_tiles,
          static_cast<T*>(partial));
      return cudaGetLastError();
    };
    if (in_packs(z, features.image_stride, features.patch_stride, width)) return launch(pool_hard_kernel<S, 4>, 4);
    return launch(pool_hard_kernel<S, 1>, 1);
  });
}

cudaError_t launch_pool_soft(const void* weights, const DeviceRows& rows, Batch features, int64_t patches, int64_t width,
                             void* partial, cudaStream_t stream) {
  if (rows.most_rows * width == 0) return cudaSuccess;
  const int64_t chunks = pooling_chunks(rows.images, patches, width), slices = ceil_div(width, kProductColumns);
  const int64_t row_tiles = ceil_div(rows.most_rows, kProductRows), blocks = rows.images * row_tiles * chunks * slices;
  return dispatch(features.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const S* z = static_cast<const S*>(features.data);
    const auto launch = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(blocks), kProductThreads, 0, stream>>>(
          static_cast<const T*>(weights), rows, z, features.image_stride, features.patch_stride, patches, width, slices, chunks,
          row_tiles, static_cast<T*>(partial));
      return cudaGetLastError();
    };
    if (in_packs(z, features.image_stride, features.patch_stride, width)) return launch(pool_soft_kernel<S, 4>);
    return launch(pool_soft_kernel<S, 1>);
  });
}

cudaError_t launch_area_of_weights(const void* weights, const DeviceRows& rows, int64_t patches, bool is_double, void* area,
                                   cudaStream_t stream) {
  if (rows.rows == 0) return cudaSuccess;
  return dispatch_accumulate(is_double, [&](auto tag) {
    using T = typename decltype(tag)::type;
    area_of_weights_kernel<T><<<static_cast<unsigned>(rows.rows), 128, 0, stream>>>(static_cast<const T*>(weights), rows, patches,
                                                                                   static_cast<T*>(area));
    return cudaGetLastError();
  });
}

cudaError_t launch_scale_log_masks(void* log_masks, const DeviceRows& rows, int64_t patches, bool is_double, void* total, void* area,
                                   cudaStream_t stream) {
  if (rows.rows * patches == 0) return cudaSuccess;
  return dispatch_accumulate(is_double, [&](auto tag) {
    using T = typename decltype(tag)::type;
    scale_log_masks_kernel<T><<<static_cast<unsigned>(rows.rows), 128, 0, stream>>>(
        static_cast<T*>(log_masks), rows, patches, std::numeric_limits<T>::min(), static_cast<T*>(total), static_cast<T*>(area));
    return cudaGetLastError();
  });
}

cudaError_t launch_small_log_areas(const void* log_masks, const void* area, const DeviceRows& rows, int64_t patches, bool is_double,
                                   void* log_area, cudaStream_t stream) {
  if (rows.rows * patches == 0) return cudaSuccess;
  return dispatch_accumulate(is_double, [&](auto tag) {
    using T = typename decltype(tag)::type;
    small_log_areas_kernel<T><<<static_cast<unsigned>(rows.rows), 128, 0, stream>>>(
        static_cast<const T*>(log_masks), static_cast<const T*>(area), rows, patches, static_cast<T*>(log_area));
    return cudaGetLastError();
  });
}

cudaError_t launch_pool_finish(const void* partial, const void* total, int64_t chunks, int64_t rows, int64_t width, bool is_double,
                               void* pooled, cudaStream_t stream) {
  if (rows * width == 0) return cudaSuccess;
  return dispatch_accumulate(is_double, [&](auto tag) {
    using T = typename decltype(tag)::type;
    pool_finish_kernel<T><<<static_cast<unsigned>(ceil_div(rows * width, 256)), 256, 0, stream>>>(
        static_cast<const T*>(partial), static_cast<const T*>(total), chunks, rows, width, static_cast<T*>(pooled));
    return cudaGetLastError();
  });
}

cudaError_t launch_pool_finish_hard(const void* partial, const int32_t* count, const int32_t* bad, const DeviceRows& rows,
                                    int64_t chunks, int64_t width, bool is_double, void* pooled, void* area, cudaStream_t stream) {
  if (rows.rows == 0) return cudaSuccess;
  return dispatch_accumulate(is_double, [&](auto tag) {
    using T = typename decltype(tag)::type;
    pool_finish_hard_kernel<T><<<static_cast<unsigned>(rows.rows), 128, 0, stream>>>(
        static_cast<const T*>(partial), count, bad, rows, chunks, width, static_cast<T*>(pooled), static_cast<T*>(area));
    return cudaGetLastError();
  });
}

}  // namespace reclip::cuda
