// The arithmetic of the CPU operators on one tile of patches, compiled once per instruction set and chosen at run time.
//
// A tile is up to `ld` patches of one image, laid out class-major: value (c, i) of a tile is at [c * ld + i]. `ld` is a
// multiple of kTileStep; lanes count .. ld-1 are padding. Values are T (float, or double for float64 input).
// Pointers to `void` hold elements of the input dtype that the table was made for.
#pragma once

#include <cstdint>

#include "../common.h"
#include "../philox.h"

namespace reclip::cpu {

constexpr int kTileStep = 16;  // lanes of the widest vector: one 64-byte register of float
constexpr int kTileMax = 64;
constexpr int kNoiseSlack = 260;  // noise is generated in blocks of 256 and may begin 3 elements early

// Location of a tile's elements: strides in elements.
struct Strided {
  const void* data;
  int64_t patch_stride;
  int64_t class_stride;
};

// Where an output coordinate lies between two grid lines, as F.interpolate(align_corners=False) has it.
template <typename T>
struct Position {
  int64_t below, above;
  T weight;  // of `above`
};

template <typename T>
struct TileOps {
  int64_t element_size;

  // y = (logits - bias) * inverse_tau + noise; bad[i] is non-zero (NaN) if any score of patch i is not finite.
  // `bias.data` may be null; its elements are T. `noise` is scratch of ld * classes + kNoiseSlack values. `first_element` is the row-major
  // index of (patch 0, class 0) in the whole batch.
  void (*scores)(Strided logits, Strided bias, int count, int ld, int64_t classes, uint64_t first_element, NoiseKey key,
                 T inverse_tau, T* noise, T* y, T* bad);

  // best[i] = the lowest class of the largest score of patch i.
  void (*argmax)(const T* y, int ld, int64_t classes, int32_t* best);

  // y = softmax over the classes, in place. log_rows[r * ld + i] = its logarithm for class class_of_row[r], accurate even where
  // the value underflows in T; rows_count may be 0.
  void (*softmax)(T* y, int ld, int64_t classes, const int64_t* class_of_row, int64_t rows_count, T* log_rows);

  // values = exp(values - top), where values - top <= 0.
  void (*exp_below)(T* values, int64_t count, T top);

  // rows[r * ld + i] = sum_d weights[r * width + d] * features[i * patch_stride + d].
  void (*dots)(const void* features, int64_t patch_stride, int count, int ld, const T* weights, int64_t rows_count,
               int64_t width, T* rows);

  // sums[r * sums_stride + d] += sum_i rows[r * rows_stride + i] * features[i * patch_stride + d], d < width, i < count.
  void (*accumulate)(const T* rows, int64_t rows_stride, int64_t rows_count, const void* features, int64_t patch_stride,
                     int count, int64_t width, T* sums, int64_t sums_stride);

  // sums[row[i] * sums_stride + d] += features[i * patch_stride + d] for row[i] >= 0.
  void (*segment_sum)(const int32_t* row, const void* features, int64_t patch_stride, int count, int64_t width, T* sums,
                      int64_t sums_stride);

  // out[i * patch_stride + d] = sum_r rows[r * ld + i] * weights[r * width + d]; `out` holds the input dtype.
  void (*spread)(const T* rows, int ld, int64_t rows_count, const T* weights, int count, int64_t width, void* out,
                 int64_t patch_stride);

  // Softmax backward for a gradient that is zero outside the hypothesis: with s_i = sum_r p[class_of_row[r]][i] * rows[r][i],
  // gradient(c, i) = inverse_tau * p[c][i] * (rows[row_of_class[c]][i] - s_i), zero for bad patches. `of_logs`: rows holds the
  // gradient of log p, and gradient(c, i) = inverse_tau * (rows[row_of_class[c]][i] - p[c][i] * sum_r rows[r][i]). Written to
  // `out` unless its data is null, subtracted from `bias_gradient` (a tile) unless null.
  void (*logit_gradient)(const T* p, int count, int ld, int64_t classes, const T* rows, const int32_t* row_of_class,
                         const int64_t* class_of_row, int64_t rows_count, bool of_logs, const T* bad, T inverse_tau,
                         Strided out, T* bias_gradient);

  // The same for a gradient given for every class.
  void (*dense_logit_gradient)(const T* p, int count, int ld, int64_t classes, Strided gradient, const T* bad,
                               T inverse_tau, Strided out);

  // y = a tile of the given tensor; and the reverse copy.
  void (*load)(Strided from, int count, int ld, int64_t classes, T* y);
  void (*store)(const T* y, int count, int ld, int64_t classes, Strided to);

  // Labels of `count` pixels between two columns of scores (each `classes` values, padded to `padded` with copies of
  // the first): argmax over c of (1 - t) * left[c] + t * right[c]. `weight` is padded to a multiple of kTileStep.
  // `candidates` is scratch of `padded` ids. Labels are -1 if any score is not finite.
  void (*label_between)(const T* left, const T* right, int64_t classes, int64_t padded, const T* weight, int64_t count,
                        int32_t* candidates, int64_t* labels);

  // out = (1 - t) * above + t * below, `length` values (a multiple of kTileStep).
  void (*blend)(const T* above, const T* below, T t, int64_t length, T* out);

  // y += factor * x, `length` values (a multiple of kTileStep).
  void (*add_scaled)(const T* x, T factor, int64_t length, T* y);

  // One row of pixels, interpolated between the columns of a blended line: value (c, column) of a line lies at
  // [column * ld + c], and pixels[x] says between which columns pixel x is. `ld` is at most kTileMax but in cross_entropy.

  // The sum over the valid pixels and all channels of |student - teacher|.
  double (*l1_distance)(const T* student, const Position<T>* student_pixels, const T* teacher,
                        const Position<T>* teacher_pixels, const bool* valid, int64_t width, int ld);

  // sums (a line like the student's) += the gradient of that sum.
  void (*l1_gradient)(const T* student, const Position<T>* student_pixels, const T* teacher,
                      const Position<T>* teacher_pixels, const bool* valid, int64_t width, int ld, T* sums);

  // The sum over the pixels with a label of -log softmax(value)[label]. A label of -1 is none. top[x] = the largest value,
  // inverse[x] = 1 / sum_c exp(value_c - top); both 0 for pixels without a label. `values` is scratch of ld. NaN if a score
  // is not finite.
  double (*cross_entropy)(const T* line, const Position<T>* pixels, const int64_t* labels, int64_t width, int64_t classes,
                          int64_t ld, T* values, T* top, T* inverse);

  // sums += the gradient of that sum for the classes from first_class on, which the line holds.
  void (*cross_entropy_gradient)(const T* line, const Position<T>* pixels, const int64_t* labels, const T* top,
                                 const T* inverse, int64_t width, int64_t first_class, int ld, T* sums);
};

// The table for an input dtype, for the best instruction set of this CPU. PyTorch's environment variable ATEN_CPU_CAPABILITY
// (default, avx2, avx512) selects a lower one.
template <typename T>
const TileOps<T>& tile_ops(ElementType type);

const char* tile_capability();

// One table per instruction set; float16, bfloat16 and float32 accumulate in float.
#define RECLIP_DECLARE_TILES(isa)                       \
  namespace isa {                                       \
  const TileOps<float>& tiles_float(ElementType type);  \
  const TileOps<double>& tiles_double();                \
  }
RECLIP_DECLARE_TILES(baseline)
RECLIP_DECLARE_TILES(avx2)
RECLIP_DECLARE_TILES(avx512)
#undef RECLIP_DECLARE_TILES

}  // namespace reclip::cpu
