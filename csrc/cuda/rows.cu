// Tables of the hypothesis rows, made on the device: the host need not know the rows, so that a CUDA graph may contain them.
#include "device.cuh"

namespace reclip::cuda {
namespace {

constexpr int kRowThreads = 128;

// Class ids and offsets in device memory, or within the launch itself.
struct StoredRows {
  const int64_t *class_ids, *offsets;
  __device__ __forceinline__ int64_t class_of(int64_t row) const { return class_ids[row]; }
  __device__ __forceinline__ int64_t offset(int64_t image) const { return offsets[image]; }
};
struct SentRows {
  FewRows few;
  int64_t rows;
  __device__ __forceinline__ int64_t class_of(int64_t row) const { return few.value[row]; }
  __device__ __forceinline__ int64_t offset(int64_t image) const { return few.value[rows + image]; }
};

// One block per image. The first row of a class keeps it; another row of the same class, or an id that is no class, is invalid.
template <typename Source>
__global__ void __launch_bounds__(kRowThreads) rows_table_kernel(const Source from, int64_t images, int64_t rows, int64_t classes, RowTables to) {
  const int64_t image = blockIdx.x;
  constexpr int kRowWarps = kRowThreads / 32;
  __shared__ int32_t falling[kRowWarps];  // as a warp has seen it
  if (threadIdx.x < kRowWarps) falling[threadIdx.x] = threadIdx.x == 0 && (from.offset(0) != 0 || from.offset(images) > rows);
  __syncthreads();
  for (int64_t b = threadIdx.x; b < images; b += kRowThreads)
    if (from.offset(b) > from.offset(b + 1)) atomicOr(&falling[threadIdx.x / 32], 1);
  __syncthreads();
  bool rising = true;
#pragma unroll
  for (int w = 0; w < kRowWarps; ++w) rising = rising && falling[w] == 0;
  const int64_t begin = rising ? from.offset(image) : 0, end = rising ? from.offset(image + 1) : 0;
  if (threadIdx.x == 0) {
    to.offsets[image] = static_cast<int32_t>(begin);
    to.bad[image] = to.bad_patches[image] = 0;
    if (image == images - 1) {
      to.offsets[images] = static_cast<int32_t>(end);
      to.bad[images] = rising ? 0 : 1;
    }
  }
  int32_t* own = to.row_of_class + image * classes;
  for (int64_t c = threadIdx.x; c < classes; c += kRowThreads) own[c] = -1;
  if (image == images - 1)
    for (int64_t r = end + threadIdx.x; r < rows; r += kRowThreads) to.image_of_row[r] = -1;
  __syncthreads();
  for (int64_t r = begin + threadIdx.x; r < end; r += kRowThreads) {
    const int64_t k = from.class_of(r);
    bool valid = k >= 0 && k < classes;
    for (int64_t q = begin; q < r && valid; ++q) valid = from.class_of(q) != k;
    to.class_of_row[r] = valid ? static_cast<int32_t>(k) : 0;
    to.image_of_row[r] = static_cast<int32_t>(image);
    to.counts[r] = 0;
    if (valid) own[k] = static_cast<int32_t>(r - begin);
    else atomicOr(to.bad + image, 1);
  }
}

// One block per image; if the offsets are invalid, the blocks share all rows.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) poison_rows_kernel(DeviceRows rows, T* total, T* area) {
  const bool all = rows.bad[rows.images] != 0;
  if (!all && rows.bad[blockIdx.x] == 0) return;
  const int64_t begin = all ? blockIdx.x * rows.rows / rows.images : rows.offsets[blockIdx.x];
  const int64_t end = all ? (blockIdx.x + int64_t(1)) * rows.rows / rows.images : rows.offsets[blockIdx.x + 1];
  for (int64_t r = begin + threadIdx.x; r < end; r += kRowThreads) total[r] = area[r] = not_a_number<T>();
}

}  // namespace

cudaError_t launch_rows_table(const int64_t* class_ids, const int64_t* offsets, int64_t images, int64_t rows, int64_t classes,
                              const RowTables& to, cudaStream_t stream) {
  if (images == 0) return cudaSuccess;
  rows_table_kernel<StoredRows><<<static_cast<unsigned>(images), kRowThreads, 0, stream>>>(StoredRows{class_ids, offsets}, images, rows, classes, to);
  return cudaGetLastError();
}

cudaError_t launch_rows_table(const FewRows& few, int64_t images, int64_t rows, int64_t classes, const RowTables& to, cudaStream_t stream) {
  if (images == 0) return cudaSuccess;
  rows_table_kernel<SentRows><<<static_cast<unsigned>(images), kRowThreads, 0, stream>>>(SentRows{few, rows}, images, rows, classes, to);
  return cudaGetLastError();
}

cudaError_t launch_poison_rows(const DeviceRows& rows, bool is_double, void* total, void* area, cudaStream_t stream) {
  if (!rows.bad || rows.images == 0) return cudaSuccess;
  return dispatch_accumulate(is_double, [&](auto tag) {
    using T = typename decltype(tag)::type;
    poison_rows_kernel<T><<<static_cast<unsigned>(rows.images), kRowThreads, 0, stream>>>(rows, static_cast<T*>(total),
                                                                                        static_cast<T*>(area));
    return cudaGetLastError();
  });
}

}  // namespace reclip::cuda
