// Scores of patches on the device: (logits - bias) * inverse_tau + Gumbel noise, computed on the fly.
//
// A block processes kPatches patches of one image: lane = patch, so that logits laid out as (C, n) are read in whole lines, and
// each of its kWarps warps takes a slice of the classes. Reductions over the classes go through shared memory, in the order of
// the warps, so that results are deterministic.
#pragma once

#include "device.cuh"

namespace reclip::cuda {

constexpr int kPatches = 32;
constexpr int kWarps = 4;

template <typename S>
struct Scores {
  using T = typename Accumulate<S>::type;
  const S* logits;
  int64_t image_stride, patch_stride, class_stride;
  const T* bias;
  int64_t bias_patch_stride, bias_class_stride;
  int64_t patches;
  int classes;
  NoiseSource noise;
  T inverse_tau;

  explicit Scores(const ScoreInputs& in)
      : logits(static_cast<const S*>(in.logits.data)), image_stride(in.logits.image_stride), patch_stride(in.logits.patch_stride),
        class_stride(in.logits.column_stride), bias(static_cast<const T*>(in.bias)), bias_patch_stride(in.bias_patch_stride),
        bias_class_stride(in.bias_class_stride), patches(in.patches), classes(static_cast<int>(in.classes)), noise(in.noise),
        inverse_tau(static_cast<T>(in.inverse_tau)) {}

  __device__ __forceinline__ NoiseKey key() const {
    if (!noise.device) return noise.key;
    return {static_cast<uint64_t>(noise.device[0]), static_cast<uint64_t>(noise.device[1])};
  }
};

// -log(-log(u)) of a random word. The inner logarithm must be accurate near u = 1, where the noise is large; the outer one
// may have an error of about 1e-7, so it uses the hardware's.
__device__ __forceinline__ float gumbel(uint32_t word, float) {
  const float u = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
  return -__logf(-log_positive(u));
}
__device__ __forceinline__ double gumbel(uint32_t word, double) {
  const double u = (static_cast<double>(word >> 9) + 0.5) * 0x1p-23;
  return -log(-log(u));
}

// The classes of one warp; slices begin at multiples of 4, since Philox gives noise for four classes at a time.
struct Slice {
  int begin, end;
  __device__ Slice(int classes, int warp) {
    const int width = ((classes + kWarps - 1) / kWarps + 3) / 4 * 4;
    begin = min(warp * width, classes);
    end = min(begin + width, classes);
  }
};

// Calls use(class, score) for each class of the slice, ascending.
template <typename S, typename Use>
__device__ __forceinline__ void for_scores(const Scores<S>& s, int64_t image, int64_t patch, Slice slice, const Use& use) {
  using T = typename Accumulate<S>::type;
  const uint64_t element = static_cast<uint64_t>(image * s.patches + patch) * static_cast<uint64_t>(s.classes) +
                           static_cast<uint64_t>(slice.begin);
  const S* logits = s.logits + image * s.image_stride + patch * s.patch_stride;
  const T* bias = s.bias ? s.bias + patch * s.bias_patch_stride : nullptr;
  const NoiseKey key = s.key();
  uint64_t counter = element >> 2;
  for (int first = slice.begin - static_cast<int>(element & 3); first < slice.end; first += 4, ++counter) {
    T value[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int c = first + k;
      const bool mine = c >= slice.begin && c < slice.end;
      value[k] = mine ? to_accumulate(logits[c * s.class_stride]) : T(0);
      if (bias && mine) value[k] -= bias[c * s.bias_class_stride];
    }
    uint32_t word[4];
    philox4x32(counter, key, word);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int c = first + k;
      if (c >= slice.begin && c < slice.end) use(c, value[k] * s.inverse_tau + gumbel(word[k], T(0)));
    }
  }
}

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
  T top, scale, log_total;
  bool bad;

  __device__ PatchSoftmax(const Scores<S>& scores, int64_t image_, int64_t patch_, T* kept_, T (*shared)[kPatches])
      : s(scores), image(image_), patch(patch_), slice(scores.classes, threadIdx.y), kept(kept_) {
    T own_top = lowest<T>(), total = T(0), nonfinite = T(0);
    if constexpr (Stored) {
      for_scores(s, image, patch, slice, [&](int c, T y) {
        kept[c * kPatches + threadIdx.x] = y;
        own_top = y > own_top ? y : own_top;
        nonfinite += y * T(0);
      });
      top = max_warps(own_top, shared);
      for (int c = slice.begin; c < slice.end; ++c) total += exp_fast(kept[c * kPatches + threadIdx.x] - top);
    } else {
      for_scores(s, image, patch, slice, [&](int, T y) {
        if (y > own_top) {
          total = total * exp_fast(own_top - y) + T(1);
          own_top = y;
        } else {
          total += exp_fast(y - own_top);
        }
        nonfinite += y * T(0);
      });
      top = max_warps(own_top, shared);
      total = slice.begin < slice.end ? total * exp_fast(own_top - top) : T(0);
    }
    total = sum_warps(total, shared);
    scale = T(1) / total;
    log_total = log_positive(total);
    bad = !(sum_warps(nonfinite, shared) == T(0));
  }

  // Calls use(class, score minus the top score) for the classes of this warp; the difference gives the probability.
  template <typename Use>
  __device__ __forceinline__ void for_own(const Use& use) const {
    if constexpr (Stored) {
      for (int c = slice.begin; c < slice.end; ++c) use(c, kept[c * kPatches + threadIdx.x] - top);
    } else {
      for_scores(s, image, patch, slice, [&](int c, T y) { use(c, y - top); });
    }
  }
  __device__ __forceinline__ T probability(T below) const { return exp_fast(below) * scale; }
  __device__ __forceinline__ T log_probability(T below) const { return below - log_total; }
};

