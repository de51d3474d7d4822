// rectify_and_pool on the CPU. Masks and noise exist one tile of patches at a time.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "checks.h"
#include "cpu/drive.h"

namespace reclip::cpu {
namespace {

constexpr const char* kOp = "rectify_and_pool";
using OptionalTensor = std::optional<at::Tensor>;

struct Inputs {
  const at::Tensor& logits;
  const OptionalTensor& bias;
  const at::Tensor features;
  Hypothesis rows;
  NoiseKey key;
  double tau;
  int64_t images, patches, classes, width;

  Inputs(const at::Tensor& logits_, const OptionalTensor& bias_, const at::Tensor& features_, const at::Tensor& class_ids,
         const at::Tensor& offsets, const at::Tensor& seed, double tau_)
      : logits(logits_), bias(bias_), features((check(logits_, bias_, features_, tau_), rows_of(features_))),
        rows(read_hypothesis(kOp, class_ids, offsets, logits_.size(0), logits_.size(2))), key(read_seed(kOp, seed)), tau(tau_),
        images(logits_.size(0)), patches(logits_.size(1)), classes(logits_.size(2)), width(features_.size(2)) {}

  static void check(const at::Tensor& logits, const OptionalTensor& bias, const at::Tensor& features, double tau) {
    check_tensor(kOp, "logits", logits, 3, c10::DeviceType::CPU);
    check_tensor(kOp, "features", features, 3, c10::DeviceType::CPU);
    check_patches(kOp, "logits", logits, features);
    check_bias(kOp, bias, logits);
    check_tau(kOp, tau);
  }
};

// Scratch of one thread, and the scores of a tile.
template <typename T>
struct Workspace {
  const Inputs& in;
  const TileOps<T>& ops;
  const int ld;
  std::unique_ptr<T[]> y, noise, bad, rows;
  std::unique_ptr<int32_t[]> best;

  Workspace(const Inputs& in_, int ld_)
      : in(in_), ops(tile_ops<T>(element_type(in_.logits))), ld(ld_), y(scratch<T>(in_.classes * ld_)),
        noise(scratch<T>(in_.classes * ld_ + kNoiseSlack)), bad(scratch<T>(ld_)), best(scratch<int32_t>(ld_)) {}

  // Scratch for a tile of the hypothesis rows, allocated at the first call.
  T* own_rows() {
    if (!rows) rows = scratch<T>(in.rows.most_rows * ld);
    return rows.get();
  }

