// Scores of patches on the device: (logits - bias) * inverse_tau + Gumbel noise, computed on the fly.
//
// A block processes kPatches patches of one image: lane = patch, so that logits laid out as (C, n) are read in whole lines, and
// each of its kWarps warps takes a slice of the classes. Reductions over the classes go through shared memory, in the order of
// the warps, so that results are deterministic.
#pragma once

#include "device.cuh"

namespace reclip::cuda {

constexpr int kPatches = 32;
constexpr int kWarps = 8;

// Values of consecutive classes, read four at a time: by one instruction, if they lie together.
template <typename S>
struct ClassRow {
  const S* data;
  int64_t stride;
  bool packed;

  __device__ __forceinline__ ClassRow from(int first) const { return {data + first * stride, stride, packed}; }
  // The first four; then moves on by four.
  __device__ __forceinline__ void next(typename Accumulate<S>::type (&value)[4]) {
    if (packed) {
      const Pack<S, 4> pack = load_pack<S, 4>(data);
#pragma unroll
      for (int k = 0; k < 4; ++k) value[k] = to_accumulate(pack.at[k]);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) value[k] = to_accumulate(data[k * stride]);
    }
    data += 4 * stride;
  }
};

// Whether each group of four classes of each row lies in one pack.
template <typename S>
bool packed_classes(const void* data, int64_t outer_stride, int64_t patch_stride, int64_t class_stride, int64_t classes) {
  constexpr uintptr_t bytes = sizeof(S) * 4 < 16 ? sizeof(S) * 4 : 16;
  return class_stride == 1 && classes % 4 == 0 && outer_stride % 4 == 0 && patch_stride % 4 == 0 &&
         reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

// The uniform number ((word >> 9) + 0.5) * 2^-23 of a random word; exact, without a conversion instruction.
__device__ __forceinline__ float uniform(uint32_t word) {
  return (__uint_as_float((word >> 9) | 0x3F800000u) - 1.0f) + 0x1p-24f;
}
// -log(-log(u)) of a random word. The inner logarithm must be accurate near u = 1, where the noise is large; the outer one
// may have an error of about 1e-7, so it uses the hardware's.
__device__ __forceinline__ float gumbel(uint32_t word, float) { return -__logf(-log_positive(uniform(word))); }
__device__ __forceinline__ double gumbel(uint32_t word, double) {
  const double u = (static_cast<double>(word >> 9) + 0.5) * 0x1p-23;
  return -log(-log(u));
}

template <typename S>
struct Scores {
  using T = typename Accumulate<S>::type;
  const S* logits;
  int64_t image_stride, patch_stride, class_stride;
  const T* bias;
  int64_t bias_patch_stride, bias_class_stride;
  int64_t patches;
  int classes;
  bool packed, bias_packed;
  NoiseSource noise;
  T inverse_tau;

  explicit Scores(const ScoreInputs& in)
      : logits(static_cast<const S*>(in.logits.data)), image_stride(in.logits.image_stride), patch_stride(in.logits.patch_stride),
        class_stride(in.logits.column_stride), bias(static_cast<const T*>(in.bias)), bias_patch_stride(in.bias_patch_stride),
        bias_class_stride(in.bias_class_stride), patches(in.patches), classes(static_cast<int>(in.classes)),
        packed(packed_classes<S>(logits, image_stride, patch_stride, class_stride, in.classes)),
        bias_packed(packed_classes<T>(bias, 0, bias_patch_stride, bias_class_stride, in.classes)), noise(in.noise),
        inverse_tau(static_cast<T>(in.inverse_tau)) {}

  __device__ __forceinline__ NoiseKey key() const {
    if (!noise.device) return noise.key;
    return {static_cast<uint64_t>(noise.device[0]), static_cast<uint64_t>(noise.device[1])};
  }
  // The score of a rectified logit, rounded alike wherever it is computed: the softmax is normalized by another kernel.
  __device__ __forceinline__ T of(T rectified, uint32_t word) const { return multiply_add(rectified, inverse_tau, gumbel(word, T(0))); }
  // The number of a class's noise.
  __device__ __forceinline__ uint64_t element(int64_t image, int64_t patch, int c) const {
    return static_cast<uint64_t>(image * patches + patch) * static_cast<uint64_t>(classes) + static_cast<uint64_t>(c);
  }
  __device__ __forceinline__ ClassRow<S> logits_of(int64_t image, int64_t patch) const {
    return {logits + image * image_stride + patch * patch_stride, class_stride, packed};
  }
  __device__ __forceinline__ ClassRow<T> bias_of(int64_t patch) const {
    return {bias + patch * bias_patch_stride, bias_class_stride, bias_packed};
  }
};

// The classes of one warp; slices begin at multiples of 4, since Philox gives noise for four classes at a time.
struct Slice {
  int begin, end;
  __device__ Slice(int classes, int warp) {
    const int width = ((classes + kWarps - 1) / kWarps + 3) / 4 * 4;
    begin = min(warp * width, classes);
    end = min(begin + width, classes);
  }
};

// Calls use(first, score) for groups of four classes of the slice, ascending: score[k] belongs to class first + k, and is
// -infinity outside of the slice. `nonfinite` stays 0 if all scores of the slice are finite. Aligned: `classes` is a multiple of
// 4, so that a group never lies partly outside.
template <bool Aligned, typename S, typename Use>
__device__ __forceinline__ void for_groups_of(const Scores<S>& s, int64_t image, int64_t patch, Slice slice,
                                              typename Accumulate<S>::type& nonfinite, const Use& use) {
  using T = typename Accumulate<S>::type;
  if (slice.begin == slice.end) return;
  const uint64_t element = s.element(image, patch, slice.begin);
  ClassRow<S> logits = s.logits_of(image, patch);
  ClassRow<T> bias = s.bias_of(patch);
  if constexpr (Aligned) {
    logits = logits.from(slice.begin);
    bias = bias.from(slice.begin);
  }
  const NoiseKey key = s.key();
  uint64_t counter = element >> 2;
  for (int first = slice.begin - (Aligned ? 0 : static_cast<int>(element & 3)); first < slice.end; first += 4, ++counter) {
    T score[4];
    if constexpr (Aligned) {
      logits.next(score);
      if (s.bias) {
        T own[4];
        bias.next(own);
#pragma unroll
        for (int k = 0; k < 4; ++k) score[k] -= own[k];
      }
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int c = first + k;
        const bool mine = c >= slice.begin && c < slice.end;
        score[k] = mine ? to_accumulate(logits.data[c * logits.stride]) : T(0);
        if (s.bias && mine) score[k] -= bias.data[c * bias.stride];
      }
    }
    uint32_t word[4];
    philox4x32(counter, key, word);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int c = first + k;
      score[k] = s.of(score[k], word[k]);
      if (Aligned || (c >= slice.begin && c < slice.end)) nonfinite += score[k] * T(0);
      else score[k] = lowest<T>();
    }
    use(first, score);
  }
}
template <typename S, typename Use>
__device__ __forceinline__ void for_groups(const Scores<S>& s, int64_t image, int64_t patch, Slice slice,
                                           typename Accumulate<S>::type& nonfinite, const Use& use) {
  if (s.classes % 4 == 0) for_groups_of<true>(s, image, patch, slice, nonfinite, use);
  else for_groups_of<false>(s, image, patch, slice, nonfinite, use);
}

