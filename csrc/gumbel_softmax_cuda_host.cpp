// gumbel_softmax on CUDA: checks and launches.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cuda/host.h"

namespace reclip::cuda {
namespace {

constexpr const char* kOp = "gumbel_softmax";

at::Tensor gumbel_softmax(const at::Tensor& logits, const at::Tensor& seed, double tau, bool hard) {
  check_tensor(kOp, "logits", logits, 3, c10::DeviceType::CUDA);
  check_tau(kOp, tau);
  const ScoreInputs in = score_inputs(logits, std::nullopt, noise_source(kOp, seed, logits), tau);
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor masks = at::empty_like(logits);
  if (logits.numel() > 0)
    C10_CUDA_CHECK(launch_gumbel_softmax(in, hard, view(masks), c10::cuda::getCurrentCUDAStream()));
  return masks;
}

at::Tensor gumbel_softmax_backward(const at::Tensor& grad_masks, const at::Tensor& logits, const at::Tensor& seed, double tau) {
  check_tensor(kOp, "logits", logits, 3, c10::DeviceType::CUDA);
  check_tau(kOp, tau);
  check_saved(kOp, "grad_masks", grad_masks, logits.sizes(), logits.scalar_type(), logits);
  const ScoreInputs in = score_inputs(logits, std::nullopt, noise_source(kOp, seed, logits), tau);
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor grad_logits = at::empty_like(logits);
  if (logits.numel() > 0)
    C10_CUDA_CHECK(launch_gumbel_softmax_backward(in, view(grad_masks), view(grad_logits), c10::cuda::getCurrentCUDAStream()));
  return grad_logits;
}

}  // namespace
}  // namespace reclip::cuda

TORCH_LIBRARY_IMPL(reclip_d2, CUDA, m) {
  m.impl("gumbel_softmax", reclip::cuda::gumbel_softmax);
  m.impl("gumbel_softmax_backward", reclip::cuda::gumbel_softmax_backward);
}
