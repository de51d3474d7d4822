// Kernels of rectify_and_pool that read logits: rows of patches in the forward pass, gradients of logits and bias in the backward.
#include "cuda/scores.cuh"

namespace reclip::cuda {
namespace {

// The argmax of each patch, as a row of its image's hypothesis. Integer atomics: their order does not matter.
template <typename S>
__global__ void __launch_bounds__(kPatches* kWarps)
    hard_rows_kernel(Scores<S> s, DeviceRows rows, int64_t tiles, int32_t* row, int32_t* count, int32_t* bad) {
  using T = typename Accumulate<S>::type;
  __shared__ T shared_top[kWarps][kPatches];
  __shared__ int shared_class[kWarps][kPatches];
  __shared__ T shared_nonfinite[kWarps][kPatches];
  const int64_t image = blockIdx.x / tiles, patch = blockIdx.x % tiles * kPatches + threadIdx.x;
  const int32_t first_row = rows.offsets[image];
  if (first_row == rows.offsets[image + 1]) {
    if (threadIdx.y == 0 && patch < s.patches) row[image * s.patches + patch] = -1;
    return;
  }
  T top = lowest<T>(), nonfinite = T(0);
  int best = 0;
  for_scores(s, image, patch < s.patches ? patch : s.patches - 1, Slice(s.classes, threadIdx.y), [&](int c, T y) {
    if (y > top) {
      top = y;
      best = c;
    }
    nonfinite += y * T(0);
  });
  shared_top[threadIdx.y][threadIdx.x] = top;
  shared_class[threadIdx.y][threadIdx.x] = best;
  shared_nonfinite[threadIdx.y][threadIdx.x] = nonfinite;
  __syncthreads();
  if (threadIdx.y != 0 || patch >= s.patches) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) {
    if (shared_top[w][threadIdx.x] > top) {  // strictly: the lowest class wins a tie
      top = shared_top[w][threadIdx.x];
      best = shared_class[w][threadIdx.x];
    }
    nonfinite += shared_nonfinite[w][threadIdx.x];
  }
  int32_t own = kBadPatch;
  if (nonfinite == T(0)) {
    own = rows.row_of_class[image * s.classes + best];
    if (own >= 0) atomicAdd(count + first_row + own, 1);
  } else {
    atomicOr(bad + image, 1);
  }
  row[image * s.patches + patch] = own;
}

template <typename T>
__device__ __forceinline__ bool any_small(const T* area, int32_t begin, int32_t end) {
  for (int32_t r = begin; r < end; ++r)
    if (area[r] < T(kSmallArea)) return true;
  return false;
}

// Logarithms of the soft masks of the hypothesis rows, for all images or for those with a row of small area; with `log_area`,
// each patch's share of its row's area instead.
template <typename S, bool Stored>
__global__ void __launch_bounds__(kPatches* kWarps)
    soft_rows_kernel(Scores<S> s, DeviceRows rows, int64_t tiles, const typename Accumulate<S>::type* area,
                     const typename Accumulate<S>::type* log_area, typename Accumulate<S>::type* out) {
  using T = typename Accumulate<S>::type;
  extern __shared__ __align__(16) unsigned char dynamic[];
  __shared__ T shared[kWarps][kPatches];
  const int64_t image = blockIdx.x / tiles, patch = blockIdx.x % tiles * kPatches + threadIdx.x;
  const int32_t first_row = rows.offsets[image];
  if (first_row == rows.offsets[image + 1]) return;
  if (area && !any_small(area, first_row, rows.offsets[image + 1])) return;
  const PatchSoftmax<S, Stored> softmax(s, image, patch < s.patches ? patch : s.patches - 1, reinterpret_cast<T*>(dynamic), shared);
  if (patch >= s.patches) return;
  softmax.for_own([&](int c, T below) {
    const int32_t own = rows.row_of_class[image * s.classes + c];
    if (own < 0) return;
    const int64_t row = first_row + own;
    T value = softmax.log_probability(below);
    if (log_area) value = softmax.bad ? T(0) : exp_fast(value - log_area[row]);
    else if (softmax.bad) value = not_a_number<T>();
    out[row * s.patches + patch] = value;
  });
}

// A block processes its tile of patches in all images of one group, so that no other block adds to its part of `bias_partial`.
// Hard: row_gradient is the gradient of the mask values (straight-through). Soft: the gradient of the shares times the area.
template <typename S, bool Stored, bool Hard>
__global__ void __launch_bounds__(kPatches* kWarps)
    logit_gradient_kernel(Scores<S> s, DeviceRows rows, int64_t tiles, int64_t groups,
                          const typename Accumulate<S>::type* row_gradient,
                          const typename Accumulate<S>::type* log_area, S* grad_logits, int64_t image_stride,
                          int64_t patch_stride, int64_t class_stride, typename Accumulate<S>::type* bias_partial) {
  using T = typename Accumulate<S>::type;
  extern __shared__ __align__(16) unsigned char dynamic[];
  __shared__ T shared[kWarps][kPatches];
  const int64_t group = blockIdx.x / tiles, patch = blockIdx.x % tiles * kPatches + threadIdx.x;
  const bool active = patch < s.patches;
  const int64_t begin = group * rows.images / groups, end = (group + 1) * rows.images / groups;
  bool begun = false;
  for (int64_t image = begin; image < end; ++image) {
    const int32_t first_row = rows.offsets[image];
    S* to = grad_logits ? grad_logits + image * image_stride + patch * patch_stride : nullptr;
    if (first_row == rows.offsets[image + 1]) {
      const Slice slice(s.classes, threadIdx.y);
      if (to && active)
        for (int c = slice.begin; c < slice.end; ++c) to[c * class_stride] = from_accumulate<S>(T(0));
      continue;
    }
    const PatchSoftmax<S, Stored> softmax(s, image, active ? patch : s.patches - 1, reinterpret_cast<T*>(dynamic), shared);
    const int32_t* row_of_class = rows.row_of_class + image * s.classes;
    const T* own_gradient = row_gradient + first_row * s.patches + softmax.patch;
    softmax_backward</*OfLogs=*/!Hard>(
        softmax, shared,
        [&](int c, T below) {
          const int32_t own = row_of_class[c];
          if (own < 0) return T(0);
          const T gradient = own_gradient[own * s.patches];
          if constexpr (Hard) return gradient;
          else return exp_fast(softmax.log_probability(below) - log_area[first_row + own]) * gradient;
        },
        [&](int c, T gradient) {
          if (!active) return;
          if (to) to[c * class_stride] = from_accumulate<S>(gradient);
          if (bias_partial) {
            T* sum = bias_partial + (group * s.classes + c) * s.patches + patch;
            *sum = begun ? *sum - gradient : -gradient;
          }
        });
    begun = true;
    __syncthreads();  // the next image reuses the shared memory
  }
  if (bias_partial && !begun && active) {
    const Slice slice(s.classes, threadIdx.y);
    for (int c = slice.begin; c < slice.end; ++c) bias_partial[(group * s.classes + c) * s.patches + patch] = T(0);
  }
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

cudaError_t launch_soft_rows(const ScoreInputs& in, const DeviceRows& rows, const void* area, const void* log_area, void* out,
                             cudaStream_t stream) {
  const int64_t tiles = ceil_div(in.patches, kPatches);
  return dispatch(in.logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const int64_t bytes = kept_bytes<T>(in.classes);
    const auto launch = [&](auto kernel, int64_t kept) {
      return launch_tiles(kernel, in.images * tiles, kept, stream, Scores<S>(in), rows, tiles, static_cast<const T*>(area),
                          static_cast<const T*>(log_area), static_cast<T*>(out));
    };
    return bytes <= kKeptLimit ? launch(soft_rows_kernel<S, true>, bytes) : launch(soft_rows_kernel<S, false>, 0);
  });
}

}  // namespace

