// Bilinear upsampling on the CPU, row by row: positions, blended lines of a slice of channels, and the way back.
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>

#include <vector>

#include "drive.h"

namespace reclip::cpu {

template <typename T>
std::vector<Position<T>> positions(int64_t in, int64_t out) {
  std::vector<Position<T>> result(static_cast<size_t>(out));
  const T scale = T(in) / T(out);
  for (int64_t i = 0; i < out; ++i) {
    const T source = std::max(scale * (T(i) + T(0.5)) - T(0.5), T(0));
    const int64_t below = std::min(static_cast<int64_t>(source), in - 1);
    result[i] = {below, below + (below < in - 1 ? 1 : 0), std::min(std::max(source - T(below), T(0)), T(1))};
  }
  return result;
}

// Channels in slices of at most kTileMax: a slice's lines stay in the first-level cache, and slices are independent.
struct Slices {
  int64_t channels;
  int ld;
  int64_t count;

  explicit Slices(int64_t c) : channels(c), ld(static_cast<int>(std::min<int64_t>(kTileMax, (c + kTileStep - 1) / kTileStep * kTileStep))) {
    count = (c + ld - 1) / ld;
  }
  int64_t first(int64_t slice) const { return slice * ld; }
  int width(int64_t slice) const { return static_cast<int>(std::min<int64_t>(ld, channels - slice * ld)); }
};

// A number of parts that keeps all threads busy with `tasks` of each.
inline int64_t parts_for_threads(int64_t tasks, int64_t most) {
  const int64_t wanted = (4 * at::get_num_threads() + tasks - 1) / std::max<int64_t>(tasks, 1);
  return std::min(std::max<int64_t>(wanted, 1), std::max<int64_t>(most, 1));
}

// Row y of one image's map (B, C, h, w), channels first .. first + count - 1, as elements with the columns for classes.
inline Strided line_of(const at::Tensor& map, int64_t image, int64_t first, int64_t y) {
  const char* base = static_cast<const char*>(map.const_data_ptr());
  const int64_t at = image * map.stride(0) + first * map.stride(1) + y * map.stride(2);
  return {base + at * map.element_size(), map.stride(1), map.stride(3)};
}

// Blends two grid rows of a slice of channels for rows of pixels that come in ascending order; each grid row is read once.
template <typename T>
class Lines {
 public:
  Lines(const at::Tensor& map, int64_t image, int64_t first, int count, int ld)
      : map_(map), ops_(tile_ops<T>(element_type(map))), image_(image), first_(first), count_(count), ld_(ld),
        length_(map.size(3) * ld), below_(scratch<T>(length_)), above_(scratch<T>(length_)), out_(scratch<T>(length_)) {}

  // [column * ld + channel]; lanes beyond `count` are 0.
  const T* at(const Position<T>& row) {
    if (row.below != below_row_) {
      if (row.below == above_row_) {
        std::swap(below_, above_);
        std::swap(below_row_, above_row_);
      } else {
        read(below_row_ = row.below, below_.get());
      }
    }
    if (row.above != row.below && row.above != above_row_) read(above_row_ = row.above, above_.get());
    ops_.blend(below_.get(), row.above == row.below ? below_.get() : above_.get(), row.weight, length_, out_.get());
    return out_.get();
  }

 private:
  void read(int64_t y, T* to) const { ops_.load(line_of(map_, image_, first_, y), count_, ld_, map_.size(3), to); }

  const at::Tensor& map_;
  const TileOps<T>& ops_;
  int64_t image_, first_;
  int count_, ld_;
  int64_t length_, below_row_ = -1, above_row_ = -1;
  std::unique_ptr<T[]> below_, above_, out_;
};

// The gradient of a map (B, C, h, w) from that of its upsampled rows, times factor[image]. make(image, first channel, count, ld)
// gives, for a slice of channels, a function add(y, sums) which adds the gradient of the blended line of pixel row y to `sums`.
// A part of the grid's rows is computed by one thread, in ascending order of the pixel rows that reach it: the result does
// not depend on the thread count.
template <typename T, typename Make>
at::Tensor upsample_gradient(const at::Tensor& map, int64_t height, const T* factor, const Make& make) {
  at::Tensor gradient = at::empty_like(map);
  const int64_t images = map.size(0), h = map.size(2), w = map.size(3);
  const Slices slices(map.size(1));
  const auto rows = positions<T>(h, height);
  std::vector<int64_t> start(static_cast<size_t>(h + 1), height);  // start[k]: the first pixel row at or below grid row k
  for (int64_t y = height - 1, k = h - 1; k >= 0; --k) {
    while (y >= 0 && rows[y].below >= k) --y;
    start[k] = y + 1;
  }
  const int64_t parts = parts_for_threads(images * slices.count, h);
  const TileOps<T>& ops = tile_ops<T>(element_type(map));
  at::parallel_for(0, images * slices.count * parts, 1, [&](int64_t begin, int64_t end) {
    const int ld = slices.ld;
    auto own = scratch<T>(w * ld), next = scratch<T>(w * ld), sums = scratch<T>(w * ld);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / parts / slices.count, slice = task / parts % slices.count, part = task % parts;
      const int64_t first_row = part * h / parts, last_row = (part + 1) * h / parts;
      auto add = make(image, slices.first(slice), slices.width(slice), ld);
      std::fill_n(own.get(), w * ld, T(0));
      for (int64_t k = std::max<int64_t>(first_row - 1, 0); k < last_row; ++k) {
        std::fill_n(next.get(), w * ld, T(0));
        for (int64_t y = start[k]; y < start[k + 1]; ++y) {
          std::fill_n(sums.get(), w * ld, T(0));
          add(y, sums.get());
          ops.add_scaled(sums.get(), T(1) - rows[y].weight, w * ld, own.get());
          ops.add_scaled(sums.get(), rows[y].weight, w * ld, (rows[y].above == k ? own : next).get());
        }
        if (k >= first_row) {
          for (int64_t i = 0; i < w * ld; ++i) own[i] *= factor[image];
          ops.store(own.get(), slices.width(slice), ld, w, line_of(gradient, image, slices.first(slice), k));
        }
        std::swap(own, next);
      }
    }
  });
  return gradient;
}

}  // namespace reclip::cpu
