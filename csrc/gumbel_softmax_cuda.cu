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

template <typename S>
__global__ void __launch_bounds__(kPatches* kWarps) hard_masks_kernel(Scores<S> s, int64_t tiles, Output<S> masks) {
  using T = typename Accumulate<S>::type;
  __shared__ T shared_top[kWarps][kPatches];
  __shared__ int shared_class[kWarps][kPatches];
  __shared__ T shared[kWarps][kPatches];
  const int64_t image = blockIdx.x / tiles, patch = blockIdx.x % tiles * kPatches + threadIdx.x;
  const Slice slice(s.classes, threadIdx.y);
  T top = lowest<T>(), nonfinite = T(0);
  int best = 0;
  for_scores(s, image, patch < s.patches ? patch : s.patches - 1, slice, [&](int c, T y) {
    if (y > top) {
      top = y;
      best = c;
    }
    nonfinite += y * T(0);
  });
  shared_top[threadIdx.y][threadIdx.x] = top;
  shared_class[threadIdx.y][threadIdx.x] = best;
  const bool bad = !(sum_warps(nonfinite, shared) == T(0));
  top = shared_top[0][threadIdx.x];
  best = shared_class[0][threadIdx.x];
#pragma unroll
  for (int w = 1; w < kWarps; ++w)
    if (shared_top[w][threadIdx.x] > top) {  // strictly: the lowest class wins a tie
      top = shared_top[w][threadIdx.x];
      best = shared_class[w][threadIdx.x];
    }
  if (patch >= s.patches) return;
  S* to = masks.of(image, patch);
  for (int c = slice.begin; c < slice.end; ++c)
    to[c * masks.class_stride] = from_accumulate<S>(bad ? not_a_number<T>() : c == best ? T(1) : T(0));
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
  softmax.for_own([&](int c, T below) {
    to[c * masks.class_stride] = from_accumulate<S>(softmax.bad ? not_a_number<T>() : softmax.probability(below));
  });
}

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
  softmax_backward</*OfLogs=*/false>(
      softmax, shared, [&](int c, T) { return to_accumulate(from[c * gradient.class_stride]); },
      [&](int c, T value) {
        if (active) to[c * grad_logits.class_stride] = from_accumulate<S>(value);
      });
}

}  // namespace

cudaError_t launch_gumbel_softmax(const ScoreInputs& in, bool hard, Batch masks, cudaStream_t stream) {
  const int64_t tiles = ceil_div(in.patches, kPatches), tasks = in.images * tiles;
  return dispatch(in.logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const int64_t bytes = kept_bytes<typename Accumulate<S>::type>(in.classes);
    const Output<S> out(masks);
    if (hard) return launch_tiles(hard_masks_kernel<S>, tasks, 0, stream, Scores<S>(in), tiles, out);
    if (bytes <= kKeptLimit) return launch_tiles(soft_masks_kernel<S, true>, tasks, bytes, stream, Scores<S>(in), tiles, out);
    return launch_tiles(soft_masks_kernel<S, false>, tasks, 0, stream, Scores<S>(in), tiles, out);
  });
}

cudaError_t launch_gumbel_softmax_backward(const ScoreInputs& in, Batch grad_masks, Batch grad_logits, cudaStream_t stream) {
  const int64_t tiles = ceil_div(in.patches, kPatches), tasks = in.images * tiles;
  return dispatch(in.logits.type, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const int64_t bytes = kept_bytes<typename Accumulate<S>::type>(in.classes);
    const Output<const S> from(grad_masks);
    const Output<S> to(grad_logits);
    if (bytes <= kKeptLimit)
      return launch_tiles(masks_backward_kernel<S, true>, tasks, bytes, stream, Scores<S>(in), tiles, from, to);
    return launch_tiles(masks_backward_kernel<S, false>, tasks, 0, stream, Scores<S>(in), tiles, from, to);
  });
}

}  // namespace reclip::cuda
