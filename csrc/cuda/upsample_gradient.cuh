// The gradient of a grid from that of its upsampled pixels.
#pragma once

#include "bilinear.cuh"

namespace reclip::cuda {

constexpr int kGradientCells = 8;                             // between grid columns, side by side in a warp
constexpr int kGradientChannels = kThreads / kGradientCells;  // of a block
constexpr int kGridRows = 8;                                  // of a block
constexpr int64_t kTableBytes = 44 * 1024;                    // at most, of shared memory

// A thread takes the cells of one channel between two grid columns, cell by cell down kGridRows grid rows, then the next
// kGradientCells columns. Each pixel is evaluated once (twice at the seams of the row chunks). A cell's sums belong to its four
// grid points: those of the rows meet in the thread, those of the right column go to the neighbour. Nothing is added in
// an order that depends on timing.
//
// `Pixel` has Row and Column: what is known of a row or column of pixels, with its `weight` between the grid lines; row(y, weight)
// and column(x, weight) make them. For the thread's image and channel: start(image, channel), cells_from(y) before pixels of which
// y is the first row, enter(x, column) before those of a column, and pixel(row, value) for each in turn, the gradient of the
// interpolated value. kTable: the rows of the block, at most max_rows, and the columns of a tile are kept in shared memory.
template <typename S, typename Pixel, bool kTable>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 4 : 6)
    upsample_gradient_kernel(Map<S> map, Map<S> gradient, Pixel of_pixels, int height, int width,
                             typename Accumulate<S>::type y_scale, typename Accumulate<S>::type x_scale, int64_t max_rows,
                             unsigned row_chunks, unsigned channel_chunks, const typename Accumulate<S>::type* grad_loss,
                             const typename Accumulate<S>::type* weight) {
  using T = typename Accumulate<S>::type;
  using Row = typename Pixel::Row;
  using Column = typename Pixel::Column;
  extern __shared__ __align__(16) unsigned char memory[];
  Row* const rows = reinterpret_cast<Row*>(memory);
  Column* const columns = reinterpret_cast<Column*>(rows + max_rows);
  __shared__ T carried[2][kGridRows][kGradientChannels];  // from the columns before, for the first of these
  const auto make_row = [&](int y) { return of_pixels.row(y, position<T>(y, map.h, y_scale).weight); };
  const auto make_column = [&](int x) { return of_pixels.column(x, position<T>(x, map.w, x_scale).weight); };

  const unsigned row_chunk = blockIdx.x % row_chunks, channel_chunk = blockIdx.x / row_chunks % channel_chunks;
  const int64_t image = blockIdx.x / row_chunks / channel_chunks;
  const int slot = threadIdx.x / kGradientCells;
  const int cell = kGradientCells - 1 - threadIdx.x % kGradientCells;  // the lane after has the cell to the left
  const bool active = static_cast<int>(channel_chunk) * kGradientChannels + slot < map.classes;
  const int channel = active ? static_cast<int>(channel_chunk) * kGradientChannels + slot : map.classes - 1;
  const int first_row = static_cast<int>(row_chunk) * kGridRows;
  const int last_row = first_row + kGridRows < map.h ? first_row + kGridRows : map.h;
  const int halo_row = first_row > 0 ? first_row - 1 : 0;
  const int first_y = first_at<T>(halo_row, map.h, height, y_scale), end_y = first_at<T>(last_row, map.h, height, y_scale);
  if constexpr (kTable)
    for (int y = first_y + threadIdx.x; y < end_y; y += kThreads) rows[y - first_y] = make_row(y);
  const T factor = grad_loss[image] * weight[image];
  const S* from = map.data + image * map.image_stride + channel * map.class_stride;
  S* to = const_cast<S*>(gradient.data) + image * gradient.image_stride + channel * gradient.class_stride;
  Pixel pixel = of_pixels;
  pixel.start(image, channel);

  for (int tile = 0; tile * kGradientCells < map.w; ++tile) {
    const int first_x = first_at<T>(tile * kGradientCells, map.w, width, x_scale);
    if constexpr (kTable) {
      const int end_x = first_at<T>((tile + 1) * kGradientCells, map.w, width, x_scale);
      for (int x = first_x + threadIdx.x; x < end_x; x += kThreads) columns[x - first_x] = make_column(x);
    }
    __syncthreads();
    const int j = tile * kGradientCells + cell, last_column = map.w - 1;
    const int x0 = first_at<T>(j, map.w, width, x_scale), x1 = first_at<T>(j + 1, map.w, width, x_scale);
    const S* at_left = from + (j < last_column ? j : last_column) * map.x_stride;
    const S* at_right = from + (j + 1 < last_column ? j + 1 : last_column) * map.x_stride;
    T below_left = to_accumulate(at_left[halo_row * map.y_stride]), below_right = to_accumulate(at_right[halo_row * map.y_stride]);
    T own_left = T(0), own_right = T(0);
    int y0 = first_y;
    for (int k = halo_row; k < last_row; ++k) {
      const int64_t next_row = (k + 1 < map.h ? k + 1 : k) * map.y_stride;
      const T above_left = to_accumulate(at_left[next_row]), above_right = to_accumulate(at_right[next_row]);
      T next_left = T(0), next_right = T(0);
      const int y1 = first_at<T>(k + 1, map.h, height, y_scale);
      pixel.cells_from(y0);
      const Column* next_column = columns + (x0 - first_x);
      for (int x = x0; x < x1; ++x) {
        const Column column = kTable ? *next_column++ : make_column(x);
        const Ramp<T> ramp(below_left, below_right, above_left, above_right, column.weight);
        pixel.enter(x, column);
        T sum = T(0), above = T(0);  // of all rows; shares of the grid row above
        const Row* next_pixels = rows + (y0 - first_y);
#pragma unroll 2
        for (int y = y0; y < y1; ++y) {
          const Row row = kTable ? *next_pixels++ : make_row(y);
          const T g = pixel(row, ramp.at(row.weight));
          sum += g;
          above = multiply_add(row.weight, g, above);
        }
        own_left = multiply_add(T(1) - column.weight, sum - above, own_left);
        own_right = multiply_add(column.weight, sum - above, own_right);
        next_left = multiply_add(T(1) - column.weight, above, next_left);
        next_right = multiply_add(column.weight, above, next_right);
      }
      y0 = y1;
      T from_left = __shfl_down_sync(0xFFFFFFFFu, own_right, 1);
      if (k >= first_row) {
        if (cell == 0) from_left = tile > 0 ? carried[(tile + 1) % 2][k - first_row][slot] : T(0);
        if (cell == kGradientCells - 1) carried[tile % 2][k - first_row][slot] = own_right;
        if (active && j < map.w)
          to[k * gradient.y_stride + j * gradient.x_stride] = from_accumulate<S>((own_left + from_left) * factor);
      }
      own_left = next_left, own_right = next_right;
      below_left = above_left, below_right = above_right;
    }
    __syncthreads();
  }
}

