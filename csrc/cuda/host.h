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

// The rows and their tables on the device. Rows on the host are checked there and sent with the launch, or if they are many copied
// from pinned memory without waiting; rows on the device of `like` are not read by the host. All on the current stream.
struct PreparedRows {
  at::Tensor copy, memory;
  DeviceRows rows;
  int32_t *counts, *bad_patches;  // zero: see launch_hard_rows

  PreparedRows(const char* op, const at::Tensor& class_ids, const at::Tensor& offsets, int64_t images, int64_t classes,
               const at::Tensor& like) {
    check_rows(op, class_ids, offsets, images);
    const int64_t count = class_ids.size(0);
    const bool on_device = !class_ids.is_cpu() && class_ids.device() == like.device() && offsets.device() == like.device();
    memory = at::empty({3 * count + 3 * images + 2 + images * classes}, like.options().dtype(at::kInt).memory_format(std::nullopt));
    RowTables to;
    to.row_of_class = memory.mutable_data_ptr<int32_t>();  // first, so that four of its entries can be read at once
    to.class_of_row = to.row_of_class + images * classes;
    to.image_of_row = to.class_of_row + count;
    to.counts = counts = to.image_of_row + count;
    to.offsets = to.counts + count;
    to.bad = to.offsets + images + 1;
    to.bad_patches = bad_patches = to.bad + images + 1;
    rows = {to.class_of_row, to.image_of_row, to.offsets, to.row_of_class, on_device ? to.bad : nullptr, images, count, classes,
            count < classes ? count : classes};
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    if (on_device) {
      C10_CUDA_CHECK(launch_rows_table(class_ids.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>(), images, count, classes, to, stream));
      return;
    }
    check_not_captured(op, "`class_ids` and `offsets`");
    const Hypothesis h = read_hypothesis(op, class_ids, offsets, images, classes);
    rows.most_rows = h.most_rows;
    if (count + images + 1 <= FewRows::kMost) {
      FewRows few;
      std::copy_n(h.class_ids, count, few.value);
      std::copy_n(h.offsets, images + 1, few.value + count);
      C10_CUDA_CHECK(launch_rows_table(few, images, count, classes, to, stream));
      return;
    }
    at::Tensor staging = at::empty({count + images + 1}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
    int64_t* const values = staging.mutable_data_ptr<int64_t>();
    std::copy_n(h.class_ids, count, values);
    std::copy_n(h.offsets, images + 1, values + count);
    copy = staging.to(like.device(), at::kLong, /*non_blocking=*/true);
    const int64_t* const copied = copy.const_data_ptr<int64_t>();
    C10_CUDA_CHECK(launch_rows_table(copied, copied + count, images, count, classes, to, stream));
  }
};

}  // namespace reclip::cuda