// The backward pass of the softmax: calls emit(class, gradient of the logit), zero at bad patches. gradient_of(class, below) is
// the gradient g of the probability p: the logit's is inverse_tau * p * (g - sum p g). With OfLogs it is the gradient u of
// log p: the logit's is inverse_tau * (u - p * sum u).
template <bool OfLogs, typename S, bool Stored, typename GradientOf, typename Emit>
__device__ __forceinline__ void softmax_backward(const PatchSoftmax<S, Stored>& softmax,
                                                 typename Accumulate<S>::type (*shared)[kPatches],
                                                 const GradientOf& gradient_of, const Emit& emit) {
  using T = typename Accumulate<S>::type;
  T own = T(0);
  softmax.for_own([&](int c, T below) {
    if constexpr (OfLogs) own += gradient_of(c, below);
    else own += softmax.probability(below) * gradient_of(c, below);
  });
  const T total = sum_warps(own, shared);
  softmax.for_own([&](int c, T below) {
    const T p = softmax.probability(below), g = gradient_of(c, below);
    emit(c, softmax.bad ? T(0) : softmax.s.inverse_tau * (OfLogs ? g - p * total : p * (g - total)));
  });
}

// Upper bound of the other shared memory of these kernels; it counts against the same limits.
constexpr int64_t kSharedLimit = kWarps * kPatches * sizeof(double);
// With at most this much per block, several blocks fit on a multiprocessor, and one on the smallest (64 KiB, sm_75).
constexpr int64_t kKeptLimit = 64 * 1024 - kSharedLimit;

template <typename T>
int64_t kept_bytes(int64_t classes) {
  return classes * kPatches * static_cast<int64_t>(sizeof(T));
}

// Launches Kernel<S, stored> over all (image, patch tile) tasks, or over `tasks`.
template <typename Kernel, typename... Args>
cudaError_t launch_tiles(Kernel kernel, int64_t tasks, int64_t bytes, cudaStream_t stream, Args... args) {
  if (tasks == 0) return cudaSuccess;
  if (bytes + kSharedLimit > 48 * 1024) {
    // The same value in every call, so that one thread cannot lower it while another launches the same kernel.
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kKeptLimit));
    if (status != cudaSuccess) return status;
  }
  kernel<<<static_cast<unsigned>(tasks), dim3(kPatches, kWarps), static_cast<size_t>(bytes), stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace reclip::cuda