  void scores(int64_t b, int64_t i, int count) {
    const uint64_t first = static_cast<uint64_t>(b * in.patches + i) * static_cast<uint64_t>(in.classes);
    ops.scores(patches_of(in.logits, b, i), bias_of(in.bias, i), count, ld, in.classes, first, in.key, T(1.0 / in.tau),
               noise.get(), y.get(), bad.get());
  }
  bool is_bad(int i) const { return !(bad[i] == T(0)); }
};

// Calls use(workspace, image, first patch, count) with the scores of each tile of the images for which `wanted(image)` holds.
template <typename T, typename Wanted, typename Use>
void each_tile(const Inputs& in, const Wanted& wanted, const Use& use) {
  const Tiling tiling(in.patches, in.classes);
  at::parallel_for(0, in.images * tiling.per_image, 1, [&](int64_t begin, int64_t end) {
    Workspace<T> work(in, tiling.ld);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiling.per_image, tile = task % tiling.per_image, i = tiling.first(tile);
      if (in.rows.count(b) == 0 || !wanted(b)) continue;
      work.scores(b, i, tiling.count(tile));
      use(work, b, i, tiling.count(tile));
    }
  });
}

// row[b * n + i]: the row of the patch's class within its image, -1 for none, kBadPatch.
template <typename T>
void hard_rows(const Inputs& in, int32_t* row) {
  std::fill_n(row, in.images * in.patches, -1);
  each_tile<T>(in, [](int64_t) { return true; }, [&](Workspace<T>& work, int64_t b, int64_t i, int count) {
    work.ops.argmax(work.y.get(), work.ld, in.classes, work.best.get());
    for (int k = 0; k < count; ++k)
      row[b * in.patches + i + k] = work.is_bad(k) ? kBadPatch : in.rows.row_of_class[b * in.classes + work.best[k]];
  });
}

// Logarithms of the soft masks of the hypothesis rows [row][patch], NaN at bad patches; for the `wanted` images.
template <typename T, typename Wanted>
void log_masks(const Inputs& in, const Wanted& wanted, T* out) {
  each_tile<T>(in, wanted, [&](Workspace<T>& work, int64_t b, int64_t i, int count) {
    const int64_t first = in.rows.offsets[b], row_count = in.rows.count(b);
    T* rows = work.own_rows();
    work.ops.softmax(work.y.get(), work.ld, in.classes, in.rows.class_ids + first, row_count, rows);
    for (int64_t r = 0; r < row_count; ++r)
      for (int k = 0; k < count; ++k)
        out[(first + r) * in.patches + i + k] = work.is_bad(k) ? std::numeric_limits<T>::quiet_NaN() : rows[r * work.ld + k];
  });
}

template <typename T>
void forward(const Inputs& in, bool hard, T* pooled, T* area) {
  if (hard) {
    const auto row = scratch<int32_t>(in.images * in.patches);
    hard_rows<T>(in, row.get());
    pool_segments<T>(row.get(), in.rows, in.features, pooled, area);
  } else {
    const auto weights = scratch<T>(in.rows.rows * in.patches), total = scratch<T>(in.rows.rows);
    log_masks<T>(in, [](int64_t) { return true; }, weights.get());
    scale_log_masks<T>(weights.get(), in.rows.used, in.patches, total.get(), area);
    pool_weighted<T>(weights.get(), in.rows, in.features, total.get(), pooled);
  }
}

std::tuple<at::Tensor, at::Tensor> rectify_and_pool(const at::Tensor& logits, const OptionalTensor& bias,
                                                    const at::Tensor& features, const at::Tensor& class_ids,
                                                    const at::Tensor& offsets, const at::Tensor& seed, double tau, bool hard) {
  const Inputs in(logits, bias, features, class_ids, offsets, seed, tau);
  const at::ScalarType type = accumulate_type(logits.scalar_type());
  at::Tensor pooled = at::zeros({in.rows.rows, in.width}, logits.options().dtype(type));
  at::Tensor area = at::zeros({in.rows.rows}, pooled.options());
  if (in.rows.rows > 0 && in.classes > 0 && in.patches > 0) {
    if (type == at::kDouble) forward<double>(in, hard, pooled.mutable_data_ptr<double>(), area.mutable_data_ptr<double>());
    else forward<float>(in, hard, pooled.mutable_data_ptr<float>(), area.mutable_data_ptr<float>());
  }
  return {pooled, area};
}

// The backward pass computes the scores of a tile again with their normalizer: it needs none, and the one returned is zero.
std::tuple<at::Tensor, at::Tensor, at::Tensor> rectify_and_pool_forward(const at::Tensor& logits, const OptionalTensor& bias,
                                                                        const at::Tensor& features, const at::Tensor& class_ids,
                                                                        const at::Tensor& offsets, const at::Tensor& seed, double tau,
                                                                        bool hard) {
  const auto [pooled, area] = rectify_and_pool(logits, bias, features, class_ids, offsets, seed, tau, hard);
  return {pooled, area, at::zeros({2, logits.size(0), logits.size(1)}, pooled.options())};
}

// One tile of one image: gradients of its logits and features, and its share of the bias gradient.
template <typename T>
struct Backward {
  Workspace<T> work;
  const TileOps<T>& feature_ops;
  std::unique_ptr<T[]> rows, masks;

  Backward(const Inputs& in, int ld)
      : work(in, ld), feature_ops(tile_ops<T>(element_type(in.features))), rows(scratch<T>(in.rows.most_rows * ld)),
        masks(scratch<T>(in.rows.most_rows * ld)) {}

