#include "drive.h"

#include <cmath>
#include <limits>

namespace reclip::cpu {
namespace {

constexpr int64_t kBlock = 256;  // patches summed separately before they are added to the total: keeps rounding errors small

// Splits the width so that all threads have work; no sum depends on the split.
int64_t slice_width(int64_t images, int64_t width) {
  const int64_t wanted = std::max<int64_t>(1, 4 * at::get_num_threads() / std::max<int64_t>(images, 1));
  const int64_t slice = (width + wanted - 1) / wanted;
  return std::max<int64_t>(64, (slice + 63) / 64 * 64);
}

// Calls sum_block(image, first patch, count, first column, columns, sums) for each block and divides the totals.
template <typename T, typename SumBlock>
void pool_slices(const Hypothesis& rows, int64_t patches, int64_t width, T* pooled, const T* divisor, const SumBlock& sum_block) {
  const int64_t slice = slice_width(rows.images, width), slices = (width + slice - 1) / slice;
  at::parallel_for(0, rows.images * slices, 1, [&](int64_t begin, int64_t end) {
    const auto total = scratch<T>(rows.most_rows * slice), block = scratch<T>(rows.most_rows * slice);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / slices, d = task % slices * slice, columns = std::min(slice, width - d);
      const int64_t count = rows.count(b) * columns;
      std::fill_n(total.get(), count, T(0));
      for (int64_t i = 0; i < patches; i += kBlock) {
        std::fill_n(block.get(), count, T(0));
        sum_block(b, i, std::min(kBlock, patches - i), d, columns, block.get());
        for (int64_t k = 0; k < count; ++k) total[k] += block[k];
      }
      for (int64_t r = 0; r < rows.count(b); ++r) {
        const T a = divisor[rows.offsets[b] + r];
        T* to = pooled + (rows.offsets[b] + r) * width + d;
        for (int64_t k = 0; k < columns; ++k)
          to[k] = a > T(0) ? total[r * columns + k] / a : std::isnan(a) ? a : T(0);
      }
    }
  });
}

template <typename T>
T sum_row(const T* row, int64_t patches) {
  T total = 0;
  for (int64_t i = 0; i < patches; i += kBlock) {
    T block = 0;
    for (int64_t j = i; j < std::min(patches, i + kBlock); ++j) block += row[j];
    total += block;
  }
  return total;
}

// row = exp(row - max(row)); returns the maximum, or NaN if the row has one.
template <typename T>
T scale_row(T* row, int64_t patches) {
  T top = -std::numeric_limits<T>::infinity(), nonfinite = 0;
  for (int64_t i = 0; i < patches; ++i) {
    top = row[i] > top ? row[i] : top;
    nonfinite += row[i] * T(0);
  }
  tile_ops<T>(ElementType::kFloat32).exp_below(row, patches, top);
  return top + nonfinite;
}

}  // namespace

template <typename T>
void sum_weights(const T* weights, int64_t rows, int64_t patches, T* area) {
  for (int64_t r = 0; r < rows; ++r) {
    const T total = sum_row(weights + r * patches, patches);
    area[r] = total > T(0) && total < T(kSmallArea) ? T(0) : total;
  }
}

template <typename T>
void scale_log_masks(T* log_masks, int64_t rows, int64_t patches, T* total, T* area) {
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* row = log_masks + r * patches;
      const T top = scale_row(row, patches);
      total[r] = std::isnan(top) ? top : sum_row(row, patches);
      const T a = std::exp(top) * total[r];
      area[r] = a < std::numeric_limits<T>::min() ? std::numeric_limits<T>::min() : a;
    }
  });
}

template <typename T>
T log_area_of(T* log_masks, int64_t patches) {
  const T top = scale_row(log_masks, patches);
  return top + std::log(sum_row(log_masks, patches));
}

