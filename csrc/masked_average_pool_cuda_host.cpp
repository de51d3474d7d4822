// masked_average_pool on CUDA: gathers the masks of the hypothesis rows, then pools as rectify_and_pool does in soft mode.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/host.h"

namespace reclip::cuda {
namespace {

constexpr const char* kOp = "masked_average_pool";

void check(const at::Tensor& features, const at::Tensor& masks) {
  check_tensor(kOp, "features", features, 3, c10::DeviceType::CUDA);
  check_tensor(kOp, "masks", masks, 3, c10::DeviceType::CUDA);
  check_patches(kOp, "masks", masks, features);
}

std::tuple<at::Tensor, at::Tensor> masked_average_pool(const at::Tensor& features, const at::Tensor& masks,
                                                       const at::Tensor& class_ids, const at::Tensor& offsets) {
  check(features, masks);
  const c10::cuda::CUDAGuard guard(features.device());
  const PreparedRows prepared(kOp, class_ids, offsets, masks.size(0), masks.size(2), features);
  const DeviceRows& h = prepared.rows;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto options = features.options().dtype(accumulate_type(features.scalar_type()));
  const bool is_double = options.dtype() == at::kDouble;
  const int64_t n = features.size(1), width = features.size(2), chunks = pooling_chunks(features.size(0), n, width);
  at::Tensor pooled = at::zeros({h.rows, width}, options), area = at::zeros({h.rows}, options);
  if (h.rows == 0 || h.images == 0 || n == 0) return {pooled, area};
  const at::Tensor z = rows_of(features), weights = at::empty({h.rows, n}, options);
  const at::Tensor partial = at::empty({chunks, h.rows, width}, options);
  C10_CUDA_CHECK(launch_gather_rows(view(masks), h, n, /*nan_to_zero=*/false, weights.mutable_data_ptr(), stream));
  C10_CUDA_CHECK(launch_area_of_weights(weights.const_data_ptr(), h, n, is_double, area.mutable_data_ptr(), stream));
  C10_CUDA_CHECK(launch_poison_rows(h, is_double, area.mutable_data_ptr(), area.mutable_data_ptr(), stream));
  C10_CUDA_CHECK(launch_pool_soft(weights.const_data_ptr(), h, view(z), n, width, partial.mutable_data_ptr(), stream));
  C10_CUDA_CHECK(launch_pool_finish(partial.const_data_ptr(), area.const_data_ptr(), chunks, h.rows, width, is_double,
                                    pooled.mutable_data_ptr(), stream));
  return {pooled, area};
}

std::tuple<at::Tensor, at::Tensor> masked_average_pool_backward(const at::Tensor& grad_pooled, const at::Tensor& grad_area,
                                                                const at::Tensor& features, const at::Tensor& masks,
                                                                const at::Tensor& class_ids, const at::Tensor& offsets,
                                                                const at::Tensor& pooled, const at::Tensor& area,
                                                                bool need_features, bool need_masks) {
  check(features, masks);
  const at::ScalarType type = accumulate_type(features.scalar_type());
  const int64_t n = features.size(1), width = features.size(2);
  const c10::cuda::CUDAGuard guard(features.device());
  const PreparedRows prepared(kOp, class_ids, offsets, masks.size(0), masks.size(2), features);
  const DeviceRows& h = prepared.rows;
  check_saved(kOp, "grad_pooled", grad_pooled, {h.rows, width}, type, features);
  check_saved(kOp, "grad_area", grad_area, {h.rows}, type, features);
  check_saved(kOp, "pooled", pooled, {h.rows, width}, type, features);
  check_saved(kOp, "area", area, {h.rows}, type, features);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto options = pooled.options();
  at::Tensor grad_features = at::empty(need_features ? features.sizes() : c10::IntArrayRef({0}), features.options());
  at::Tensor grad_masks = need_masks ? at::zeros_like(masks) : at::empty({0}, masks.options());
  if (h.rows == 0 || h.images == 0 || n == 0) return {grad_features.zero_(), grad_masks};
  const at::Tensor weight = at::empty({h.rows, width}, options), shift = at::empty({h.rows}, options), of_area = at::empty({h.rows}, options);
  const at::Tensor of_rows = at::empty({h.rows, n}, options);
  C10_CUDA_CHECK(launch_pooling_gradient(grad_pooled.contiguous().const_data_ptr(), grad_area.contiguous().const_data_ptr(),
                                         pooled.contiguous().const_data_ptr(), area.contiguous().const_data_ptr(), h.rows, width,
                                         type == at::kDouble, weight.mutable_data_ptr(), shift.mutable_data_ptr(),
                                         of_area.mutable_data_ptr(), /*log_area=*/nullptr, stream));
  if (need_masks) {
    const at::Tensor z = rows_of(features);
    C10_CUDA_CHECK(launch_row_gradient(weight.const_data_ptr(), shift.const_data_ptr(), of_area.const_data_ptr(), h, view(z),
                                       n, width, of_rows.mutable_data_ptr(), stream));
    C10_CUDA_CHECK(launch_scatter_rows(of_rows.const_data_ptr(), h, n, view(grad_masks), stream));
  }
  if (need_features) {
    C10_CUDA_CHECK(launch_gather_rows(view(masks), h, n, /*nan_to_zero=*/true, of_rows.mutable_data_ptr(), stream));
    C10_CUDA_CHECK(launch_feature_gradient_soft(of_rows.const_data_ptr(), weight.const_data_ptr(), h, n, width,
                                                view(grad_features), stream));
  }
  return {grad_features, grad_masks};
}

}  // namespace
}  // namespace reclip::cuda

TORCH_LIBRARY_IMPL(reclip_d2, CUDA, m) {
  m.impl("masked_average_pool", reclip::cuda::masked_average_pool);
  m.impl("masked_average_pool_backward", reclip::cuda::masked_average_pool_backward);
}
