// upsample_argmax. Maps that grow at least eightfold: see cuda/argmax_tiles.cuh. Others: a thread takes a column of kStrip output
// rows through all classes; rows between the same two grid lines share the four corner scores and their horizontal blends.
#include "cuda/argmax_tiles.cuh"

namespace reclip::cuda {
namespace {

constexpr int kStrip = 8;
constexpr int kColumns = 128;

template <typename S>
__global__ void __launch_bounds__(kColumns)
    upsample_argmax_kernel(const S* logits, int64_t image_stride, int64_t class_stride, int64_t y_stride, int64_t x_stride,
                           int classes, int h, int w, int64_t height, int64_t width, int64_t strips, int64_t columns,
                           int64_t* labels) {
  using T = typename Accumulate<S>::type;
  const int64_t column_tile = blockIdx.x % columns, strip = blockIdx.x / columns % strips, image = blockIdx.x / columns / strips;
  const int64_t x = column_tile * kColumns + threadIdx.x;
  if (x >= width) return;
  const T y_scale = static_cast<T>(h) / static_cast<T>(height);
  const Position<T> px = position<T>(x, w, static_cast<T>(w) / static_cast<T>(width));
  const S* from = logits + image * image_stride;
  const S* left = from + px.below * x_stride;
  const S* right = from + px.above * x_stride;

  Position<T> py[kStrip];
  T best[kStrip];
  int label[kStrip];
#pragma unroll
  for (int q = 0; q < kStrip; ++q) {
    py[q] = position<T>(strip * kStrip + q < height ? strip * kStrip + q : height - 1, h, y_scale);
    best[q] = lowest<T>();
    label[q] = 0;
  }
  // A run: consecutive rows q with the same py[q].below.
  int done = 0;
  while (done < kStrip) {
    int below = 0, above = 0, end = done;
#pragma unroll
    for (int q = 0; q < kStrip; ++q) {
      if (q == done) {
        below = py[q].below;
        above = py[q].above;
      }
      if (q >= done && py[q].below == below && end == q) end = q + 1;
    }
    const int64_t y0 = below * y_stride, y1 = above * y_stride;
    T nonfinite = T(0);
    for (int c = 0; c < classes; ++c) {
      const int64_t at = c * class_stride;
      const T v00 = to_accumulate(left[at + y0]), v01 = to_accumulate(right[at + y0]);
      const T v10 = to_accumulate(left[at + y1]), v11 = to_accumulate(right[at + y1]);
      const T top = (T(1) - px.weight) * v00 + px.weight * v01;
      const T bottom = (T(1) - px.weight) * v10 + px.weight * v11;
      nonfinite += top * T(0) + bottom * T(0);
#pragma unroll
      for (int q = 0; q < kStrip; ++q) {
        if (q < done || q >= end) continue;
        const T value = (T(1) - py[q].weight) * top + py[q].weight * bottom;
        const bool larger = value > best[q];
        best[q] = larger ? value : best[q];
        label[q] = larger ? c : label[q];
      }
    }
    if (!(nonfinite == T(0))) {
#pragma unroll
      for (int q = 0; q < kStrip; ++q)
        if (q >= done && q < end) label[q] = -1;
    }
    done = end;
  }
#pragma unroll
  for (int q = 0; q < kStrip; ++q) {
    const int64_t y = strip * kStrip + q;
    if (y < height) labels[(image * height + y) * width + x] = label[q];
  }
}

}  // namespace

cudaError_t launch_upsample_argmax(const Grid& grid, int64_t height, int64_t width, int64_t* labels, cudaStream_t stream) {
  const bool tiles = tiles_apply(grid.height, height) && tiles_apply(grid.width, width);
  const int64_t strips = ceil_div(height, tiles ? kTileSide : kStrip), columns = ceil_div(width, tiles ? kTiles * kTileSide : kColumns);
  if (grid.images * strips * columns == 0) return cudaSuccess;
  return dispatch(grid.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    if (tiles) {
      argmax_tiles_kernel<S><<<static_cast<unsigned>(grid.images * strips * columns), kTileThreads, 0, stream>>>(
          Map<S>(grid), static_cast<int>(height), static_cast<int>(width), scale_of<T>(grid.height, height),
          scale_of<T>(grid.width, width), static_cast<unsigned>(strips), static_cast<unsigned>(columns), labels);
      return cudaGetLastError();
    }
    upsample_argmax_kernel<S><<<static_cast<unsigned>(grid.images * strips * columns), kColumns, 0, stream>>>(
        static_cast<const S*>(grid.data), grid.image_stride, grid.class_stride, grid.y_stride, grid.x_stride,
        static_cast<int>(grid.classes), static_cast<int>(grid.height), static_cast<int>(grid.width), height, width, strips, columns,
        labels);
    return cudaGetLastError();
  });
}

}  // namespace reclip::cuda
