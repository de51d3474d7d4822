// A product of small tiles, out (32, 128) += sum_k a (k, 32) b (k, 128), for the ragged batches of the pooling kernels.
//
// 128 threads: a warp owns 8 of the 32 rows, a lane 4 of the 128 columns; tiles of 16 k go through shared memory, with the next
// one prefetched into registers. Sums over k in ascending order. A narrow product has a column a lane, and 64 k a tile: as many
// bytes in flight for a quarter of the columns.
#pragma once

#include "device.cuh"

namespace reclip::cuda {

constexpr int kProductRows = 32;
constexpr int kProductColumns = 128;
constexpr int kProductThreads = 128;
template <int LaneColumns>
constexpr int kProductDepth = 64 / LaneColumns;

// A matrix operand: element (k, x) is at data[k * k_stride + x * x_stride]; outside of depth x width it counts as 0.
template <typename S>
struct Operand {
  const S* data;
  int64_t k_stride, x_stride;
  int64_t depth, width;
};

// One operand's tile: the next one in registers, the current one in shared memory. KInner: k is the contiguous dimension in
// memory (the tile is transposed on store); Vector elements are loaded at once along it.
template <typename S, int Width, int Depth, bool KInner, int Vector>
struct Stage {
  using T = typename Accumulate<S>::type;
  static constexpr int kPitch = Width + 4;  // a warp's transposed stores then hit different banks
  static constexpr int kPacks = Depth * Width / Vector / kProductThreads;
  static_assert(kPacks >= 1 && Depth * Width % (Vector * kProductThreads) == 0, "whole packs for each thread");
  Pack<S, Vector> flying[kPacks];

  __device__ __forceinline__ static void place(int pack, int& k, int& x) {
    if constexpr (KInner) {
      constexpr int along = Depth / Vector;  // packs along k
      constexpr int low = Vector >= 4 ? 2 : along;   // of these, taken by neighbouring threads: a 32-byte sector
      k = (pack % low + pack / (low * Width) * low) * Vector;
      x = pack / low % Width;
    } else {
      k = pack / (Width / Vector);
      x = pack % (Width / Vector) * Vector;
    }
  }

  __device__ __forceinline__ void fetch(const Operand<S>& from, int64_t k0, int64_t x0) {
#pragma unroll
    for (int q = 0; q < kPacks; ++q) {
      int k, x;
      place(q * kProductThreads + static_cast<int>(threadIdx.x), k, x);
      const int64_t gk = k0 + k, gx = x0 + x;
      const S* at = from.data + gk * from.k_stride + gx * from.x_stride;
      const bool inside = gk < from.depth && gx < from.width;
      // The contiguous extent is a multiple of Vector, so a pack is entirely inside or outside.
      if (inside) {
        flying[q] = load_pack<S, Vector>(at);
      } else {
#pragma unroll
        for (int v = 0; v < Vector; ++v) flying[q].at[v] = from_accumulate<S>(T(0));
      }
    }
  }

  __device__ __forceinline__ void settle(T (*tile)[kPitch]) const {
#pragma unroll
    for (int q = 0; q < kPacks; ++q) {
      int k, x;
      place(q * kProductThreads + static_cast<int>(threadIdx.x), k, x);
#pragma unroll
      for (int v = 0; v < Vector; ++v) tile[k + (KInner ? v : 0)][x + (KInner ? 0 : v)] = to_accumulate(flying[q].at[v]);
    }
  }
};

// sum[r][c] for rows 8 * warp + r and columns LaneColumns * lane + c of the tile at (row0, column0).
template <typename A, bool AInner, int AVector, typename B, bool BInner, int BVector, int LaneColumns>
__device__ __forceinline__ void tile_product(const Operand<A>& a, const Operand<B>& b, int64_t row0, int64_t column0,
                                             typename Accumulate<B>::type (&sum)[8][LaneColumns]) {
  using T = typename Accumulate<B>::type;
  constexpr int kDepth = kProductDepth<LaneColumns>;
  using StageA = Stage<A, kProductRows, kDepth, AInner, AVector>;
  using StageB = Stage<B, 32 * LaneColumns, kDepth, BInner, BVector>;
  __shared__ __align__(16) T tile_a[kDepth][StageA::kPitch];
  __shared__ __align__(16) T tile_b[kDepth][StageB::kPitch];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool busy = row0 + warp * 8 < a.width;
  StageA next_a;
  StageB next_b;
  next_a.fetch(a, 0, row0);
  next_b.fetch(b, 0, column0);
  for (int64_t k0 = 0; k0 < b.depth; k0 += kDepth) {
    __syncthreads();
    next_a.settle(tile_a);
    next_b.settle(tile_b);
    __syncthreads();
    if (k0 + kDepth < b.depth) {
      next_a.fetch(a, k0 + kDepth, row0);
      next_b.fetch(b, k0 + kDepth, column0);
    }
    if (busy) {
#pragma unroll 16
      for (int k = 0; k < kDepth; ++k) {
        const Pack<T, 4> low = load_pack<T, 4>(&tile_a[k][warp * 8]);
        const Pack<T, 4> high = load_pack<T, 4>(&tile_a[k][warp * 8 + 4]);
        const Pack<T, LaneColumns> column = load_pack<T, LaneColumns>(&tile_b[k][lane * LaneColumns]);
#pragma unroll
        for (int c = 0; c < LaneColumns; ++c) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            sum[r][c] = multiply_add(low.at[r], column.at[c], sum[r][c]);
            sum[r + 4][c] = multiply_add(high.at[r], column.at[c], sum[r + 4][c]);
          }
        }
      }
    }
  }
}

inline bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0; }

// Whether rows of `width` elements can be read in packs of four.
template <typename S>
bool in_packs(const S* data, int64_t image_stride, int64_t patch_stride, int64_t width) {
  return width % 4 == 0 && image_stride % 4 == 0 && patch_stride % 4 == 0 && aligned(data, sizeof(Pack<S, 4>) < 16 ? sizeof(Pack<S, 4>) : 16);
}

}  // namespace reclip::cuda