template <typename S, typename Pixel>
cudaError_t launch_upsample_gradient(const Grid& grid, const Grid& gradient, const Pixel& pixel, int64_t height, int64_t width,
                                     const void* grad_loss, const void* weight, cudaStream_t stream) {
  using T = typename Accumulate<S>::type;
  const int64_t row_chunks = ceil_div(grid.height, kGridRows), channel_chunks = ceil_div(grid.classes, kGradientChannels);
  const unsigned blocks = static_cast<unsigned>(grid.images * row_chunks * channel_chunks);
  if (blocks == 0) return cudaSuccess;
  // At most, for cells at the edges of the map have half as many pixels more.
  const int64_t max_rows = ceil_div((kGridRows + 2) * height, grid.height) + 1;
  const int64_t max_columns = ceil_div((kGradientCells + 1) * width, grid.width) + 1;
  const int64_t bytes = ceil_div(max_rows * static_cast<int64_t>(sizeof(typename Pixel::Row)) +
                                     max_columns * static_cast<int64_t>(sizeof(typename Pixel::Column)), 16) * 16;
  const auto launch = [&](auto kernel, int64_t shared) {
    kernel<<<blocks, kThreads, static_cast<size_t>(shared), stream>>>(
        Map<S>(grid), Map<S>(gradient), pixel, static_cast<int>(height), static_cast<int>(width), scale_of<T>(grid.height, height),
        scale_of<T>(grid.width, width), max_rows, static_cast<unsigned>(row_chunks), static_cast<unsigned>(channel_chunks),
        static_cast<const T*>(grad_loss), static_cast<const T*>(weight));
    return cudaGetLastError();
  };
  return bytes <= kTableBytes ? launch(upsample_gradient_kernel<S, Pixel, true>, bytes)
                              : launch(upsample_gradient_kernel<S, Pixel, false>, 0);
}

}  // namespace reclip::cuda
