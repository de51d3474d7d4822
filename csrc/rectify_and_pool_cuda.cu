// Kernels of rectify_and_pool that read logits. Forward pass: one pass over all classes for the argmax, the softmax's
// normalizer, or both. Backward pass: one over all classes for the gradients. Soft masks, and sums that involve the gradient
// of the masks, are computed for the classes of the hypothesis alone.
#include "cuda/scores.cuh"

namespace reclip::cuda {
namespace {

// Of each patch, from which p = exp(score - top) * scale; scale is 0 if a score is not finite.
template <typename T>
struct Normalizer {
  T* top;
  T* scale;

  Normalizer(void* data, int64_t images, int64_t patches)
      : top(static_cast<T*>(data)), scale(data ? static_cast<T*>(data) + images * patches : nullptr) {}
};

// Blocks that should fit on a multiprocessor at once: the compiler then keeps to registers for them, without spilling any.
template <typename S, int Blocks>
constexpr int kBlocksAtOnce = sizeof(S) == 8 ? 1 : Blocks;

// Argmax: the class of the largest score as a row of its image's hypothesis. Integer atomics: their order does not matter.
template <typename S, bool Argmax, bool Normalize>
__global__ void __launch_bounds__(kPatches* kWarps, kBlocksAtOnce<S, 4>)
    peaks_kernel(Scores<S> s, DeviceRows rows, int64_t tiles, int32_t* row, int32_t* count, int32_t* bad,
                 Normalizer<typename Accumulate<S>::type> normalizer) {
  using T = typename Accumulate<S>::type;
  __shared__ SharedPeaks<T> shared;
  const int64_t image = blockIdx.x / tiles, patch = blockIdx.x % tiles * kPatches + threadIdx.x;
  const int32_t first_row = rows.offsets[image];
  if (first_row == rows.offsets[image + 1]) {
    if (Argmax && threadIdx.y == 0 && patch < s.patches) row[image * s.patches + patch] = -1;
    return;
  }
  const Peak<T> peak = find_peak<Normalize, false>(s, image, patch < s.patches ? patch : s.patches - 1, shared);
  if (threadIdx.y != 0 || patch >= s.patches) return;
  const bool finite = peak.nonfinite == T(0);
  if constexpr (Normalize) {
    normalizer.top[image * s.patches + patch] = peak.top;
    normalizer.scale[image * s.patches + patch] = finite ? T(1) / peak.total : T(0);
  }
  if constexpr (Argmax) {
    int32_t own = kBadPatch;
    if (finite) {
      own = rows.row_of_class[image * s.classes + peak.best];
      if (own >= 0 && count) atomicAdd(count + first_row + own, 1);
    } else if (bad) {
      atomicOr(bad + image, 1);
    }
    row[image * s.patches + patch] = own;
  }
}

template <typename T>
__device__ __forceinline__ bool any_small(const T* area, int32_t begin, int32_t end) {
  for (int32_t r = begin; r < end; ++r)
    if (area[r] < T(kSmallArea)) return true;
  return false;
}

// Logarithms of the soft masks of the hypothesis rows, for all images or for those with a row of small area; with `log_area`,
// each patch's share of its row's area instead.
template <typename S>
__global__ void __launch_bounds__(kPatches* kWarps)
    soft_rows_kernel(Scores<S> s, DeviceRows rows, int64_t tiles, Normalizer<typename Accumulate<S>::type> normalizer,
                     const typename Accumulate<S>::type* area, const typename Accumulate<S>::type* log_area,
                     typename Accumulate<S>::type* out) {
  using T = typename Accumulate<S>::type;
  const int64_t image = blockIdx.x / tiles, patch = blockIdx.x % tiles * kPatches + threadIdx.x;
  const int32_t first = rows.offsets[image], last = rows.offsets[image + 1];
  if (patch >= s.patches || first == last || (area && !any_small(area, first, last))) return;
  const int64_t at = image * s.patches + patch;
  const T top = normalizer.top[at], scale = normalizer.scale[at];
  const bool bad = !(scale > T(0));
  const T log_scale = bad ? T(0) : log_positive(scale);
  for (int32_t r = first + threadIdx.y; r < last; r += kWarps) {
    T value = score_of(s, image, patch, rows.class_of_row[r]) - top + log_scale;
    if (log_area) value = bad ? T(0) : exp_fast(value - log_area[r]);
    else if (bad) value = not_a_number<T>();
    out[r * s.patches + patch] = value;
  }
}

// What all classes of a patch share in the gradient of its logits: the sum of p g over the hypothesis rows, g = row_gradient
// (hard), or the sum of u = share * g, the gradient of log p, which replaces g in row_gradient (soft).
template <typename S, bool Hard>
__global__ void __launch_bounds__(kPatches* kWarps)
    patch_totals_kernel(Scores<S> s, DeviceRows rows, int64_t tiles, Normalizer<typename Accumulate<S>::type> normalizer,
                        const typename Accumulate<S>::type* log_area, typename Accumulate<S>::type* row_gradient,
                        typename Accumulate<S>::type* totals) {
  using T = typename Accumulate<S>::type;
  __shared__ T shared[kWarps][kPatches];
  const int64_t image = blockIdx.x / tiles, patch = blockIdx.x % tiles * kPatches + threadIdx.x;
  const int32_t first = rows.offsets[image], last = rows.offsets[image + 1];
  if (first == last) return;
  T own = T(0);
  if (patch < s.patches) {
    const int64_t at = image * s.patches + patch;
    const T top = normalizer.top[at], scale = normalizer.scale[at];
    const bool bad = !(scale > T(0));
    const T log_scale = Hard || bad ? T(0) : log_positive(scale);
    for (int32_t r = first + threadIdx.y; r < last; r += kWarps) {
      T* gradient = row_gradient + r * s.patches + patch;
      const T below = score_of(s, image, patch, rows.class_of_row[r]) - top;
      T value;
      if constexpr (Hard) {
        value = exp_fast(below) * scale * *gradient;
      } else {
        value = bad ? T(0) : exp_fast(below + log_scale - log_area[r]) * *gradient;
        *gradient = value;
      }
      own += value;
    }
  }
  shared[threadIdx.y][threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.y != 0 || patch >= s.patches) return;
  T total = shared[0][threadIdx.x];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) total += shared[w][threadIdx.x];
  totals[image * s.patches + patch] = total;
}

// Classes that a thread of logit_gradient_kernel owns: their bias gradients are summed in registers.
constexpr int kOwnClasses = 8;

// Words of noise for the classes first .. first + kOwnClasses - 1, whose elements need not begin a group of four.
template <bool Aligned>
__device__ __forceinline__ void noise_words(uint64_t element, NoiseKey key, uint32_t (&word)[kOwnClasses]) {
  if constexpr (Aligned) {
#pragma unroll
    for (int q = 0; q < kOwnClasses / 4; ++q) philox4x32((element >> 2) + q, key, word + 4 * q);
  } else {
    uint32_t all[kOwnClasses + 4];
#pragma unroll
    for (int q = 0; q < kOwnClasses / 4 + 1; ++q) philox4x32((element >> 2) + q, key, all + 4 * q);
    const int shift = static_cast<int>(element & 3);
#pragma unroll
    for (int k = 0; k < kOwnClasses; ++k)  // selects: a run-time index would move the array to local memory
      word[k] = shift == 0 ? all[k] : shift == 1 ? all[k + 1] : shift == 2 ? all[k + 2] : all[k + 3];
  }
}

// A thread takes its classes of a patch through all images of a group; `bias_gradient` is that of the group. Hard: row_gradient
// is the gradient g of the mask values (straight-through), and that of a logit inverse_tau * p * (g - sum p g). Soft: it is the
// gradient u of log p, and that of a logit inverse_tau * (u - p * sum u).
template <typename S, bool Hard, bool Aligned>
__global__ void __launch_bounds__(kPatches* kWarps, kBlocksAtOnce<S, 3>)
    logit_gradient_kernel(Scores<S> s, DeviceRows rows, int64_t tiles, int64_t chunks, int64_t groups,
                          Normalizer<typename Accumulate<S>::type> normalizer, const typename Accumulate<S>::type* row_gradient,
                          const typename Accumulate<S>::type* totals, S* grad_logits, int64_t image_stride, int64_t patch_stride,
                          int64_t class_stride, bool packed, typename Accumulate<S>::type* bias_gradient, int64_t group_stride,
                          int64_t bias_patch_stride, int64_t bias_class_stride) {
  using T = typename Accumulate<S>::type;
  const int64_t patch = blockIdx.x % tiles * kPatches + threadIdx.x, task = blockIdx.x / tiles;
  const int64_t chunk = task % chunks, group = task / chunks;
  const int first = static_cast<int>(chunk * blockDim.y + threadIdx.y) * kOwnClasses;
  if (patch >= s.patches || first >= s.classes) return;
  const int own = min(kOwnClasses, s.classes - first);
  const NoiseKey key = s.key();
  T bias[kOwnClasses], bias_sum[kOwnClasses];
#pragma unroll
  for (int k = 0; k < kOwnClasses; ++k) {
    bias[k] = s.bias && k < own ? s.bias[patch * s.bias_patch_stride + (first + k) * s.bias_class_stride] : T(0);
    bias_sum[k] = T(0);
  }
  const int64_t end = (group + 1) * rows.images / groups;
  for (int64_t image = group * rows.images / groups; image < end; ++image) {
    const int64_t at = image * s.patches + patch;
    S* to = grad_logits ? grad_logits + image * image_stride + patch * patch_stride + first * class_stride : nullptr;
    const int32_t first_row = rows.offsets[image];
    const T scale = first_row == rows.offsets[image + 1] ? T(0) : normalizer.scale[at];
    T value[kOwnClasses];
    if (scale > T(0)) {
      const T top = normalizer.top[at], total = totals[at];
      ClassRow<S> logits = s.logits_of(image, patch).from(first);
      uint32_t word[kOwnClasses];
      noise_words<Aligned>(s.element(image, patch, first), key, word);
      const int32_t* const row_of_class = rows.row_of_class + image * s.classes + first;
      int32_t row[kOwnClasses];
#pragma unroll
      for (int q = 0; q < kOwnClasses; q += 4) {
        if (Aligned && q < own) {
          T four[4];
          logits.next(four);
          const Pack<int32_t, 4> rows_of_four = load_pack<int32_t, 4>(row_of_class + q);
#pragma unroll
          for (int k = 0; k < 4; ++k) value[q + k] = four[k], row[q + k] = rows_of_four.at[k];
        } else {
#pragma unroll
          for (int k = q; k < q + 4; ++k) {
            value[k] = k < own ? to_accumulate(logits.data[k * logits.stride]) : T(0);
            row[k] = k < own ? row_of_class[k] : -1;
          }
        }
      }
      int32_t any_row = -1;  // at most classes there is none: the same for all threads of the warp
#pragma unroll
      for (int k = 0; k < kOwnClasses; ++k) {
        any_row = max(any_row, row[k]);
        value[k] = exp_fast(s.of(value[k] - bias[k], word[k]) - top) * scale;
      }
#pragma unroll
      for (int k = 0; k < kOwnClasses; ++k) {
        const T p = value[k];
        T g = T(0);
        if (any_row >= 0 && row[k] >= 0) g = row_gradient[(first_row + row[k]) * s.patches + patch];
        value[k] = s.inverse_tau * (Hard ? p * (g - total) : g - p * total);
        bias_sum[k] -= value[k];
      }
    } else {
#pragma unroll
      for (int k = 0; k < kOwnClasses; ++k) value[k] = T(0);
    }
    if (!to) continue;
    if (packed) {
#pragma unroll
      for (int q = 0; q < kOwnClasses; q += 4) {
        Pack<S, 4> pack;
#pragma unroll
        for (int k = 0; k < 4; ++k) pack.at[k] = from_accumulate<S>(value[q + k]);
        if (q < own) *reinterpret_cast<Pack<S, 4>*>(to + q) = pack;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kOwnClasses; ++k)
        if (k < own) to[k * class_stride] = from_accumulate<S>(value[k]);
    }
  }
  if (!bias_gradient) return;
  T* sum = bias_gradient + group * group_stride + patch * bias_patch_stride + first * bias_class_stride;
#pragma unroll
  for (int k = 0; k < kOwnClasses; ++k)
    if (k < own) sum[k * bias_class_stride] = bias_sum[k];
}

template <typename T>
__global__ void bias_sum_kernel(const T* partial, int64_t groups, int64_t patches, int64_t classes, T* out, int64_t patch_stride,
                                int64_t class_stride) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= patches * classes) return;
  T total = T(0);
  for (int64_t g = 0; g < groups; ++g) total += partial[g * patches * classes + at];
  out[at % patches * patch_stride + at / patches * class_stride] = total;
}

