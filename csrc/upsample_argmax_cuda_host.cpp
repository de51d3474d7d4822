// upsample_argmax on CUDA: checks and launch.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/host.h"

namespace reclip::cuda {
namespace {

constexpr const char* kOp = "upsample_argmax";

at::Tensor upsample_argmax(const at::Tensor& logits, int64_t height, int64_t width) {
  check_tensor(kOp, "logits", logits, 4, c10::DeviceType::CUDA);
  TORCH_CHECK_VALUE(logits.size(1) > 0 && logits.size(2) > 0 && logits.size(3) > 0, kOp,
                    ": `logits` must have classes and a grid, got shape ", logits.sizes());
  TORCH_CHECK_VALUE(height > 0 && width > 0, kOp, ": `size` must be (H,W) with both at least 1, got (", height, ", ", width, ")");
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor labels = at::empty({logits.size(0), height, width}, logits.options().dtype(at::kLong).memory_format(std::nullopt));
  C10_CUDA_CHECK(launch_upsample_argmax(grid(logits), height, width, labels.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream()));
  return labels;
}

}  // namespace
}  // namespace reclip::cuda

TORCH_LIBRARY_IMPL(reclip_d2, CUDA, m) { m.impl("upsample_argmax", reclip::cuda::upsample_argmax); }