// The score of one class.
template <typename S>
__device__ __forceinline__ typename Accumulate<S>::type score_of(const Scores<S>& s, int64_t image, int64_t patch, int c) {
  using T = typename Accumulate<S>::type;
  const uint64_t element = s.element(image, patch, c);
  uint32_t word[4];
  philox4x32(element >> 2, s.key(), word);
  const uint32_t low = element & 1 ? word[1] : word[0], high = element & 1 ? word[3] : word[2];
  T value = to_accumulate(s.logits[image * s.image_stride + patch * s.patch_stride + c * s.class_stride]);
  if (s.bias) value -= s.bias[patch * s.bias_patch_stride + c * s.bias_class_stride];
  return s.of(value, element & 2 ? high : low);
}

// The largest score of a patch, its class, the sum of exp(score - largest), and whether all scores are finite.
template <typename T>
struct Peak {
  T top = lowest<T>(), total = T(0), nonfinite = T(0);
  int best = 0;

  template <bool Sum>
  __device__ __forceinline__ void take(int first, const T (&score)[4]) {
    const T largest = max_of(max_of(score[0], score[1]), max_of(score[2], score[3]));
    if (largest > top) {  // strictly, and the first of the four: the lowest class wins a tie
      if constexpr (Sum) total *= exp_fast(top - largest);
      top = largest;
      best = first + (score[0] == largest ? 0 : score[1] == largest ? 1 : score[2] == largest ? 2 : 3);
    }
    if constexpr (Sum) {
#pragma unroll
      for (int k = 0; k < 4; ++k) total += exp_fast(score[k] - top);
    }
  }
};
template <typename T>
struct SharedPeaks {
  T top[kWarps][kPatches], total[kWarps][kPatches], nonfinite[kWarps][kPatches];
  int best[kWarps][kPatches];
};
// The peaks of a block's patches over all classes, in the order of the warps; for all threads with `ToAll`, else for warp 0.
template <bool Sum, bool ToAll, typename S>
__device__ __forceinline__ Peak<typename Accumulate<S>::type> find_peak(const Scores<S>& s, int64_t image, int64_t patch,
                                                                        SharedPeaks<typename Accumulate<S>::type>& shared) {
  using T = typename Accumulate<S>::type;
  Peak<T> own;
  for_groups(s, image, patch, Slice(s.classes, threadIdx.y), own.nonfinite,
             [&](int first, const T (&score)[4]) { own.template take<Sum>(first, score); });
  shared.top[threadIdx.y][threadIdx.x] = own.top;
  shared.nonfinite[threadIdx.y][threadIdx.x] = own.nonfinite;
  shared.best[threadIdx.y][threadIdx.x] = own.best;
  if constexpr (Sum) shared.total[threadIdx.y][threadIdx.x] = own.total;
  __syncthreads();
  Peak<T> all;
  if (!ToAll && threadIdx.y != 0) return all;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (shared.top[w][threadIdx.x] > all.top) {
      all.top = shared.top[w][threadIdx.x];
      all.best = shared.best[w][threadIdx.x];
    }
    all.nonfinite += shared.nonfinite[w][threadIdx.x];
  }
  if constexpr (Sum) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all.total += shared.total[w][threadIdx.x] * exp_fast(shared.top[w][threadIdx.x] - all.top);
  }
  return all;
}

// Launches a kernel of kPatches x kWarps threads a block over `tasks` blocks.
template <typename Kernel, typename... Args>
cudaError_t launch_tiles(Kernel kernel, int64_t tasks, int64_t bytes, cudaStream_t stream, Args... args) {
  if (tasks == 0) return cudaSuccess;
  kernel<<<static_cast<unsigned>(tasks), dim3(kPatches, kWarps), static_cast<size_t>(bytes), stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace reclip::cuda