template <bool Argmax>
cudaError_t launch_peaks(const ScoreInputs& in, const DeviceRows& rows, int32_t* row, int32_t* count, int32_t* bad,
                         void* normalizer, cudaStream_t stream) {
  const int64_t tiles = ceil_div(in.patches, kPatches);
  return dispatch(in.logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Normalizer<typename Accumulate<S>::type> out(normalizer, in.images, in.patches);
    const auto launch = [&](auto kernel) {
      return launch_tiles(kernel, in.images * tiles, 0, stream, Scores<S>(in), rows, tiles, row, count, bad, out);
    };
    if constexpr (!Argmax) return launch(peaks_kernel<S, false, true>);
    else return normalizer ? launch(peaks_kernel<S, true, true>) : launch(peaks_kernel<S, true, false>);
  });
}

cudaError_t launch_soft_rows(const ScoreInputs& in, const DeviceRows& rows, const void* normalizer, const void* area,
                             const void* log_area, void* out, cudaStream_t stream) {
  const int64_t tiles = ceil_div(in.patches, kPatches);
  return dispatch(in.logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    return launch_tiles(soft_rows_kernel<S>, in.images * tiles, 0, stream, Scores<S>(in), rows, tiles,
                        Normalizer<T>(const_cast<void*>(normalizer), in.images, in.patches), static_cast<const T*>(area),
                        static_cast<const T*>(log_area), static_cast<T*>(out));
  });
}

