// Strips: kStrip rows of pixels, of which a thread takes one column.
#pragma once

#include "bilinear.cuh"

namespace reclip::cuda {

constexpr int kStrip = 8;

// Where a row of pixels lies on a map's grid.
template <typename T>
struct StripRow {
  int64_t below, above;  // offsets of the grid rows
  T weight;
  int fresh;  // whether the grid rows are others than those of the row before
};

// Rows of strip number `strip` for one of the block's maps; those beyond the last repeat it. By the first kStrip threads.
template <typename S, typename T>
__device__ __forceinline__ void find_rows(const Map<S>& map, int64_t strip, int64_t height, StripRow<T>* rows) {
  const int q = threadIdx.x;
  if (q >= kStrip) return;
  const T scale = scale_of<T>(map.h, height);
  const auto place = [&](int64_t y) { return position<T>(y < height ? y : height - 1, map.h, scale); };
  const Position<T> p = place(strip * kStrip + q);
  const bool fresh = q == 0 || p.below != place(strip * kStrip + q - 1).below;
  rows[q] = {p.below * map.y_stride, p.above * map.y_stride, p.weight, fresh};
}

// A thread's column of kStrip pixels on a map: values of one channel after the other.
template <typename S>
struct StripColumn {
  using T = typename Accumulate<S>::type;
  const StripRow<T>* rows;
  const S *left, *right;  // the grid columns of the channel
  int64_t class_stride;
  T x_weight, y_weight[kStrip];
  unsigned fresh = 0;  // bit q: of row q
  Ramp<T> ramp;

  __device__ __forceinline__ StripColumn(const Map<S>& map, int64_t image, int channel, int64_t x, int64_t width,
                                         const StripRow<T>* of_rows)
      : rows(of_rows), class_stride(map.class_stride) {
    const Position<T> px = position<T>(x, map.w, scale_of<T>(map.w, width));
    const S* from = map.data + image * map.image_stride + channel * map.class_stride;
    left = from + px.below * map.x_stride;
    right = from + px.above * map.x_stride;
    x_weight = px.weight;
#pragma unroll
    for (int q = 0; q < kStrip; ++q) {
      y_weight[q] = rows[q].weight;
      fresh |= rows[q].fresh ? 1u << q : 0u;
    }
  }
  __device__ __forceinline__ void next_channel() { left += class_stride, right += class_stride; }
  // To be called for each row in turn, at least for those that are fresh; at(q) is the value in row q then.
  __device__ __forceinline__ void enter(int q) {
    if (fresh >> q & 1u) ramp = read_ramp(left, right, rows[q].below, rows[q].above, x_weight);
  }
  __device__ __forceinline__ T at(int q) const { return ramp.at(y_weight[q]); }
};

}  // namespace reclip::cuda
