// rectify_and_pool on CUDA: checks, memory, and the order of the kernels.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "cuda/host.h"

namespace reclip::cuda {
namespace {

constexpr const char* kOp = "rectify_and_pool";
using OptionalTensor = std::optional<at::Tensor>;

void check(const at::Tensor& logits, const OptionalTensor& bias, const at::Tensor& features, double tau) {
  check_tensor(kOp, "logits", logits, 3, c10::DeviceType::CUDA);
  check_tensor(kOp, "features", features, 3, c10::DeviceType::CUDA);
  check_patches(kOp, "logits", logits, features);
  check_bias(kOp, bias, logits);
  check_tau(kOp, tau);
}

std::tuple<at::Tensor, at::Tensor> rectify_and_pool(const at::Tensor& logits, const OptionalTensor& bias,
                                                    const at::Tensor& features, const at::Tensor& class_ids,
                                                    const at::Tensor& offsets, const at::Tensor& seed, double tau, bool hard) {
  check(logits, bias, features, tau);
  const ScoreInputs in = score_inputs(logits, bias, noise_source(kOp, seed, logits), tau);
  const c10::cuda::CUDAGuard guard(logits.device());
  const PreparedRows prepared(kOp, class_ids, offsets, logits.size(0), logits.size(2), logits);
  const DeviceRows& h = prepared.rows;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto options = logits.options().dtype(accumulate_type(logits.scalar_type()));
  const bool is_double = options.dtype() == at::kDouble;
  const int64_t width = features.size(2), chunks = pooling_chunks(in.images, in.patches, width);
  at::Tensor pooled = at::zeros({h.rows, width}, options), area = at::zeros({h.rows}, options);
  if (h.rows == 0 || h.images == 0 || in.patches == 0) return {pooled, area};
  const at::Tensor z = rows_of(features), partial = at::empty({chunks, h.rows, width}, options);
  at::Tensor total = area;  // divisor of the sums
  if (hard) {
    const at::Tensor row = at::empty({in.images * in.patches}, options.dtype(at::kInt));
    const at::Tensor counters = at::zeros({h.rows + in.images}, row.options());
    int32_t* count = counters.mutable_data_ptr<int32_t>();
    C10_CUDA_CHECK(launch_hard_rows(in, h, row.mutable_data_ptr<int32_t>(), count, count + h.rows, stream));
    C10_CUDA_CHECK(launch_area_of_counts(count, count + h.rows, h, is_double, area.mutable_data_ptr(), stream));
    C10_CUDA_CHECK(launch_pool_hard(row.const_data_ptr<int32_t>(), h, view(z), in.patches, width, partial.mutable_data_ptr(), stream));
  } else {
    const at::Tensor weights = at::empty({h.rows, in.patches}, options);
    total = at::empty({h.rows}, options);
    C10_CUDA_CHECK(launch_log_masks(in, h, /*area=*/nullptr, weights.mutable_data_ptr(), stream));
    C10_CUDA_CHECK(launch_scale_log_masks(weights.mutable_data_ptr(), h, in.patches, is_double, total.mutable_data_ptr(),
                                          area.mutable_data_ptr(), stream));
    C10_CUDA_CHECK(launch_pool_soft(weights.const_data_ptr(), h, view(z), in.patches, width, partial.mutable_data_ptr(), stream));
  }
  C10_CUDA_CHECK(launch_poison_rows(h, is_double, total.mutable_data_ptr(), area.mutable_data_ptr(), stream));
  C10_CUDA_CHECK(launch_pool_finish(partial.const_data_ptr(), total.const_data_ptr(), chunks, h.rows, width, is_double,
                                    pooled.mutable_data_ptr(), stream));
  return {pooled, area};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rectify_and_pool_backward(
    const at::Tensor& grad_pooled, const at::Tensor& grad_area, const at::Tensor& logits, const OptionalTensor& bias,
    const at::Tensor& features, const at::Tensor& class_ids, const at::Tensor& offsets, const at::Tensor& seed,
    const at::Tensor& pooled, const at::Tensor& area, double tau, bool hard, bool need_logits, bool need_bias,
    bool need_features) {
  check(logits, bias, features, tau);
  const ScoreInputs in = score_inputs(logits, bias, noise_source(kOp, seed, logits), tau);
  const at::ScalarType type = accumulate_type(logits.scalar_type());
  const bool is_double = type == at::kDouble;
  const int64_t width = features.size(2);
  const c10::cuda::CUDAGuard guard(logits.device());
  const PreparedRows prepared(kOp, class_ids, offsets, logits.size(0), logits.size(2), logits);
  const DeviceRows& h = prepared.rows;
  check_saved(kOp, "grad_pooled", grad_pooled, {h.rows, width}, type, logits);
  check_saved(kOp, "grad_area", grad_area, {h.rows}, type, logits);
  check_saved(kOp, "pooled", pooled, {h.rows, width}, type, logits);
  check_saved(kOp, "area", area, {h.rows}, type, logits);
  need_bias = need_bias && bias.has_value();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto options = pooled.options();
  at::Tensor grad_logits = need_logits ? at::empty_like(logits) : at::empty({0}, logits.options());
  at::Tensor grad_bias = need_bias ? at::empty_like(*bias) : at::empty({0}, options);
  at::Tensor grad_features = at::empty(need_features ? features.sizes() : c10::IntArrayRef({0}), features.options());
  if (h.rows == 0 || h.images == 0 || in.patches == 0) return {grad_logits.zero_(), grad_bias.zero_(), grad_features.zero_()};

  const at::Tensor weight = at::empty({h.rows, width}, options), shift = at::empty({h.rows}, options), of_area = at::empty({h.rows}, options);
  const at::Tensor log_area = at::empty({hard ? 0 : h.rows}, options);
  // Zero, where rows may be invalid: no kernel writes those.
  const std::array<int64_t, 2> mask_sizes = {hard ? 0 : h.rows, in.patches};
  const at::Tensor masks = h.bad ? at::zeros(mask_sizes, options) : at::empty(mask_sizes, options);
  void* const log_area_data = hard ? nullptr : log_area.mutable_data_ptr();
  C10_CUDA_CHECK(launch_pooling_gradient(grad_pooled.contiguous().const_data_ptr(), grad_area.contiguous().const_data_ptr(),
                                         pooled.contiguous().const_data_ptr(), area.contiguous().const_data_ptr(), h.rows, width,
                                         is_double, weight.mutable_data_ptr(), shift.mutable_data_ptr(), of_area.mutable_data_ptr(), log_area_data,
                                         stream));
  if (!hard) {  // areas too small for float32 need the masks again; other images are skipped
    C10_CUDA_CHECK(launch_log_masks(in, h, area.contiguous().const_data_ptr(), masks.mutable_data_ptr(), stream));
    C10_CUDA_CHECK(launch_small_log_areas(masks.const_data_ptr(), area.contiguous().const_data_ptr(), h, in.patches, is_double,
                                          log_area_data, stream));
  }
  if (need_logits || need_bias) {
    const at::Tensor z = rows_of(features), row_gradient = at::empty({h.rows, in.patches}, options);
    C10_CUDA_CHECK(launch_row_gradient(weight.const_data_ptr(), shift.const_data_ptr(), of_area.const_data_ptr(), h, view(z),
                                       in.patches, width, row_gradient.mutable_data_ptr(), stream));
    const int64_t groups = need_bias ? bias_groups(in.images, in.patches) : in.images;
    const at::Tensor partial = at::empty({need_bias ? groups * in.classes * in.patches : 0}, options);
    C10_CUDA_CHECK(launch_logit_gradient(in, h, row_gradient.const_data_ptr(), log_area_data, view(grad_logits),
                                         need_bias ? partial.mutable_data_ptr() : nullptr, groups, stream));
    if (need_bias)
      C10_CUDA_CHECK(launch_bias_sum(partial.const_data_ptr(), is_double, groups, in.patches, in.classes,
                                     grad_bias.mutable_data_ptr(), grad_bias.stride(0), grad_bias.stride(1), stream));
  }
  if (need_features) {
    if (hard) {
      const at::Tensor row = at::empty({in.images * in.patches}, options.dtype(at::kInt));
      const at::Tensor counters = at::zeros({h.rows + in.images}, row.options());
      int32_t* count = counters.mutable_data_ptr<int32_t>();
      C10_CUDA_CHECK(launch_hard_rows(in, h, row.mutable_data_ptr<int32_t>(), count, count + h.rows, stream));
      C10_CUDA_CHECK(launch_feature_gradient_hard(row.const_data_ptr<int32_t>(), weight.const_data_ptr(), h, in.patches, width,
                                                  view(grad_features), stream));
    } else {
      C10_CUDA_CHECK(launch_shares(in, h, log_area_data, masks.mutable_data_ptr(), stream));
      C10_CUDA_CHECK(launch_feature_gradient_soft(masks.const_data_ptr(), weight.const_data_ptr(), h, in.patches, width,
                                                  view(grad_features), stream));
    }
  }
  return {grad_logits, grad_bias, grad_features};
}

}  // namespace
}  // namespace reclip::cuda

TORCH_LIBRARY_IMPL(reclip_d2, CUDA, m) {
  m.impl("rectify_and_pool", reclip::cuda::rectify_and_pool);
  m.impl("rectify_and_pool_backward", reclip::cuda::rectify_and_pool_backward);
}