  void tile(int64_t b, int64_t i, int count, const RowGradient<T>& gradient, const at::Tensor& grad_logits,
            const at::Tensor& grad_features, T* bias_gradient) {
    const Inputs& in = work.in;
    const int ld = work.ld;
    const int64_t first = in.rows.offsets[b], row_count = in.rows.count(b);
    const bool need_logits = grad_logits.numel() > 0, need_features = grad_features.numel() > 0, hard = !gradient.of_shares;
    const T* weight = gradient.weight.get() + first * in.width;
    work.scores(b, i, count);
    if (need_features && hard) hard_masks(b, count);
    work.ops.softmax(work.y.get(), ld, in.classes, in.rows.class_ids + first, hard ? 0 : row_count, masks.get());
    if (!hard) shares(b, count, gradient.log_area.get() + first);
    if (need_features) {
      void* to = const_cast<void*>(patches_of(grad_features, b, i).data);
      feature_ops.spread(masks.get(), ld, row_count, weight, count, in.width, to, grad_features.stride(1));
    }
    if (!need_logits && !bias_gradient) return;
    feature_ops.dots(patches_of(in.features, b, i).data, in.features.stride(1), count, ld, weight, row_count, in.width,
                     rows.get());
    for (int64_t r = 0; r < row_count; ++r) {
      gradient.finish(first + r, rows.get() + r * ld, ld);
      for (int k = 0; !hard && k < ld; ++k) rows[r * ld + k] *= masks[r * ld + k];
    }
    const Strided out = need_logits ? patches_of(grad_logits, b, i) : Strided{nullptr, 0, 0};
    work.ops.logit_gradient(work.y.get(), count, ld, in.classes, rows.get(), in.rows.row_of_class.data() + b * in.classes,
                            in.rows.class_ids + first, row_count, !hard, work.bad.get(), T(1.0 / in.tau), out, bias_gradient);
  }

