// upsample_cross_entropy on CUDA: checks and launches.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/host.h"

namespace reclip::cuda {
namespace {

constexpr const char* kOp = "upsample_cross_entropy";

void check(const at::Tensor& logits, const at::Tensor& labels) {
  check_upsampled(kOp, "logits", logits, "labels", labels, at::kLong, c10::DeviceType::CUDA);
  TORCH_CHECK_VALUE(labels.is_contiguous(), kOp, ": `labels` must be contiguous");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> upsample_cross_entropy(const at::Tensor& logits, const at::Tensor& labels) {
  check(logits, labels);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::ScalarType type = accumulate_type(logits.scalar_type());
  const auto options = logits.options().dtype(type).memory_format(std::nullopt);
  const int64_t images = logits.size(0), height = labels.size(1), width = labels.size(2);
  const int64_t blocks = upsample_cross_entropy_blocks(height, width);
  at::Tensor loss = at::empty({images}, options), weight = at::empty({images}, options);
  at::Tensor normalizer = at::empty({2, images, height, width}, options);
  at::Tensor partial = at::empty({images, blocks, 2}, options.dtype(at::kDouble));
  C10_CUDA_CHECK(launch_upsample_cross_entropy(grid(logits), labels.const_data_ptr<int64_t>(), height, width,
                                               normalizer.mutable_data_ptr(), partial.mutable_data_ptr<double>(), stream));
  C10_CUDA_CHECK(launch_image_means(partial.const_data_ptr<double>(), images, blocks, type == at::kDouble, loss.mutable_data_ptr(),
                                    weight.mutable_data_ptr(), stream));
  return {loss, weight, normalizer};
}

at::Tensor upsample_cross_entropy_backward(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& labels,
                                           const at::Tensor& weight, const at::Tensor& normalizer) {
  check(logits, labels);
  const at::ScalarType type = accumulate_type(logits.scalar_type());
  check_saved(kOp, "grad_loss", grad_loss, {logits.size(0)}, type, logits);
  check_saved(kOp, "weight", weight, {logits.size(0)}, type, logits);
  check_saved(kOp, "normalizer", normalizer, {2, labels.size(0), labels.size(1), labels.size(2)}, type, logits);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor grad = grad_loss.contiguous();  // the gradient of a mean is one number, expanded
  at::Tensor gradient = at::empty_like(logits);
  C10_CUDA_CHECK(launch_upsample_cross_entropy_backward(grid(logits), labels.const_data_ptr<int64_t>(), labels.size(1), labels.size(2),
                                                        normalizer.const_data_ptr(), grad.const_data_ptr(), weight.const_data_ptr(),
                                                        grid(gradient), c10::cuda::getCurrentCUDAStream()));
  return gradient;
}

}  // namespace
}  // namespace reclip::cuda

TORCH_LIBRARY_IMPL(reclip_d2, CUDA, m) {
  m.impl("upsample_cross_entropy", reclip::cuda::upsample_cross_entropy);
  m.impl("upsample_cross_entropy_backward", reclip::cuda::upsample_cross_entropy_backward);
}