// Blocks of logit_gradient_kernel for one group: tiles of patches, times chunks of classes.
struct ClassChunks {
  int64_t tiles, chunks;
  unsigned warps;

  ClassChunks(int64_t patches, int64_t classes) : tiles(ceil_div(patches, kPatches)) {
    const int64_t owners = ceil_div(classes, kOwnClasses);
    chunks = ceil_div(owners, kWarps);
    warps = static_cast<unsigned>(ceil_div(owners, chunks));
  }
};

}  // namespace

cudaError_t launch_hard_rows(const ScoreInputs& in, const DeviceRows& rows, int32_t* row, int32_t* count, int32_t* bad,
                             void* normalizer, cudaStream_t stream) {
  return launch_peaks<true>(in, rows, row, count, bad, normalizer, stream);
}

cudaError_t launch_normalizer(const ScoreInputs& in, const DeviceRows& rows, void* normalizer, cudaStream_t stream) {
  return launch_peaks<false>(in, rows, nullptr, nullptr, nullptr, normalizer, stream);
}

cudaError_t launch_log_masks(const ScoreInputs& in, const DeviceRows& rows, const void* normalizer, const void* area, void* log_masks,
                             cudaStream_t stream) {
  return launch_soft_rows(in, rows, normalizer, area, nullptr, log_masks, stream);
}