template <typename T>
void pool_weighted(const T* weights, const Hypothesis& rows, const at::Tensor& features, const T* total, T* pooled) {
  const int64_t n = features.size(1), width = features.size(2);
  const TileOps<T>& ops = tile_ops<T>(element_type(features));
  pool_slices<T>(rows, n, width, pooled, total, [&](int64_t b, int64_t i, int64_t count, int64_t d, int64_t columns, T* sums) {
    const char* from = static_cast<const char*>(patches_of(features, b, i).data) + d * ops.element_size;
    ops.accumulate(weights + rows.offsets[b] * n + i, n, rows.count(b), from, features.stride(1), static_cast<int>(count), columns,
                   sums, columns);
  });
}

template <typename T>
void pool_segments(const int32_t* row, const Hypothesis& rows, const at::Tensor& features, T* pooled, T* area) {
  const int64_t n = features.size(1), width = features.size(2);
  for (int64_t b = 0; b < rows.images; ++b) {
    T* own = area + rows.offsets[b];
    std::fill_n(own, rows.count(b), T(0));
    bool bad = false;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t r = row[b * n + i];
      if (r >= 0) own[r] += T(1);
      bad = bad || r == kBadPatch;
    }
    if (bad) std::fill_n(own, rows.count(b), std::numeric_limits<T>::quiet_NaN());
  }
  const TileOps<T>& ops = tile_ops<T>(element_type(features));
  pool_slices<T>(rows, n, width, pooled, area, [&](int64_t b, int64_t i, int64_t count, int64_t d, int64_t columns, T* sums) {
    const char* from = static_cast<const char*>(patches_of(features, b, i).data) + d * ops.element_size;
    ops.segment_sum(row + b * n + i, from, features.stride(1), static_cast<int>(count), columns, sums, columns);
  });
}

template <typename T>
RowGradient<T>::RowGradient(const at::Tensor& grad_pooled, const at::Tensor& grad_area, const at::Tensor& pooled,
                            const at::Tensor& area, bool of_shares_)
    : weight(scratch<T>(pooled.numel())), shift(scratch<T>(area.numel())), of_area(scratch<T>(area.numel())),
      log_area(scratch<T>(of_shares_ ? area.numel() : 0)), of_shares(of_shares_) {
  const int64_t rows = pooled.size(0), width = pooled.size(1);
  const T* gp = grad_pooled.const_data_ptr<T>();
  const T* ga = grad_area.const_data_ptr<T>();
  const T* p = pooled.const_data_ptr<T>();
  const T* a = area.const_data_ptr<T>();
  // The product with the pooled row is summed like the products with the features, so that the two cancel exactly where they
  // should, as with a single patch, whose feature is the pooled row.
  const TileOps<T>& ops = tile_ops<T>(element_type(pooled));
  for (int64_t r = 0; r < rows; ++r) {
    const bool used = a[r] > T(0);
    const T divisor = of_shares ? T(1) : a[r];
    for (int64_t at = r * width; at < (r + 1) * width; ++at) weight[at] = used ? gp[at] / divisor : T(0);
    T along[kTileStep] = {};
    if (used) ops.dots(p + r * width, width, 1, kTileStep, weight.get() + r * width, 1, width, along);
    shift[r] = -along[0];
    of_area[r] = of_shares && used ? ga[r] * a[r] : ga[r];
    if (of_shares) log_area[r] = used ? std::log(a[r]) : T(0);
  }
}

#define RECLIP_INSTANTIATE(T)                                                                   \
  template void sum_weights<T>(const T*, int64_t, int64_t, T*);                                 \
  template void scale_log_masks<T>(T*, int64_t, int64_t, T*, T*);                               \
  template T log_area_of<T>(T*, int64_t);                                                       \
  template void pool_weighted<T>(const T*, const Hypothesis&, const at::Tensor&, const T*, T*); \
  template void pool_segments<T>(const int32_t*, const Hypothesis&, const at::Tensor&, T*, T*); \
  template struct RowGradient<T>;
RECLIP_INSTANTIATE(float)
RECLIP_INSTANTIATE(double)
#undef RECLIP_INSTANTIATE

}  // namespace reclip::cpu
