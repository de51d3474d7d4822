// masked_average_pool on the CPU: reads the masks of the hypothesis classes only.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "checks.h"
#include "cpu/drive.h"

namespace reclip::cpu {
namespace {

constexpr const char* kOp = "masked_average_pool";

Hypothesis check(const at::Tensor& features, const at::Tensor& masks, const at::Tensor& class_ids, const at::Tensor& offsets) {
  check_tensor(kOp, "features", features, 3, c10::DeviceType::CPU);
  check_tensor(kOp, "masks", masks, 3, c10::DeviceType::CPU);
  check_patches(kOp, "masks", masks, features);
  return read_hypothesis(kOp, class_ids, offsets, masks.size(0), masks.size(2));
}

Strided class_of(const at::Tensor& masks, int64_t b, int64_t i, int64_t class_id) {
  Strided at = patches_of(masks, b, i);
  at.data = static_cast<const char*>(at.data) + class_id * masks.stride(2) * masks.element_size();
  return at;
}

template <typename T>
void forward(const Hypothesis& rows, const at::Tensor& features, const at::Tensor& masks, T* pooled, T* area) {
  const int64_t n = masks.size(1);
  const TileOps<T>& ops = tile_ops<T>(element_type(masks));
  const auto weights = scratch<T>(rows.rows * n);
  at::parallel_for(0, rows.images, 1, [&](int64_t begin, int64_t end) {
    T tile[kTileMax];
    for (int64_t b = begin; b < end; ++b)
      for (int64_t r = rows.offsets[b]; r < rows.offsets[b + 1]; ++r)
        for (int64_t i = 0; i < n; i += kTileMax) {
          const int count = static_cast<int>(std::min<int64_t>(kTileMax, n - i));
          ops.load(class_of(masks, b, i, rows.class_ids[r]), count, kTileMax, 1, tile);
          std::copy_n(tile, count, weights.get() + r * n + i);
        }
  });
  sum_weights<T>(weights.get(), rows.used, n, area);
  pool_weighted<T>(weights.get(), rows, features, area, pooled);
}

template <typename T>
void backward(const Hypothesis& rows, const at::Tensor& features, const at::Tensor& masks, const RowGradient<T>& gradient,
              const at::Tensor& grad_features, const at::Tensor& grad_masks) {
  const int64_t n = masks.size(1), width = features.size(2);
  const Tiling tiling(n, 0);
  const TileOps<T>& mask_ops = tile_ops<T>(element_type(masks));
  const TileOps<T>& feature_ops = tile_ops<T>(element_type(features));
  at::parallel_for(0, rows.images * tiling.per_image, 1, [&](int64_t begin, int64_t end) {
    const auto tile = scratch<T>(rows.most_rows * tiling.ld);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiling.per_image, i = tiling.first(task % tiling.per_image);
      const int count = tiling.count(task % tiling.per_image);
      const int64_t first = rows.offsets[b], row_count = rows.count(b);
      const T* weight = gradient.weight.get() + first * width;
      if (grad_masks.numel() > 0) {
        feature_ops.dots(patches_of(features, b, i).data, features.stride(1), count, tiling.ld, weight, row_count, width,
                         tile.get());
        for (int64_t r = 0; r < row_count; ++r) {
          T* own = tile.get() + r * tiling.ld;
          gradient.finish(first + r, own, count);
          mask_ops.store(own, count, tiling.ld, 1, class_of(grad_masks, b, i, rows.class_ids[first + r]));
        }
      }
      if (grad_features.numel() > 0) {
        for (int64_t r = 0; r < row_count; ++r) {
          T* own = tile.get() + r * tiling.ld;
          mask_ops.load(class_of(masks, b, i, rows.class_ids[first + r]), count, tiling.ld, 1, own);
          for (int k = 0; k < count; ++k) own[k] = std::isnan(own[k]) ? T(0) : own[k];
        }
        void* to = const_cast<void*>(patches_of(grad_features, b, i).data);
        feature_ops.spread(tile.get(), tiling.ld, row_count, weight, count, width, to, grad_features.stride(1));
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor> masked_average_pool(const at::Tensor& features, const at::Tensor& masks,
                                                       const at::Tensor& class_ids, const at::Tensor& offsets) {
  const Hypothesis rows = check(features, masks, class_ids, offsets);
  const at::ScalarType type = accumulate_type(features.scalar_type());
  at::Tensor pooled = at::zeros({rows.rows, features.size(2)}, features.options().dtype(type));
  at::Tensor area = at::zeros({rows.rows}, pooled.options());
  if (rows.rows > 0 && masks.size(1) > 0) {
    const at::Tensor z = rows_of(features);
    if (type == at::kDouble) forward<double>(rows, z, masks, pooled.mutable_data_ptr<double>(), area.mutable_data_ptr<double>());
    else forward<float>(rows, z, masks, pooled.mutable_data_ptr<float>(), area.mutable_data_ptr<float>());
  }
  return {pooled, area};
}

std::tuple<at::Tensor, at::Tensor> masked_average_pool_backward(const at::Tensor& grad_pooled, const at::Tensor& grad_area,
                                                                const at::Tensor& features, const at::Tensor& masks,
                                                                const at::Tensor& class_ids, const at::Tensor& offsets,
                                                                const at::Tensor& pooled, const at::Tensor& area,
                                                                bool need_features, bool need_masks) {
  const Hypothesis rows = check(features, masks, class_ids, offsets);
  const at::ScalarType type = accumulate_type(features.scalar_type());
  const int64_t k = rows.rows, d = features.size(2);
  check_saved(kOp, "grad_pooled", grad_pooled, {k, d}, type, features);
  check_saved(kOp, "grad_area", grad_area, {k}, type, features);
  check_saved(kOp, "pooled", pooled, {k, d}, type, features);
  check_saved(kOp, "area", area, {k}, type, features);
  const at::Tensor grad_features = at::empty(need_features ? features.sizes() : c10::IntArrayRef({0}), features.options());
  const at::Tensor grad_masks = need_masks ? at::zeros_like(masks) : at::empty({0}, masks.options());
  const at::Tensor z = rows_of(features);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const RowGradient<T> gradient(grad_pooled.contiguous(), grad_area.contiguous(), pooled.contiguous(), area.contiguous(),
                                  /*of_shares=*/false);
    backward<T>(rows, z, masks, gradient, grad_features, grad_masks);
  };
  if (type == at::kDouble) run(double{});
  else run(float{});
  return {grad_features, grad_masks};
}

}  // namespace
}  // namespace reclip::cpu

TORCH_LIBRARY_IMPL(reclip_d2, CPU, m) {
  m.impl("masked_average_pool", reclip::cpu::masked_average_pool);
  m.impl("masked_average_pool_backward", reclip::cpu::masked_average_pool_backward);
}
