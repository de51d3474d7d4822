// Kernels of gumbel_softmax; the backward pass recomputes noise and masks.
#include "cuda/scores.cuh"

namespace reclip::cuda {
namespace {

template <typename S>
struct Output {
  S* data;
  int64_t image_stride, patch_stride, class_stride;

  explicit Output(const Batch& batch)
      : data(static_cast<S*>(const_cast<void*>(batch.data))), image_stride(batch.image_stride), patch_stride(batch.patch_stride),
        class_stride(batch.column_stride) {}
  __device__ S* of(int64_t image, int64_t patch) const { return data + image * image_stride + patch * patch_stride; }
};

// Sum (or maximum) over the warps of each lane's value, in the order of the warps; ends with all threads in step.
template <typename T>
__device__ __forceinline__ T sum_warps(T value, T (*shared)[kPatches]) {
  shared[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  T total = shared[0][threadIdx.x];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) total += shared[w][threadIdx.x];
  __syncthreads();
  return total;
}
template <typename T>
__device__ __forceinline__ T max_warps(T value, T (*shared)[kPatches]) {
  shared[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  T top = shared[0][threadIdx.x];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) top = shared[w][threadIdx.x] > top ? shared[w][threadIdx.x] : top;
  __syncthreads();
  return top;
}

// The softmax of a block's patches. Stored: scores are kept in shared memory, [class][lane]; otherwise each use reads the
// logits again and recomputes them.
template <typename S, bool Stored>
struct PatchSoftmax {
  using T = typename Accumulate<S>::type;
  const Scores<S>& s;
  int64_t image, patch;
  Slice slice;
  T* kept;
  T top, scale;
  bool bad;

  __device__ PatchSoftmax(const Scores<S>& scores, int64_t image_, int64_t patch_, T* kept_, T (*shared)[kPatches])
      : s(scores), image(image_), patch(patch_), slice(scores.classes, threadIdx.y), kept(kept_) {
    Peak<T> own;
    for_groups(s, image, patch, slice, own.nonfinite, [&](int first, const T (&score)[4]) {
      own.template take<!Stored>(first, score);
      if constexpr (Stored) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (first + k >= slice.begin && first + k < slice.end) kept[(first + k) * kPatches + threadIdx.x] = score[k];
      }
    });
    top = max_warps(own.top, shared);
    if constexpr (Stored)
      for (int c = slice.begin; c < slice.end; ++c) own.total += exp_fast(kept[c * kPatches + threadIdx.x] - top);
    else own.total = slice.begin < slice.end ? own.total * exp_fast(own.top - top) : T(0);
    scale = T(1) / sum_warps(own.total, shared);
    bad = !(sum_warps(own.nonfinite, shared) == T(0));
  }

  // Calls use(class, probability) for the classes of this warp.
  template <typename Use>
  __device__ __forceinline__ void for_own(const Use& use) const {
    if constexpr (Stored) {
      for (int c = slice.begin; c < slice.end; ++c) use(c, exp_fast(kept[c * kPatches + threadIdx.x] - top) * scale);
    } else {
      T ignored = T(0);
      for_groups(s, image, patch, slice, ignored, [&](int first, const T (&score)[4]) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (first + k >= slice.begin && first + k < slice.end) use(first + k, exp_fast(score[k] - top) * scale);
      });
    }
  }
};

template <typename S>
__global__ void __launch_bounds__(kPatches* kWarps) hard_masks_kernel(Scores<S> s, int64_t tiles, Output<S> masks) {
  using T = typename Accumulate<S>::type;
  __shared__ SharedPeaks<T> shared;
  const int64_t image = blockIdx.x / tiles, patch = blockIdx.x % tiles * kPatches + threadIdx.x;
  const Peak<T> peak = find_peak<false, true>(s, image, patch < s.patches ? patch : s.patches - 1, shared);
  if (patch >= s.patches) return;
  const bool bad = !(peak.nonfinite == T(0));
  const Slice slice(s.classes, threadIdx.y);
  S* to = masks.of(image, patch);
  for (int c = slice.begin; c < slice.end; ++c)
    to[c * masks.class_stride] = from_accumulate<S>(bad ? not_a_number<T>() : c == peak.best ? T(1) : T(0));
}