cudaError_t launch_hard_rows(const ScoreInputs& in, const DeviceRows& rows, int32_t* row, int32_t* count, int32_t* bad,
                             cudaStream_t stream) {
  const int64_t tiles = ceil_div(in.patches, kPatches);
  return dispatch(in.logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    return launch_tiles(hard_rows_kernel<S>, in.images * tiles, 0, stream, Scores<S>(in), rows, tiles, row, count, bad);
  });
}

cudaError_t launch_log_masks(const ScoreInputs& in, const DeviceRows& rows, const void* area, void* log_masks,
                             cudaStream_t stream) {
  return launch_soft_rows(in, rows, area, nullptr, log_masks, stream);
}

cudaError_t launch_shares(const ScoreInputs& in, const DeviceRows& rows, const void* log_area, void* shares, cudaStream_t stream) {
  return launch_soft_rows(in, rows, nullptr, log_area, shares, stream);
}

// Enough blocks to fill a large GPU, few enough groups to keep the partial sums small. Depends on the shapes alone, so that the
// order of summation is the same on every device.
int64_t bias_groups(int64_t images, int64_t patches) {
  const int64_t wanted = ceil_div(528, ceil_div(patches > 0 ? patches : 1, kPatches));
  return wanted < 1 ? 1 : wanted > images ? (images > 0 ? images : 1) : wanted;
}

cudaError_t launch_logit_gradient(const ScoreInputs& in, const DeviceRows& rows, const void* row_gradient, const void* log_area,
                                  Batch grad_logits, void* bias_partial, int64_t groups, cudaStream_t stream) {
  const int64_t tiles = ceil_div(in.patches, kPatches);
  return dispatch(in.logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const int64_t bytes = kept_bytes<T>(in.classes);
    const auto launch = [&](auto kernel, int64_t kept) {
      return launch_tiles(kernel, groups * tiles, kept, stream, Scores<S>(in), rows, tiles, groups,
                          static_cast<const T*>(row_gradient), static_cast<const T*>(log_area),
                          static_cast<S*>(const_cast<void*>(grad_logits.data)),
                          grad_logits.image_stride, grad_logits.patch_stride, grad_logits.column_stride,
                          static_cast<T*>(bias_partial));
    };
    if (bytes > kKeptLimit)
      return log_area ? launch(logit_gradient_kernel<S, false, false>, 0) : launch(logit_gradient_kernel<S, false, true>, 0);
    return log_area ? launch(logit_gradient_kernel<S, true, false>, bytes) : launch(logit_gradient_kernel<S, true, true>, bytes);
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
