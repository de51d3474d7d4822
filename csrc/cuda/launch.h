// Launchers of the CUDA kernels: plain pointers and numbers, so that neither nvcc nor the callers need the other's headers.
// All pointers are device pointers. Every launcher returns the launch status without synchronising.
//
// Shapes: B images, n patches, D embedding width, C classes, K hypothesis rows. T is the accumulation type: double for
// float64 elements, else float; buffers of T are passed as void*.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common.h"
#include "../philox.h"

namespace reclip::cuda {

// A (B, n, X) tensor of any strides, counted in elements; X is C or D.
struct Batch {
  const void* data;
  ElementType type;
  int64_t image_stride, patch_stride, column_stride;
};

// Hypothesis rows on the device. Rows from offsets[B] on are padding: they belong to no image.
struct DeviceRows {
  const int32_t* class_of_row;  // (K), not set for padding
  const int32_t* image_of_row;  // (K), -1 for padding
  const int32_t* offsets;       // (B+1)
  const int32_t* row_of_class;  // (B, C): row within the image, or -1
  const int32_t* bad;           // (B+1): 1 for an image with invalid class ids; at B: the offsets are invalid. Null: all valid
  int64_t images, rows, classes;
  int64_t most_rows;  // at least those of any one image
};

// Where those tables are written, and what launch_hard_rows counts, set to zero: patches (K) of each row, and whether an image (B)
// holds a bad patch.
struct RowTables {
  int32_t *class_of_row, *image_of_row, *offsets, *row_of_class, *bad, *counts, *bad_patches;
};

// Class ids (K) and offsets (B+1) of few rows, passed within the launch: no copy to the device, no memory to keep until then.
struct FewRows {
  static constexpr int64_t kMost = 960;  // parameters of a kernel may take 4 KiB
  int32_t value[kMost];
};

// Makes the tables of DeviceRows from class_ids (K) and offsets (B+1) on the device, or from the values of few rows.
// Invalid ids and offsets are replaced by valid ones, so that no kernel reads out of bounds, and reported in `bad`.
cudaError_t launch_rows_table(const int64_t* class_ids, const int64_t* offsets, int64_t images, int64_t rows, int64_t classes,
                              const RowTables& to, cudaStream_t stream);
cudaError_t launch_rows_table(const FewRows& few, int64_t images, int64_t rows, int64_t classes, const RowTables& to, cudaStream_t stream);
// Makes the rows of `bad` images NaN in total (K) and area (K) of T; they may be the same.
cudaError_t launch_poison_rows(const DeviceRows& rows, bool is_double, void* total, void* area, cudaStream_t stream);

// Where the noise comes from: two words in device memory, or, if `device` is null, `key`.
struct NoiseSource {
  const int64_t* device;
  NoiseKey key;
};

// Inputs of the scores (logits - bias) * inverse_tau + noise. `bias` is (n, C) of T, or null.
struct ScoreInputs {
  Batch logits;
  const void* bias;
  int64_t bias_patch_stride, bias_class_stride;
  int64_t images, patches, classes;
  NoiseSource noise;
  double inverse_tau;
};

// row (B, n): row within the image of each patch's class, -1 for none, kBadPatch for non-finite scores.
// count (K) of patches of each row and bad (B), 1 if the image holds a bad patch, are added to, unless they are null.
// normalizer (2, B, n) of T, unless null: see launch_normalizer.
cudaError_t launch_hard_rows(const ScoreInputs& in, const DeviceRows& rows, int32_t* row, int32_t* count, int32_t* bad,
                             void* normalizer, cudaStream_t stream);
// normalizer (2, B, n) of T: the largest score of each patch, and 1 / sum of exp(score - largest), or 0 if a score is not
// finite. Not set for images without rows.
cudaError_t launch_normalizer(const ScoreInputs& in, const DeviceRows& rows, void* normalizer, cudaStream_t stream);

// log_masks (K, n) of T: logarithms of the soft masks of the hypothesis rows, NaN at bad patches. With `area` (K) given, only
// images with a row of small area are written.
cudaError_t launch_log_masks(const ScoreInputs& in, const DeviceRows& rows, const void* normalizer, const void* area, void* log_masks,
                             cudaStream_t stream);
// shares (K, n) of T: each soft mask divided by its row's area exp(log_area), 0 at bad patches.
cudaError_t launch_shares(const ScoreInputs& in, const DeviceRows& rows, const void* normalizer, const void* log_area, void* shares,
                          cudaStream_t stream);

// Gradients of the scores' inputs from the gradient (K, n) of the hypothesis rows' mask values (`log_area` null) or of their
// shares times the area, which is overwritten. totals (B, n) of T is scratch. `grad_logits.data` may be null. `bias_gradient`,
// if not null, is (groups, n, C) of T with the given strides for n and C; it gets sums over images in groups: see bias_groups().
cudaError_t launch_logit_gradient(const ScoreInputs& in, const DeviceRows& rows, const void* normalizer, void* row_gradient,
                                  const void* log_area, void* totals, Batch grad_logits, void* bias_gradient, int64_t groups,
                                  int64_t bias_patch_stride, int64_t bias_class_stride, cudaStream_t stream);
int64_t bias_groups(int64_t images, int64_t patches, int64_t classes);
cudaError_t launch_bias_sum(const void* bias_partial, bool is_double, int64_t groups, int64_t patches, int64_t classes,
                            void* grad_bias, int64_t patch_stride, int64_t class_stride, cudaStream_t stream);

// gumbel_softmax and its backward pass; masks and gradients have the dtype of the logits.
cudaError_t launch_gumbel_softmax(const ScoreInputs& in, bool hard, Batch masks, cudaStream_t stream);
cudaError_t launch_gumbel_softmax_backward(const ScoreInputs& in, Batch grad_masks, Batch grad_logits, cudaStream_t stream);

// Sums of features over each row's patches, in `pooling_chunks` parts, to be summed in order: partial (chunks, K, D) of T.
int64_t pooling_chunks(int64_t images, int64_t patches, int64_t width);
cudaError_t launch_pool_hard(const int32_t* row, const DeviceRows& rows, Batch features, int64_t patches, int64_t width,
                             void* partial, cudaStream_t stream);
cudaError_t launch_pool_soft(const void* weights, const DeviceRows& rows, Batch features, int64_t patches, int64_t width,
                             void* partial, cudaStream_t stream);
// area (K) of T from weights (K, n); areas below kSmallArea become 0. Padding gets 0.
cudaError_t launch_area_of_weights(const void* weights, const DeviceRows& rows, int64_t patches, bool is_double, void* area,
                                   cudaStream_t stream);
// From logarithms of masks (K, n) of T, replaced by weights of at most 1: their sums `total` (K), by which pooling divides, and
// the areas of the masks (K), clamped to the smallest normal number.
cudaError_t launch_scale_log_masks(void* log_masks, const DeviceRows& rows, int64_t patches, bool is_double, void* total, void* area,
                                   cudaStream_t stream);
// pooled (K, D) = sum of partial over the chunks / total; 0 for rows without area and padding, NaN where total is.
cudaError_t launch_pool_finish(const void* partial, const void* total, int64_t chunks, int64_t rows, int64_t width,
                               bool is_double, void* pooled, cudaStream_t stream);
// The same for hard masks, with area (K): the counts, or NaN for images with bad patches or invalid rows.
cudaError_t launch_pool_finish_hard(const void* partial, const int32_t* count, const int32_t* bad, const DeviceRows& rows,
                                    int64_t chunks, int64_t width, bool is_double, void* pooled, void* area, cudaStream_t stream);

// With `log_area` null, for the gradient of mask values: weight (K, D) = grad_pooled / area, shift (K) = -weight . pooled and
// of_area (K) = grad_area, which may be null for zero. Otherwise for the gradient of shares: all times the area, and log_area (K), not set for small areas.
// Rows without area contribute by grad_area only.
cudaError_t launch_pooling_gradient(const void* grad_pooled, const void* grad_area, const void* pooled, const void* area,
                                    int64_t rows, int64_t width, bool is_double, void* weight, void* shift, void* of_area,
                                    void* log_area, cudaStream_t stream);
// log_area of the rows with small areas, from their log_masks.
cudaError_t launch_small_log_areas(const void* log_masks, const void* area, const DeviceRows& rows, int64_t patches, bool is_double,
                                   void* log_area, cudaStream_t stream);
// row_gradient (K, n) = weight . feature + shift + of_area, in this order.
cudaError_t launch_row_gradient(const void* weight, const void* shift, const void* of_area, const DeviceRows& rows,
                                Batch features, int64_t patches, int64_t width, void* row_gradient, cudaStream_t stream);
// Gradient of the features, contiguous (B, n, D), from hard rows or from weights (K, n).
cudaError_t launch_feature_gradient_hard(const int32_t* row, const void* weight, const DeviceRows& rows, int64_t patches,
                                         int64_t width, Batch grad_features, cudaStream_t stream);
cudaError_t launch_feature_gradient_soft(const void* weights, const void* weight, const DeviceRows& rows, int64_t patches,
                                         int64_t width, Batch grad_features, cudaStream_t stream);

// Mask values (K, n) of T of the hypothesis rows out of (B, n, C) masks, NaN as 0 if asked; and a (K, n) gradient back
// into a zeroed (B, n, C) tensor.
cudaError_t launch_gather_rows(Batch masks, const DeviceRows& rows, int64_t patches, bool nan_to_zero, void* weights,
                               cudaStream_t stream);
cudaError_t launch_scatter_rows(const void* row_gradient, const DeviceRows& rows, int64_t patches, Batch grad_masks,
                                cudaStream_t stream);

// A (B, C, h, w) tensor of any strides.
struct Grid {
  const void* data;
  ElementType type;
  int64_t image_stride, class_stride, y_stride, x_stride;
  int64_t images, classes, height, width;
};
cudaError_t launch_upsample_argmax(const Grid& logits, int64_t height, int64_t width, int64_t* labels, cudaStream_t stream);

// Losses of upsampled maps. `partial` (B, blocks, 2): the sum of a block's pixels and their number; launch_image_means makes
// loss (B) and weight (B) = 1 / pixels of them, T both. grad_loss (B) of T.
cudaError_t launch_image_means(const double* partial, int64_t images, int64_t blocks, bool is_double, void* loss, void* weight,
                               cudaStream_t stream);
int64_t upsample_l1_blocks(int64_t channels, int64_t height, int64_t width);
cudaError_t launch_upsample_l1(const Grid& student, const Grid& teacher, const bool* valid, int64_t height, int64_t width,
                               double* partial, cudaStream_t stream);
cudaError_t launch_upsample_l1_backward(const Grid& student, const Grid& teacher, const bool* valid, int64_t height, int64_t width,
                                        const void* grad_loss, const void* weight, const Grid& gradient, cudaStream_t stream);
// normalizer (2, B, H, W) of T: the largest score of each pixel, and 1 / sum of exp(score - largest); 0 without a label.
int64_t upsample_cross_entropy_blocks(int64_t height, int64_t width);
cudaError_t launch_upsample_cross_entropy(const Grid& logits, const int64_t* labels, int64_t height, int64_t width, void* normalizer,
                                          double* partial, cudaStream_t stream);
cudaError_t launch_upsample_cross_entropy_backward(const Grid& logits, const int64_t* labels, int64_t height, int64_t width,
                                                   const void* normalizer, const void* grad_loss, const void* weight,
                                                   const Grid& gradient, cudaStream_t stream);

}  // namespace reclip::cuda
