// Tables of the hypothesis rows, made on the device: the host need not know the rows, so that a CUDA graph may contain them.
#include "device.cuh"

namespace reclip::cuda {
namespace {

constexpr int kRowThreads = 128;

// One block per image. The first row of a class keeps it; another row of the same class, or an id that is no class, is invalid.
__global__ void __launch_bounds__(kRowThreads)
    rows_table_kernel(const int64_t* class_ids, const int64_t* offsets, int64_t images, int64_t rows, int64_t classes,
                      int32_t* class_of_row, int32_t* offsets_out, int32_t* row_of_class, int32_t* bad) {
  const int64_t image = blockIdx.x;
  bool rising = offsets[0] == 0 && offsets[images] <= rows;
  for (int64_t b = 0; b < images && rising; ++b) rising = offsets[b] <= offsets[b + 1];
  const int64_t begin = rising ? offsets[image] : 0, end = rising ? offsets[image + 1] : 0;
  if (threadIdx.x == 0) {
    offsets_out[image] = static_cast<int32_t>(begin);
    bad[image] = 0;
    if (image == images - 1) {
      offsets_out[images] = static_cast<int32_t>(end);
      bad[images] = rising ? 0 : 1;
    }
  }
  int32_t* own = row_of_class + image * classes;
  for (int64_t c = threadIdx.x; c < classes; c += kRowThreads) own[c] = -1;
  __syncthreads();
  for (int64_t r = begin + threadIdx.x; r < end; r += kRowThreads) {
    const int64_t k = class_ids[r];
    bool valid = k >= 0 && k < classes;
    for (int64_t q = begin; q < r && valid; ++q) valid = class_ids[q] != k;
    class_of_row[r] = valid ? static_cast<int32_t>(k) : 0;
    if (valid) own[k] = static_cast<int32_t>(r - begin);
    else atomicOr(bad + image, 1);
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
                              int32_t* class_of_row, int32_t* offsets_out, int32_t* row_of_class, int32_t* bad,
                              cudaStream_t stream) {
  if (images == 0) return cudaSuccess;
  rows_table_kernel<<<static_cast<unsigned>(images), kRowThreads, 0, stream>>>(class_ids, offsets, images, rows, classes,
                                                                              class_of_row, offsets_out, row_of_class, bad);
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