template <typename S, bool Stored>
__global__ void __launch_bounds__(kPatches* kWarps) soft_masks_kernel(Scores<S> s, int64_t tiles, Output<S> masks) {
  using T = typename Accumulate<S>::type;
  extern __shared__ __align__(16) unsigned char dynamic[];
  __shared__ T shared[kWarps][kPatches];
  const int64_t image = blockIdx.x / tiles, patch = blockIdx.x % tiles * kPatches + threadIdx.x;
  const PatchSoftmax<S, Stored> softmax(s, image, patch < s.patches ? patch : s.patches - 1, reinterpret_cast<T*>(dynamic), shared);
  if (patch >= s.patches) return;
  S* to = masks.of(image, patch);
  softmax.for_own([&](int c, T p) { to[c * masks.class_stride] = from_accumulate<S>(softmax.bad ? not_a_number<T>() : p); });
}

// The gradient of a logit is inverse_tau * p * (g - sum p g), zero at bad patches.
template <typename S, bool Stored>
__global__ void __launch_bounds__(kPatches* kWarps)
    masks_backward_kernel(Scores<S> s, int64_t tiles, Output<const S> gradient, Output<S> grad_logits) {
  using T = typename Accumulate<S>::type;
  extern __shared__ __align__(16) unsigned char dynamic[];
  __shared__ T shared[kWarps][kPatches];
  const int64_t image = blockIdx.x / tiles, patch = blockIdx.x % tiles * kPatches + threadIdx.x;
  const bool active = patch < s.patches;
  const PatchSoftmax<S, Stored> softmax(s, image, active ? patch : s.patches - 1, reinterpret_cast<T*>(dynamic), shared);
  const S* from = gradient.of(image, softmax.patch);
  S* to = grad_logits.of(image, softmax.patch);
  T own = T(0);
  softmax.for_own([&](int c, T p) { own += p * to_accumulate(from[c * gradient.class_stride]); });
  const T total = sum_warps(own, shared);
  softmax.for_own([&](int c, T p) {
    const T value = softmax.bad ? T(0) : s.inverse_tau * (p * (to_accumulate(from[c * gradient.class_stride]) - total));
    if (active) to[c * grad_logits.class_stride] = from_accumulate<S>(value);
  });
}

// The scores of a block, and the most that are kept: several blocks then fit on a multiprocessor, and one on the smallest
// (64 KiB, sm_75), together with the other shared memory.
template <typename T>
int64_t kept_bytes(int64_t classes) {
  return classes * kPatches * static_cast<int64_t>(sizeof(T));
}
template <typename T>
constexpr int64_t kKeptLimit = 64 * 1024 - kWarps * kPatches * static_cast<int64_t>(sizeof(T));

template <typename T, typename Kernel, typename... Args>
cudaError_t launch_kept(Kernel kernel, int64_t tasks, int64_t bytes, cudaStream_t stream, Args... args) {
  if (bytes + kWarps * kPatches * static_cast<int64_t>(sizeof(T)) <= 48 * 1024)  // allowed without asking
    return launch_tiles(kernel, tasks, bytes, stream, args...);
  // The same value in every call, so that one thread cannot lower it while another launches the same kernel.
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kKeptLimit<T>));
  return status != cudaSuccess ? status : launch_tiles(kernel, tasks, bytes, stream, args...);
}

}  // namespace

cudaError_t launch_gumbel_softmax(const ScoreInputs& in, bool hard, Batch masks, cudaStream_t stream) {
  const int64_t tiles = ceil_div(in.patches, kPatches), tasks = in.images * tiles;
  return dispatch(in.logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const int64_t bytes = kept_bytes<T>(in.classes);
    const Output<S> out(masks);
    if (hard) return launch_tiles(hard_masks_kernel<S>, tasks, 0, stream, Scores<S>(in), tiles, out);
    if (bytes <= kKeptLimit<T>) return launch_kept<T>(soft_masks_kernel<S, true>, tasks, bytes, stream, Scores<S>(in), tiles, out);
    return launch_tiles(soft_masks_kernel<S, false>, tasks, 0, stream, Scores<S>(in), tiles, out);
  });
}

cudaError_t launch_gumbel_softmax_backward(const ScoreInputs& in, Batch grad_masks, Batch grad_logits, cudaStream_t stream) {
  const int64_t tiles = ceil_div(in.patches, kPatches), tasks = in.images * tiles;
  return dispatch(in.logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = typename Accumulate<S>::type;
    const int64_t bytes = kept_bytes<T>(in.classes);
    const Output<const S> from(grad_masks);
    const Output<S> to(grad_logits);
    if (bytes <= kKeptLimit<T>)
      return launch_kept<T>(masks_backward_kernel<S, true>, tasks, bytes, stream, Scores<S>(in), tiles, from, to);
    return launch_tiles(masks_backward_kernel<S, false>, tasks, 0, stream, Scores<S>(in), tiles, from, to);
  });
}

}  // namespace reclip::cuda