cudaError_t launch_shares(const ScoreInputs& in, const DeviceRows& rows, const void* normalizer, const void* log_area, void* shares,
                          cudaStream_t stream) {
  return launch_soft_rows(in, rows, normalizer, nullptr, log_area, shares, stream);
}

// Enough blocks to fill a large GPU, few enough groups to keep the partial sums small. Depends on the shapes alone, so that the
// order of summation is the same on every device.
int64_t bias_groups(int64_t images, int64_t patches, int64_t classes) {
  if (images * patches * classes == 0) return 1;
  const ClassChunks grid(patches, classes);
  const int64_t wanted = ceil_div(1056, grid.tiles * grid.chunks);
  return wanted < images ? wanted : images;
}

cudaError_t launch_logit_gradient(const ScoreInputs& in, const DeviceRows& rows, const void* normalizer, void* row_gradient,
                                  const void* log_area, void* totals, Batch grad_logits, void* bias_gradient, int64_t groups,
                                  int64_t bias_patch_stride, int64_t bias_class_stride, cudaStream_t stream) {
  const ClassChunks grid(in.patches, in.classes);
  if (in.images * grid.tiles * grid.chunks == 0) return cudaSuccess;
  return dispatch(in.logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const Scores<S> scores(in);
    const Normalizer<T> of_patches(const_cast<void*>(normalizer), in.images, in.patches);
    T* const own_gradient = static_cast<T*>(row_gradient);
    T* const own_totals = static_cast<T*>(totals);
    const auto sum = [&](auto kernel) {
      return launch_tiles(kernel, in.images * grid.tiles, 0, stream, scores, rows, grid.tiles, of_patches,
                          static_cast<const T*>(log_area), own_gradient, own_totals);
    };
    const cudaError_t status = log_area ? sum(patch_totals_kernel<S, false>) : sum(patch_totals_kernel<S, true>);
    if (status != cudaSuccess) return status;
    S* const out = static_cast<S*>(const_cast<void*>(grad_logits.data));
    const bool packed = packed_classes<S>(out, grad_logits.image_stride, grad_logits.patch_stride, grad_logits.column_stride, in.classes);
    const auto launch = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(groups * grid.chunks * grid.tiles), dim3(kPatches, grid.warps), 0, stream>>>(
          scores, rows, grid.tiles, grid.chunks, groups, of_patches, own_gradient, own_totals, out, grad_logits.image_stride,
          grad_logits.patch_stride, grad_logits.column_stride, packed, static_cast<T*>(bias_gradient), in.patches * in.classes,
          bias_patch_stride, bias_class_stride);
      return cudaGetLastError();
    };
    if (in.classes % 4 == 0) return log_area ? launch(logit_gradient_kernel<S, false, true>) : launch(logit_gradient_kernel<S, true, true>);
    return log_area ? launch(logit_gradient_kernel<S, false, false>) : launch(logit_gradient_kernel<S, true, false>);
  });
}

cudaError_t launch_bias_sum(const void* bias_partial, bool is_double, int64_t groups, int64_t patches, int64_t classes,
                            void* grad_bias, int64_t patch_stride, int64_t class_stride, cudaStream_t stream) {
  if (patches * classes == 0) return cudaSuccess;
  return dispatch_accumulate(is_double, [&](auto tag) {
    using T = typename decltype(tag)::type;
    bias_sum_kernel<T><<<static_cast<unsigned>(ceil_div(patches * classes, 256)), 256, 0, stream>>>(
        static_cast<const T*>(bias_partial), groups, patches, classes, static_cast<T*>(grad_bias), patch_stride, class_stride);
    return cudaGetLastError();
  });
}

}  // namespace reclip::cuda
