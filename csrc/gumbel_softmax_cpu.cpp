// gumbel_softmax on the CPU; the backward pass recomputes noise and masks.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>

#include "checks.h"
#include "cpu/drive.h"

namespace reclip::cpu {
namespace {

constexpr const char* kOp = "gumbel_softmax";

// Calls use(ops, b, i, count, ld, y, bad) with the scores of each tile.
template <typename T, typename Use>
void each_tile(const at::Tensor& logits, NoiseKey key, double tau, const Use& use) {
  const int64_t images = logits.size(0), patches = logits.size(1), classes = logits.size(2);
  const Tiling tiling(patches, classes);
  const TileOps<T>& ops = tile_ops<T>(element_type(logits));
  at::parallel_for(0, images * tiling.per_image, 1, [&](int64_t begin, int64_t end) {
    const auto y = scratch<T>(classes * tiling.ld), noise = scratch<T>(classes * tiling.ld + kNoiseSlack);
    const auto bad = scratch<T>(tiling.ld);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiling.per_image, i = tiling.first(task % tiling.per_image);
      const int count = tiling.count(task % tiling.per_image);
      ops.scores(patches_of(logits, b, i), {nullptr, 0, 0}, count, tiling.ld, classes,
                 static_cast<uint64_t>(b * patches + i) * static_cast<uint64_t>(classes), key, T(1.0 / tau), noise.get(), y.get(),
                 bad.get());
      use(ops, b, i, count, tiling.ld, y.get(), bad.get());
    }
  });
}

template <typename T>
void forward(const at::Tensor& logits, NoiseKey key, double tau, bool hard, const at::Tensor& masks) {
  const int64_t classes = logits.size(2);
  each_tile<T>(logits, key, tau, [&](const TileOps<T>& ops, int64_t b, int64_t i, int count, int ld, T* y, const T* bad) {
    if (hard) {
      int32_t best[kTileMax];
      ops.argmax(y, ld, classes, best);
      std::fill_n(y, classes * ld, T(0));
      for (int k = 0; k < ld; ++k) y[best[k] * ld + k] = T(1);
    } else {
      ops.softmax(y, ld, classes, nullptr, 0, nullptr);
    }
    for (int k = 0; k < count; ++k)
      if (!(bad[k] == T(0)))
        for (int64_t c = 0; c < classes; ++c) y[c * ld + k] = std::numeric_limits<T>::quiet_NaN();
    ops.store(y, count, ld, classes, patches_of(masks, b, i));
  });
}

template <typename T>
void backward(const at::Tensor& grad, const at::Tensor& logits, NoiseKey key, double tau, const at::Tensor& grad_logits) {
  const int64_t classes = logits.size(2);
  each_tile<T>(logits, key, tau, [&](const TileOps<T>& ops, int64_t b, int64_t i, int count, int ld, T* y, const T* bad) {
    ops.softmax(y, ld, classes, nullptr, 0, nullptr);
    ops.dense_logit_gradient(y, count, ld, classes, patches_of(grad, b, i), bad, T(1.0 / tau), patches_of(grad_logits, b, i));
  });
}

at::Tensor gumbel_softmax(const at::Tensor& logits, const at::Tensor& seed, double tau, bool hard) {
  check_tensor(kOp, "logits", logits, 3, c10::DeviceType::CPU);
  check_tau(kOp, tau);
  const NoiseKey key = read_seed(kOp, seed);
  const at::Tensor masks = at::empty_like(logits);
  if (logits.numel() == 0) return masks;
  if (logits.scalar_type() == at::kDouble) forward<double>(logits, key, tau, hard, masks);
  else forward<float>(logits, key, tau, hard, masks);
  return masks;
}

at::Tensor gumbel_softmax_backward(const at::Tensor& grad_masks, const at::Tensor& logits, const at::Tensor& seed, double tau) {
  check_tensor(kOp, "logits", logits, 3, c10::DeviceType::CPU);
  check_tau(kOp, tau);
  check_saved(kOp, "grad_masks", grad_masks, logits.sizes(), logits.scalar_type(), logits);
  const NoiseKey key = read_seed(kOp, seed);
  const at::Tensor grad_logits = at::empty_like(logits);
  if (logits.numel() == 0) return grad_logits;
  if (logits.scalar_type() == at::kDouble) backward<double>(grad_masks, logits, key, tau, grad_logits);
  else backward<float>(grad_masks, logits, key, tau, grad_logits);
  return grad_logits;
}

}  // namespace
}  // namespace reclip::cpu

TORCH_LIBRARY_IMPL(reclip_d2, CPU, m) {
  m.impl("gumbel_softmax", reclip::cpu::gumbel_softmax);
  m.impl("gumbel_softmax_backward", reclip::cpu::gumbel_softmax_backward);
}
