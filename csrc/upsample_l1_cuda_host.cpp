// upsample_l1 on CUDA: checks and launches.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/host.h"

namespace reclip::cuda {
namespace {

constexpr const char* kOp = "upsample_l1";

void check(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& valid) {
  check_upsampled(kOp, "student", student, "valid", valid, at::kBool, c10::DeviceType::CUDA);
  check_upsampled(kOp, "teacher", teacher, "valid", valid, at::kBool, c10::DeviceType::CUDA);
  check_pair(kOp, "teacher", teacher, "student", student);
  TORCH_CHECK_VALUE(student.size(1) == teacher.size(1), kOp, ": `student` ", student.sizes(), " and `teacher` ", teacher.sizes(),
                    " differ in D");
  TORCH_CHECK_VALUE(valid.is_contiguous(), kOp, ": `valid` must be contiguous");
}

std::tuple<at::Tensor, at::Tensor> upsample_l1(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& valid) {
  check(student, teacher, valid);
  const c10::cuda::CUDAGuard guard(student.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::ScalarType type = accumulate_type(student.scalar_type());
  const auto options = student.options().dtype(type).memory_format(std::nullopt);
  const int64_t images = student.size(0), height = valid.size(1), width = valid.size(2);
  const int64_t blocks = upsample_l1_blocks(student.size(1), height, width);
  at::Tensor loss = at::empty({images}, options), weight = at::empty({images}, options);
  at::Tensor partial = at::empty({images, blocks, 2}, options.dtype(at::kDouble));
  C10_CUDA_CHECK(launch_upsample_l1(grid(student), grid(teacher), valid.const_data_ptr<bool>(), height, width,
                                    partial.mutable_data_ptr<double>(), stream));
  C10_CUDA_CHECK(launch_image_means(partial.const_data_ptr<double>(), images, blocks, type == at::kDouble, loss.mutable_data_ptr(),
                                    weight.mutable_data_ptr(), stream));
  return {loss, weight};
}

at::Tensor upsample_l1_backward(const at::Tensor& grad_loss, const at::Tensor& student, const at::Tensor& teacher,
                                const at::Tensor& valid, const at::Tensor& weight) {
  check(student, teacher, valid);
  const at::ScalarType type = accumulate_type(student.scalar_type());
  check_saved(kOp, "grad_loss", grad_loss, {student.size(0)}, type, student);
  check_saved(kOp, "weight", weight, {student.size(0)}, type, student);
  const c10::cuda::CUDAGuard guard(student.device());
  const at::Tensor grad = grad_loss.contiguous();  // the gradient of a mean is one number, expanded
  at::Tensor gradient = at::empty_like(student);
  C10_CUDA_CHECK(launch_upsample_l1_backward(grid(student), grid(teacher), valid.const_data_ptr<bool>(), valid.size(1), valid.size(2),
                                             grad.const_data_ptr(), weight.const_data_ptr(), grid(gradient),
                                             c10::cuda::getCurrentCUDAStream()));
  return gradient;
}

}  // namespace
}  // namespace reclip::cuda

TORCH_LIBRARY_IMPL(reclip_d2, CUDA, m) {
  m.impl("upsample_l1", reclip::cuda::upsample_l1);
  m.impl("upsample_l1_backward", reclip::cuda::upsample_l1_backward);
}
