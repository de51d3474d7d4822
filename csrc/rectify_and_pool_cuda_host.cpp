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

// With `save`, the third tensor is the normalizer that the backward pass needs, otherwise it is empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& logits, const OptionalTensor& bias, const at::Tensor& features,
                                                       const at::Tensor& class_ids, const at::Tensor& offsets, const at::Tensor& seed,
                                                       double tau, bool hard, bool save) {
  check(logits, bias, features, tau);
  const ScoreInputs in = score_inputs(logits, bias, noise_source(kOp, seed, logits), tau);
  const c10::cuda::CUDAGuard guard(logits.device());
  const PreparedRows prepared(kOp, class_ids, offsets, logits.size(0), logits.size(2), logits);
  const DeviceRows& h = prepared.rows;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto options = logits.options().dtype(accumulate_type(logits.scalar_type())).memory_format(std::nullopt);
  const bool is_double = options.dtype() == at::kDouble;
  const int64_t width = features.size(2), chunks = pooling_chunks(in.images, in.patches, width);
  const bool empty = h.rows == 0 || h.images == 0 || in.patches == 0;
  const at::Tensor normalizer = at::empty({2, save || !hard ? in.images : 0, in.patches}, options);
  if (empty) return {at::zeros({h.rows, width}, options), at::zeros({h.rows}, options), normalizer};
  at::Tensor pooled = at::empty({h.rows, width}, options), area = at::empty({h.rows}, options);
  const at::Tensor z = rows_of(features), partial = at::empty({chunks, h.rows, width}, options);
  void* const kept = normalizer.numel() > 0 ? normalizer.mutable_data_ptr() : nullptr;
  if (hard) {
    const at::Tensor row = at::empty({in.images * in.patches}, options.dtype(at::kInt));
    C10_CUDA_CHECK(launch_hard_rows(in, h, row.mutable_data_ptr<int32_t>(), prepared.counts, prepared.bad_patches, kept, stream));
    C10_CUDA_CHECK(launch_pool_hard(row.const_data_ptr<int32_t>(), h, view(z), in.patches, width, partial.mutable_data_ptr(), stream));
    C10_CUDA_CHECK(launch_pool_finish_hard(partial.const_data_ptr(), prepared.counts, prepared.bad_patches, h, chunks, width, is_double,
                                           pooled.mutable_data_ptr(), area.mutable_data_ptr(), stream));
    return {pooled, area, normalizer};
  }
  const at::Tensor weights = at::empty({h.rows, in.patches}, options), total = at::empty({h.rows}, options);
  C10_CUDA_CHECK(launch_normalizer(in, h, kept, stream));
  C10_CUDA_CHECK(launch_log_masks(in, h, kept, /*area=*/nullptr, weights.mutable_data_ptr(), stream));
  C10_CUDA_CHECK(launch_scale_log_masks(weights.mutable_data_ptr(), h, in.patches, is_double, total.mutable_data_ptr(),
                                        area.mutable_data_ptr(), stream));
  C10_CUDA_CHECK(launch_pool_soft(weights.const_data_ptr(), h, view(z), in.patches, width, partial.mutable_data_ptr(), stream));
  C10_CUDA_CHECK(launch_poison_rows(h, is_double, total.mutable_data_ptr(), area.mutable_data_ptr(), stream));
  C10_CUDA_CHECK(launch_pool_finish(partial.const_data_ptr(), total.const_data_ptr(), chunks, h.rows, width, is_double,
                                    pooled.mutable_data_ptr(), stream));
  return {pooled, area, normalizer};
}

