// Shared by the CPU operators: tiles of a batch, scratch memory, element types, and the pooling passes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../checks.h"
#include "tiles.h"

namespace reclip::cpu {

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

// Splits the patches of each image into tiles; a tile's classes should fit in the second-level cache.
struct Tiling {
  int64_t patches;
  int ld;
  int64_t per_image;

  Tiling(int64_t n, int64_t classes) : patches(n), ld(classes <= 192 ? 64 : classes <= 512 ? 32 : kTileStep) {
    ld = static_cast<int>(std::min<int64_t>(ld, (n + kTileStep - 1) / kTileStep * kTileStep));
    per_image = ld > 0 ? (n + ld - 1) / ld : 0;
  }
  int64_t first(int64_t tile) const { return tile * ld; }
  int count(int64_t tile) const { return static_cast<int>(std::min<int64_t>(ld, patches - tile * ld)); }
};

template <typename T>
std::unique_ptr<T[]> scratch(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(std::max<int64_t>(count, 1))]);
}

// The elements of image b from patch i on, in a (B, n, C) tensor; `size` is the size of an element in bytes.
inline Strided patches_of(const at::Tensor& tensor, int64_t b, int64_t i) {
  const char* base = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t at = b * tensor.stride(0) + i * tensor.stride(1);
  return {base + at * tensor.element_size(), tensor.stride(1), tensor.stride(2)};
}
// The same for an (n, C) tensor, or a null view.
inline Strided bias_of(const std::optional<at::Tensor>& bias, int64_t i) {
  if (!bias.has_value()) return {nullptr, 0, 0};
  const char* base = static_cast<const char*>(bias->const_data_ptr());
  return {base + i * bias->stride(0) * bias->element_size(), bias->stride(0), bias->stride(1)};
}

// area (K) = sum of the weights [row][patch]; areas below kSmallArea become 0.
template <typename T>
void sum_weights(const T* weights, int64_t rows, int64_t patches, T* area);

// From logarithms of masks [row][patch], replaced by weights of at most 1: their sums `total` (K), by which pooling divides, and
// the areas of the masks (K), clamped to the smallest normal number. NaN in a row makes both NaN.
template <typename T>
void scale_log_masks(T* log_masks, int64_t rows, int64_t patches, T* total, T* area);

// The logarithm of the area of one row of logarithms, which it overwrites.
template <typename T>
T log_area_of(T* log_masks, int64_t patches);

// pooled (K, D) from weights [row][patch] of the hypothesis rows: pooled = sum weight * feature / total.
// Every output element is summed by one thread in the order of the patches: the result does not depend on the thread count.
template <typename T>
void pool_weighted(const T* weights, const Hypothesis& rows, const at::Tensor& features, const T* total, T* pooled);

// The same for one-hot masks: row[b * n + i] is the row of patch i within image b, -1 for none, kBadPatch for a patch whose
// scores are not finite; such a patch makes its image's rows NaN.
template <typename T>
void pool_segments(const int32_t* row, const Hypothesis& rows, const at::Tensor& features, T* pooled, T* area);

// For the backward pass: the gradient of a row's mask value is weight . feature + shift + of_area, added in this order, with
// weight (K, D) = grad_pooled / area, shift (K) = -weight . pooled and of_area (K) = grad_area. For shares (mask / area): the
// same times the area, and log_area (K). Rows without area (0 or NaN) contribute by grad_area only.
template <typename T>
struct RowGradient {
  std::unique_ptr<T[]> weight, shift, of_area, log_area;
  bool of_shares;

  RowGradient(const at::Tensor& grad_pooled, const at::Tensor& grad_area, const at::Tensor& pooled, const at::Tensor& area,
              bool of_shares);
  // Turns the products rows[k] of features with row r's weight into gradients, in place.
  void finish(int64_t r, T* rows, int64_t count) const {
    for (int64_t k = 0; k < count; ++k) rows[k] = (rows[k] + shift[r]) + of_area[r];
  }
};

}  // namespace reclip::cpu
