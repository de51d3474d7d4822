#include "checks.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace reclip {

void check_rows(const char* op, const at::Tensor& class_ids, const at::Tensor& offsets, int64_t images) {
  TORCH_CHECK_TYPE(class_ids.scalar_type() == at::kLong && class_ids.dim() == 1, op,
                   ": `class_ids` must be a one-dimensional int64 tensor, got ", class_ids.scalar_type(), " ", class_ids.sizes());
  TORCH_CHECK_TYPE(offsets.scalar_type() == at::kLong && offsets.dim() == 1, op,
                   ": `offsets` must be a one-dimensional int64 tensor, got ", offsets.scalar_type(), " ", offsets.sizes());
  TORCH_CHECK_VALUE(offsets.size(0) == images + 1, op, ": `offsets` must have B+1 = ", images + 1, " entries for ", images,
                    " images, got ", offsets.size(0));
  TORCH_CHECK_VALUE(class_ids.is_contiguous() && offsets.is_contiguous(), op,
                    ": `class_ids` and `offsets` must be contiguous");
}

Hypothesis read_hypothesis(const char* op, const at::Tensor& class_ids, const at::Tensor& offsets, int64_t images,
                           int64_t classes) {
  check_rows(op, class_ids, offsets, images);
  TORCH_CHECK_VALUE(class_ids.device().is_cpu() && offsets.device().is_cpu(), op,
                    ": `class_ids` and `offsets` must be CPU tensors");
  Hypothesis h{class_ids.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>(), images, class_ids.size(0), 0, classes, 0, {}};
  h.row_of_class.assign(static_cast<size_t>(images * classes), -1);
  h.used = h.offsets[images];
  bool rising = h.offsets[0] == 0 && h.used <= h.rows;
  for (int64_t b = 0; b < images; ++b) rising = rising && h.count(b) >= 0;
  TORCH_CHECK_VALUE(rising, op, ": `offsets` must rise from 0 to at most K = ", h.rows, " without falling");
  for (int64_t b = 0; b < images; ++b) {
    h.most_rows = std::max(h.most_rows, h.count(b));
    for (int64_t r = h.offsets[b]; r < h.offsets[b + 1]; ++r) {
      const int64_t k = h.class_ids[r];
      TORCH_CHECK_VALUE(k >= 0 && k < classes, op, ": `class_ids` holds ", k, " for image ", b, "; there are ", classes, " classes");
      int32_t& row = h.row_of_class[b * classes + k];
      TORCH_CHECK_VALUE(row < 0, op, ": `class_ids` holds class ", k, " more than once for image ", b);
      row = static_cast<int32_t>(r - h.offsets[b]);
    }
  }
  return h;
}

NoiseKey read_seed(const char* op, const at::Tensor& seed) {
  TORCH_CHECK_VALUE(seed.device().is_cpu() && seed.scalar_type() == at::kLong && seed.dim() == 1 && seed.size(0) == 2, op,
                    ": `seed` must be an int64 CPU tensor of shape (2,), got ", seed.scalar_type(), " ", seed.sizes(), " on ",
                    seed.device());
  const at::Tensor words = seed.contiguous();
  const int64_t* word = words.const_data_ptr<int64_t>();
  return {static_cast<uint64_t>(word[0]), static_cast<uint64_t>(word[1])};
}

void check_tau(const char* op, double tau) {
  TORCH_CHECK_VALUE(std::isfinite(tau) && tau > 0, op, ": `tau` must be positive and finite, got ", tau);
}

void check_tensor(const char* op, const char* name, const at::Tensor& tensor, int64_t dims, c10::DeviceType device) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op, ": `", name,
                   "` must be float64, float32, float16 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(tensor.dim() == dims, op, ": `", name, "` must have ", dims, " dimensions, got shape ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device().type() == device, op, ": `", name, "` is on ", tensor.device(), " but should be on ", device);
}

void check_pair(const char* op, const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), op, ": `", name, "` is on ", tensor.device(), " but `", other_name,
                    "` is on ", other.device());
  TORCH_CHECK_TYPE((tensor.scalar_type() == at::kDouble) == (other.scalar_type() == at::kDouble), op, ": `", name, "` is ",
                   tensor.scalar_type(), " but `", other_name, "` is ", other.scalar_type(),
                   ": float64 does not mix");
}

void check_patches(const char* op, const char* name, const at::Tensor& logits, const at::Tensor& features) {
  check_pair(op, "features", features, name, logits);
  TORCH_CHECK_VALUE(logits.size(0) == features.size(0) && logits.size(1) == features.size(1), op, ": `", name, "` ",
                    logits.sizes(), " and `features` ", features.sizes(), " differ in (B,n)");
}

void check_bias(const char* op, const std::optional<at::Tensor>& bias, const at::Tensor& logits) {
  if (!bias.has_value()) return;
  TORCH_CHECK_VALUE(bias->device() == logits.device(), op, ": `bias` is on ", bias->device(), " but `logits` is on ",
                    logits.device());
  TORCH_CHECK_TYPE(bias->scalar_type() == accumulate_type(logits.scalar_type()), op, ": `bias` must be ",
                   accumulate_type(logits.scalar_type()), " beside ", logits.scalar_type(), " logits, got ", bias->scalar_type());
  TORCH_CHECK_VALUE(bias->dim() == 2 && bias->size(0) == logits.size(1) && bias->size(1) == logits.size(2), op, ": `bias` ",
                    bias->sizes(), " must be (n,C) = [", logits.size(1), ", ", logits.size(2), "]");
}

void check_saved(const char* op, const char* name, const at::Tensor& tensor, c10::IntArrayRef shape, at::ScalarType dtype,
                 const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape && tensor.scalar_type() == dtype && tensor.device() == like.device(), op, ": `", name,
                    "` must be ", dtype, " ", shape, " on ", like.device(), ", got ", tensor.scalar_type(), " ", tensor.sizes(),
                    " on ", tensor.device());
}

void check_upsampled(const char* op, const char* name, const at::Tensor& map, const char* pixels_name, const at::Tensor& pixels,
                     at::ScalarType pixels_type, c10::DeviceType device) {
  check_tensor(op, name, map, 4, device);
  TORCH_CHECK_VALUE(map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0, op, ": `", name,
                    "` must have channels and a grid, got shape ", map.sizes());
  TORCH_CHECK_TYPE(pixels.scalar_type() == pixels_type, op, ": `", pixels_name, "` must be ", pixels_type, ", got ",
                   pixels.scalar_type());
  TORCH_CHECK_VALUE(pixels.device() == map.device(), op, ": `", pixels_name, "` is on ", pixels.device(), " but `", name,
                    "` is on ", map.device());
  TORCH_CHECK_VALUE(pixels.dim() == 3 && pixels.size(0) == map.size(0) && pixels.size(1) > 0 && pixels.size(2) > 0, op, ": `",
                    pixels_name, "` must be (B,H,W) with B = ", map.size(0), " and at least one pixel, got shape ", pixels.sizes());
}

at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor rows_of(const at::Tensor& features) {
  return features.size(2) <= 1 || features.stride(2) == 1 ? features : features.contiguous();
}

}  // namespace reclip
