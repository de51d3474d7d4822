// Argument checks shared by all operators; each failure is one line that names the operator and the argument.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "philox.h"

namespace reclip {

// Hypothesis rows: rows offsets[b] .. offsets[b+1]-1 belong to image b and to the classes class_ids[row]. Rows from offsets[B] on
// are padding: they belong to no image, their results are zero, and nothing depends on them.
struct Hypothesis {
  const int64_t* class_ids;
  const int64_t* offsets;
  int64_t images;
  int64_t rows;
  int64_t used;  // rows of images, without the padding
  int64_t classes;
  int64_t most_rows;                  // of any one image
  std::vector<int32_t> row_of_class;  // [image * classes + class]: row within the image, or -1

  int64_t count(int64_t image) const { return offsets[image + 1] - offsets[image]; }
};

// int64 vectors class_ids (K) and offsets (B+1), contiguous; their values are not read.
void check_rows(const char* op, const at::Tensor& class_ids, const at::Tensor& offsets, int64_t images);

// Reads and checks the rows, on the CPU; the tensors must outlive the result.
Hypothesis read_hypothesis(const char* op, const at::Tensor& class_ids, const at::Tensor& offsets, int64_t images,
                           int64_t classes);

NoiseKey read_seed(const char* op, const at::Tensor& seed);

void check_tau(const char* op, double tau);

// A floating-point tensor with the given number of dimensions on the given device type.
void check_tensor(const char* op, const char* name, const at::Tensor& tensor, int64_t dims, c10::DeviceType device);

// Two tensors on one device, both float64 or neither.
void check_pair(const char* op, const char* name, const at::Tensor& tensor, const char* other_name, const at::Tensor& other);

// Logits or masks (B,n,C) and features (B,n,D) that agree in B and n.
void check_patches(const char* op, const char* name, const at::Tensor& logits, const at::Tensor& features);

// Bias (n,C), absent or in the accumulation dtype.
void check_bias(const char* op, const std::optional<at::Tensor>& bias, const at::Tensor& logits);

// A gradient or a saved output of exactly this shape and dtype.
void check_saved(const char* op, const char* name, const at::Tensor& tensor, c10::IntArrayRef shape, at::ScalarType dtype,
                 const at::Tensor& like);

// A map (B,C,h,w) with channels and a grid, to be upsampled to the size of `pixels` (B,H,W), of the given dtype, on its device.
void check_upsampled(const char* op, const char* name, const at::Tensor& map, const char* pixels_name, const at::Tensor& pixels,
                     at::ScalarType pixels_type, c10::DeviceType device);

// float64 for float64, float32 for all others.
at::ScalarType accumulate_type(at::ScalarType type);

// The features with D innermost and contiguous: themselves, or a copy.
at::Tensor rows_of(const at::Tensor& features);

}  // namespace reclip