 private:
  void hard_masks(int64_t b, int count) {
    const Inputs& in = work.in;
    work.ops.argmax(work.y.get(), work.ld, in.classes, work.best.get());
    std::fill_n(masks.get(), in.rows.count(b) * work.ld, T(0));
    for (int k = 0; k < count; ++k) {
      const int32_t row = in.rows.row_of_class[b * in.classes + work.best[k]];
      if (row >= 0 && !work.is_bad(k)) masks[row * work.ld + k] = T(1);
    }
  }
  // From logarithms of masks, their shares of the area; 0 at bad patches.
  void shares(int64_t b, int count, const T* log_area) {
    for (int64_t r = 0; r < work.in.rows.count(b); ++r) {
      T* own = masks.get() + r * work.ld;
      work.ops.exp_below(own, work.ld, log_area[r]);
      for (int k = 0; k < count; ++k)
        if (work.is_bad(k)) own[k] = T(0);
    }
  }
};

// log_area of the rows whose area is too small to take its logarithm.
template <typename T>
void small_log_areas(const Inputs& in, const T* area, T* log_area) {
  const auto small = [&](int64_t r) { return area[r] < T(kSmallArea); };
  const auto any_small = [&](int64_t b) {
    for (int64_t r = in.rows.offsets[b]; r < in.rows.offsets[b + 1]; ++r)
      if (small(r)) return true;
    return false;
  };
  bool any = false;
  for (int64_t b = 0; b < in.images; ++b) any = any || any_small(b);
  if (!any) return;
  const auto logs = scratch<T>(in.rows.rows * in.patches);
  log_masks<T>(in, any_small, logs.get());
  for (int64_t r = 0; r < in.rows.used; ++r)
    if (small(r)) log_area[r] = log_area_of(logs.get() + r * in.patches, in.patches);
}

template <typename T>
void backward(const Inputs& in, const RowGradient<T>& gradient, const at::Tensor& grad_logits, const at::Tensor& grad_bias,
              const at::Tensor& grad_features) {
  const Tiling tiling(in.patches, in.classes);
  const bool need_bias = grad_bias.numel() > 0;
  // The bias gradient sums over the images in order, so one task then takes a tile of patches through the whole batch.
  const int64_t images_a_task = need_bias ? in.images : 1;
  const int64_t tasks = tiling.per_image * (need_bias ? 1 : in.images);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Backward<T> step(in, tiling.ld);
    const auto bias_gradient = scratch<T>(need_bias ? in.classes * tiling.ld : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task % tiling.per_image, first_image = task / tiling.per_image, i = tiling.first(tile);
      const int count = tiling.count(tile);
      if (need_bias) std::fill_n(bias_gradient.get(), in.classes * tiling.ld, T(0));
      for (int64_t b = first_image; b < first_image + images_a_task; ++b)
        if (in.rows.count(b) > 0)
          step.tile(b, i, count, gradient, grad_logits, grad_features, need_bias ? bias_gradient.get() : nullptr);
      if (need_bias) {
        const OptionalTensor out(grad_bias);
        tile_ops<T>(element_type(grad_bias)).store(bias_gradient.get(), count, tiling.ld, in.classes, bias_of(out, i));
      }
    }
  });
  for (int64_t b = 0; b < in.images; ++b) {
    if (in.rows.count(b) > 0) continue;
    if (grad_logits.numel() > 0) grad_logits.select(0, b).zero_();
    if (grad_features.numel() > 0) grad_features.select(0, b).zero_();
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rectify_and_pool_backward(
    const at::Tensor& grad_pooled, const at::Tensor& grad_area, const at::Tensor& logits, const OptionalTensor& bias,
    const at::Tensor& features, const at::Tensor& class_ids, const at::Tensor& offsets, const at::Tensor& seed,
    const at::Tensor& pooled, const at::Tensor& area, double tau, bool hard, bool need_logits, bool need_bias,
    bool need_features, const OptionalTensor& /*normalizer*/) {
  const Inputs in(logits, bias, features, class_ids, offsets, seed, tau);
  const at::ScalarType type = accumulate_type(logits.scalar_type());
  const int64_t k = in.rows.rows, d = in.width;
  check_saved(kOp, "grad_pooled", grad_pooled, {k, d}, type, logits);
  const at::Tensor of_area = grad_area.numel() > 0 ? grad_area : at::zeros({k}, pooled.options());
  check_saved(kOp, "grad_area", of_area, {k}, type, logits);
  check_saved(kOp, "pooled", pooled, {k, d}, type, logits);
  check_saved(kOp, "area", area, {k}, type, logits);
  need_bias = need_bias && bias.has_value();
  const at::Tensor grad_logits = need_logits ? at::empty_like(logits) : at::empty({0}, logits.options());
  const at::Tensor grad_bias = need_bias ? at::empty_like(*bias) : at::empty({0}, pooled.options());
  const at::Tensor grad_features = at::empty(need_features ? features.sizes() : c10::IntArrayRef({0}), features.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const at::Tensor areas = area.contiguous();
    const RowGradient<T> gradient(grad_pooled.contiguous(), of_area.contiguous(), pooled.contiguous(), areas, !hard);
    if (!hard && in.patches > 0) small_log_areas<T>(in, areas.const_data_ptr<T>(), gradient.log_area.get());
    backward<T>(in, gradient, grad_logits, grad_bias, grad_features);
  };
  if (type == at::kDouble) run(double{});
  else run(float{});
  return {grad_logits, grad_bias, grad_features};
}

}  // namespace
}  // namespace reclip::cpu

TORCH_LIBRARY_IMPL(reclip_d2, CPU, m) {
  m.impl("rectify_and_pool", reclip::cpu::rectify_and_pool);
  m.impl("rectify_and_pool_forward", reclip::cpu::rectify_and_pool_forward);
  m.impl("rectify_and_pool_backward", reclip::cpu::rectify_and_pool_backward);
}
