// upsample_cross_entropy on the CPU. Forward: all classes of a pixel at once, row by row, which leaves two numbers a pixel;
// backward: with those, slices of classes are independent.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>

#include "cpu/upsample.h"

namespace reclip::cpu {
namespace {

constexpr const char* kOp = "upsample_cross_entropy";

void check(const at::Tensor& logits, const at::Tensor& labels) {
  check_upsampled(kOp, "logits", logits, "labels", labels, at::kLong, c10::DeviceType::CPU);
  TORCH_CHECK_VALUE(labels.is_contiguous(), kOp, ": `labels` must be contiguous");
}

template <typename T>
void forward(const at::Tensor& logits, const at::Tensor& labels, T* loss, T* weight, T* normalizer) {
  const int64_t images = labels.size(0), height = labels.size(1), width = labels.size(2), classes = logits.size(1);
  const int64_t ld = (classes + kTileStep - 1) / kTileStep * kTileStep, pixels = images * height * width;
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const auto rows = positions<T>(logits.size(2), height), columns = positions<T>(logits.size(3), width);
  const TileOps<T>& ops = tile_ops<T>(element_type(logits));
  const int64_t parts = parts_for_threads(images, height);
  std::vector<double> sums(static_cast<size_t>(images * height));
  std::atomic<bool> known{true};
  at::parallel_for(0, images * parts, 1, [&](int64_t begin, int64_t end) {
    const auto values = scratch<T>(ld);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / parts, part = task % parts;
      Lines<T> lines(logits, image, 0, static_cast<int>(classes), static_cast<int>(ld));
      for (int64_t y = part * height / parts; y < (part + 1) * height / parts; ++y) {
        const int64_t row = image * height + y;
        const int64_t* own = label + row * width;
        if (std::any_of(own, own + width, [&](int64_t k) { return k < -1 || k >= classes; })) {
          known = false;
          return;
        }
        sums[row] = ops.cross_entropy(lines.at(rows[y]), columns.data(), own, width, classes, ld, values.get(),
                                      normalizer + row * width, normalizer + pixels + row * width);
      }
    }
  });
  TORCH_CHECK_VALUE(known, kOp, ": `labels` must be class ids in 0 .. ", classes - 1, ", or -1");
  for (int64_t b = 0; b < images; ++b) {
    const int64_t* own = label + b * height * width;
    const int64_t count = std::count_if(own, own + height * width, [](int64_t k) { return k >= 0; });
    double total = 0;
    for (int64_t y = 0; y < height; ++y) total += sums[b * height + y];
    loss[b] = static_cast<T>(total / std::max<int64_t>(count, 1));
    weight[b] = T(1) / static_cast<T>(std::max<int64_t>(count, 1));
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> upsample_cross_entropy(const at::Tensor& logits, const at::Tensor& labels) {
  check(logits, labels);
  const auto options = logits.options().dtype(accumulate_type(logits.scalar_type()));
  at::Tensor loss = at::empty({logits.size(0)}, options), weight = at::empty({logits.size(0)}, options);
  at::Tensor normalizer = at::empty({2, labels.size(0), labels.size(1), labels.size(2)}, options);
  if (logits.scalar_type() == at::kDouble)
    forward(logits, labels, loss.mutable_data_ptr<double>(), weight.mutable_data_ptr<double>(), normalizer.mutable_data_ptr<double>());
  else
    forward(logits, labels, loss.mutable_data_ptr<float>(), weight.mutable_data_ptr<float>(), normalizer.mutable_data_ptr<float>());
  return {loss, weight, normalizer};
}

template <typename T>
at::Tensor backward(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& weight,
                    const at::Tensor& normalizer) {
  const int64_t height = labels.size(1), width = labels.size(2);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const T* top = normalizer.const_data_ptr<T>();
  const T* inverse = top + labels.numel();
  const auto rows = positions<T>(logits.size(2), height), columns = positions<T>(logits.size(3), width);
  const TileOps<T>& ops = tile_ops<T>(element_type(logits));
  const at::Tensor factor = grad_loss.mul(weight);
  return upsample_gradient<T>(logits, height, factor.const_data_ptr<T>(), [&](int64_t image, int64_t first, int count, int ld) {
    return [&, image, first, ld, lines = Lines<T>(logits, image, first, count, ld)](int64_t y, T* sums) mutable {
      const int64_t at = (image * height + y) * width;
      ops.cross_entropy_gradient(lines.at(rows[y]), columns.data(), label + at, top + at, inverse + at, width, first, ld, sums);
    };
  });
}

at::Tensor upsample_cross_entropy_backward(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& labels,
                                           const at::Tensor& weight, const at::Tensor& normalizer) {
  check(logits, labels);
  const at::ScalarType type = accumulate_type(logits.scalar_type());
  check_saved(kOp, "grad_loss", grad_loss, {logits.size(0)}, type, logits);
  check_saved(kOp, "weight", weight, {logits.size(0)}, type, logits);
  check_saved(kOp, "normalizer", normalizer, {2, labels.size(0), labels.size(1), labels.size(2)}, type, logits);
  return type == at::kDouble ? backward<double>(grad_loss, logits, labels, weight, normalizer)
                             : backward<float>(grad_loss, logits, labels, weight, normalizer);
}

}  // namespace
}  // namespace reclip::cpu

TORCH_LIBRARY_IMPL(reclip_d2, CPU, m) {
  m.impl("upsample_cross_entropy", reclip::cpu::upsample_cross_entropy);
  m.impl("upsample_cross_entropy_backward", reclip::cpu::upsample_cross_entropy_backward);
}
