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

// Seed and hypothesis are read on the host: a CUDA graph would silently replay the captured ones.
inline void check_not_captured(const char* op) {
  TORCH_CHECK(c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None, op,
              ": cannot be part of a CUDA graph, which would repeat the noise and the hypotheses of its capture");
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

inline ScoreInputs score_inputs(const at::Tensor& logits, const std::optional<at::Tensor>& bias, NoiseKey key, double tau) {
  ScoreInputs in{view(logits), nullptr, 0, 0, logits.size(0), logits.size(1), logits.size(2), key, 1.0 / tau};
  if (bias.has_value()) {
    in.bias = bias->const_data_ptr();
    in.bias_patch_stride = bias->stride(0);
    in.bias_class_stride = bias->stride(1);
  }
  return in;
}

// Copy of the rows on the device: one asynchronous transfer from pinned memory on the current stream.
struct UploadedRows {
  at::Tensor buffer;
  DeviceRows rows;

  UploadedRows(const Hypothesis& h, const at::Device& device) {
    const int64_t table = h.images * h.classes, total = h.rows + h.images + 1 + table;
    at::Tensor staging = at::empty({total}, at::TensorOptions().dtype(at::kInt).pinned_memory(true));
    int32_t* to = staging.mutable_data_ptr<int32_t>();
    std::copy_n(h.class_ids, h.rows, to);
    std::copy_n(h.offsets, h.images + 1, to + h.rows);
    std::copy_n(h.row_of_class.data(), table, to + h.rows + h.images + 1);
    buffer = staging.to(device, at::kInt, /*non_blocking=*/true);
    const int32_t* on_device = buffer.const_data_ptr<int32_t>();
    rows = {on_device, on_device + h.rows, on_device + h.rows + h.images + 1, h.images, h.rows, h.classes, h.most_rows};
  }
};

}  // namespace reclip::cuda