std::tuple<at::Tensor, at::Tensor> rectify_and_pool(const at::Tensor& logits, const OptionalTensor& bias,
                                                    const at::Tensor& features, const at::Tensor& class_ids,
                                                    const at::Tensor& offsets, const at::Tensor& seed, double tau, bool hard) {
  const auto [pooled, area, _] = forward(logits, bias, features, class_ids, offsets, seed, tau, hard, /*save=*/false);
  return {pooled, area};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rectify_and_pool_forward(const at::Tensor& logits, const OptionalTensor& bias,
                                                                        const at::Tensor& features, const at::Tensor& class_ids,
                                                                        const at::Tensor& offsets, const at::Tensor& seed, double tau,
                                                                        bool hard) {
  return forward(logits, bias, features, class_ids, offsets, seed, tau, hard, /*save=*/true);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rectify_and_pool_backward(
    const at::Tensor& grad_pooled, const at::Tensor& grad_area, const at::Tensor& logits, const OptionalTensor& bias,
    const at::Tensor& features, const at::Tensor& class_ids, const at::Tensor& offsets, const at::Tensor& seed,
    const at::Tensor& pooled, const at::Tensor& area, double tau, bool hard, bool need_logits, bool need_bias,
    bool need_features, const OptionalTensor& saved) {
  check(logits, bias, features, tau);
  const ScoreInputs in = score_inputs(logits, bias, noise_source(kOp, seed, logits), tau);
  const at::ScalarType type = accumulate_type(logits.scalar_type());
  const bool is_double = type == at::kDouble;
  const int64_t width = features.size(2);
  const c10::cuda::CUDAGuard guard(logits.device());
  const PreparedRows prepared(kOp, class_ids, offsets, logits.size(0), logits.size(2), logits);
  const DeviceRows& h = prepared.rows;
  check_saved(kOp, "grad_pooled", grad_pooled, {h.rows, width}, type, logits);
  const bool of_area_given = grad_area.numel() > 0 || h.rows == 0;  // otherwise it is zero
  if (of_area_given) check_saved(kOp, "grad_area", grad_area, {h.rows}, type, logits);
  check_saved(kOp, "pooled", pooled, {h.rows, width}, type, logits);
  check_saved(kOp, "area", area, {h.rows}, type, logits);
  if (saved.has_value()) check_saved(kOp, "normalizer", *saved, {2, in.images, in.patches}, type, logits);
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
  C10_CUDA_CHECK(launch_pooling_gradient(grad_pooled.contiguous().const_data_ptr(),
                                         of_area_given ? grad_area.contiguous().const_data_ptr() : nullptr,
                                         pooled.contiguous().const_data_ptr(), area.contiguous().const_data_ptr(), h.rows, width,
                                         is_double, weight.mutable_data_ptr(), shift.mutable_data_ptr(), of_area.mutable_data_ptr(), log_area_data,
                                         stream));
  at::Tensor normalizer = saved.has_value() ? saved->contiguous() : at::Tensor();
  if (!normalizer.defined() && (need_logits || need_bias || !hard)) {
    normalizer = at::empty({2, in.images, in.patches}, options);
    C10_CUDA_CHECK(launch_normalizer(in, h, normalizer.mutable_data_ptr(), stream));
  }
  const void* const kept = normalizer.defined() ? normalizer.const_data_ptr() : nullptr;
  if (!hard) {  // areas too small for float32 need the masks again; other images are skipped
    C10_CUDA_CHECK(launch_log_masks(in, h, kept, area.contiguous().const_data_ptr(), masks.mutable_data_ptr(), stream));
    C10_CUDA_CHECK(launch_small_log_areas(masks.const_data_ptr(), area.contiguous().const_data_ptr(), h, in.patches, is_double,
                                          log_area_data, stream));
  }
  if (need_logits || need_bias) {
    const at::Tensor z = rows_of(features), row_gradient = at::empty({h.rows, in.patches}, options);
    const at::Tensor totals = at::empty({in.images, in.patches}, options);
    C10_CUDA_CHECK(launch_row_gradient(weight.const_data_ptr(), shift.const_data_ptr(), of_area.const_data_ptr(), h, view(z),
                                       in.patches, width, row_gradient.mutable_data_ptr(), stream));
    const int64_t groups = need_bias ? bias_groups(in.images, in.patches, in.classes) : in.images;
    const bool in_parts = need_bias && groups > 1;  // otherwise the gradient of the bias is written where it belongs
    const at::Tensor parts = at::empty({in_parts ? groups * in.classes * in.patches : 0}, options);
    void* const of_bias = in_parts ? parts.mutable_data_ptr() : need_bias ? grad_bias.mutable_data_ptr() : nullptr;
    C10_CUDA_CHECK(launch_logit_gradient(in, h, kept, row_gradient.mutable_data_ptr(), log_area_data, totals.mutable_data_ptr(),
                                         view(grad_logits), of_bias, groups, in_parts || !need_bias ? 1 : grad_bias.stride(0),
                                         in_parts || !need_bias ? in.patches : grad_bias.stride(1), stream));
    if (in_parts)
      C10_CUDA_CHECK(launch_bias_sum(parts.const_data_ptr(), is_double, groups, in.patches, in.classes,
                                     grad_bias.mutable_data_ptr(), grad_bias.stride(0), grad_bias.stride(1), stream));
  }
  if (need_features) {
    if (hard) {
      const at::Tensor row = at::empty({in.images * in.patches}, options.dtype(at::kInt));
      C10_CUDA_CHECK(launch_hard_rows(in, h, row.mutable_data_ptr<int32_t>(), nullptr, nullptr, nullptr, stream));
      C10_CUDA_CHECK(launch_feature_gradient_hard(row.const_data_ptr<int32_t>(), weight.const_data_ptr(), h, in.patches, width,
                                                  view(grad_features), stream));
    } else {
      C10_CUDA_CHECK(launch_shares(in, h, kept, log_area_data, masks.mutable_data_ptr(), stream));
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
  m.impl("rectify_and_pool_forward", reclip::cuda::rectify_and_pool_forward);
  m.impl("rectify_and_pool_backward", reclip::cuda::rectify_and_pool_backward);
}
