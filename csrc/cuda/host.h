// From tensors to launcher arguments: views of tensors, and hypothesis rows on the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "../checks.h"
#include "launch.h"

namespace reclip::cuda {

// What the host reads would be repeated by every replay of a CUDA graph.
inline void check_not_captured(const char* op, const char* names) {
  TORCH_CHECK(c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None, op, ": in a CUDA graph ", names,
              " must be on the GPU; from the host, replays would repeat those of the capture");
}

// Reads the seed on the host, or leaves it on the device of the logits, to be read by the kernels.
inline NoiseSource noise_source(const char* op, const at::Tensor& seed, const at::Tensor& logits) {
  if (seed.device() != logits.device()) {
    check_not_captured(op, "`seed`");
    return {nullptr, read_seed(op, seed)};
  }
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.dim() == 1 && seed.size(0) == 2 && seed.is_contiguous(), op,
                    ": `seed` must be a contiguous int64 tensor of shape (2,), got ", seed.scalar_type(), " ", seed.sizes());
  return {seed.const_data_ptr<int64_t>(), {}};
}

inline ElementType element_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return ElementType::kFloat64;
    case at::kHalf:
      return ElementType::kFloat16;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    default:
      return ElementType::kFloat32;
  }
}

// View of a (B, n, X) tensor; null for the empty tensor of a gradient that is not needed.
inline Batch view(const at::Tensor& tensor) {
  if (tensor.dim() != 3) return {nullptr, element_type(tensor), 0, 0, 0};
  return {tensor.const_data_ptr(), element_type(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A (B, C, h, w) tensor.
inline Grid grid(const at::Tensor& map) {
  return {map.const_data_ptr(), element_type(map), map.stride(0), map.stride(1), map.stride(2), map.stride(3),
          map.size(0),          map.size(1),       map.size(2),   map.size(3)};
}

inline ScoreInputs score_inputs(const at::Tensor& logits, const std::optional<at::Tensor>& bias, NoiseSource noise, double tau) {
  ScoreInputs in{view(logits), nullptr, 0, 0, logits.size(0), logits.size(1), logits.size(2), noise, 1.0 / tau};
  if (bias.has_value()) {
    in.bias = bias->const_data_ptr();
    in.bias_patch_stride = bias->stride(0);
    in.bias_class_stride = bias->stride(1);
  }
  return in;
}

// The rows and their tables on the device. Rows on the host are checked there and copied by one asynchronous transfer from pinned
// memory; rows on the device of `like` are not read by the host. Both on the current stream.
struct PreparedRows {
  at::Tensor copy, tables;
  DeviceRows rows;

  PreparedRows(const char* op, const at::Tensor& class_ids, const at::Tensor& offsets, int64_t images, int64_t classes,
               const at::Tensor& like) {
    check_rows(op, class_ids, offsets, images);
    const int64_t count = class_ids.size(0);
    const bool on_device = class_ids.device() == like.device() && offsets.device() == like.device();
    const int64_t *ids = nullptr, *bounds = nullptr;
    int64_t most_rows = count < classes ? count : classes;
    if (on_device) {
      ids = class_ids.const_data_ptr<int64_t>();
      bounds = offsets.const_data_ptr<int64_t>();
    } else {
      check_not_captured(op, "`class_ids` and `offsets`");
      const Hypothesis h = read_hypothesis(op, class_ids, offsets, images, classes);
      most_rows = h.most_rows;
      at::Tensor staging = at::empty({count + images + 1}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
      int64_t* to = staging.mutable_data_ptr<int64_t>();
      std::copy_n(h.class_ids, count, to);
      std::copy_n(h.offsets, images + 1, to + count);
      copy = staging.to(like.device(), at::kLong, /*non_blocking=*/true);
      ids = copy.const_data_ptr<int64_t>();
      bounds = ids + count;
    }
    tables = at::empty({count + 2 * (images + 1) + images * classes}, like.options().dtype(at::kInt).memory_format(std::nullopt));
    int32_t* const class_of_row = tables.mutable_data_ptr<int32_t>();
    int32_t *const offsets_out = class_of_row + count, *const bad = offsets_out + images + 1;
    int32_t* const row_of_class = bad + images + 1;
    C10_CUDA_CHECK(launch_rows_table(ids, bounds, images, count, classes, class_of_row, offsets_out, row_of_class, bad,
                                     c10::cuda::getCurrentCUDAStream()));
    rows = {class_of_row, offsets_out, row_of_class, on_device ? bad : nullptr, images, count, classes, most_rows};
  }
};

}  // namespace reclip::cuda
