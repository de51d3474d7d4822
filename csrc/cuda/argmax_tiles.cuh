// Labels of bilinearly upsampled scores where a map grows at least eightfold. In a small tile of pixels few classes can win: those
// that are not below one strong class, the champion, all over the tile. Only these are evaluated at its pixels.
#pragma once

#include "bilinear.cuh"

namespace reclip::cuda {

constexpr int kTileSide = 8;  // a warp's tile: 8 x 8 pixels, two a lane
constexpr int kTiles = 8;     // a block's tiles, side by side
constexpr int kTileThreads = 32 * kTiles;
template <typename T>
constexpr int kTileWords = sizeof(T) == 8 ? 3 : 6;  // classes at a time, in words of 32 bits: 24 KB of shared memory
constexpr int kTileGridRows = 3;                    // at most, of a tile: two cells
constexpr int kTileGridColumns = kTiles + 2;        // at most, of a block's tiles
constexpr int kTileGrid = kTileGridRows * kTileGridColumns + 1;  // odd: the same point of 32 classes lies in 32 banks

// Coordinates of pixels are 32-bit numbers here.
inline bool tiles_apply(int64_t in, int64_t out) { return out / kTileSide >= in && out < (int64_t{1} << 30); }

// The number of the lowest bit that is set: the exponent of that bit as a number.
__device__ __forceinline__ int lowest_bit(uint32_t bits) {
  return static_cast<int>(__float_as_uint(static_cast<float>(bits & (0u - bits))) >> 23) - 127;
}

// The grid lines around a coordinate, as offsets in a class's grid points.
template <typename T>
struct Between {
  int below, above;
  T weight;  // of `above`
};

// Scores of one class between two grid columns, on the grid rows around y.
template <typename T>
struct Blends {
  T below, above;

  __device__ __forceinline__ Blends(const T* points, const Between<T>& y, const Between<T>& x)
      : below(mix(points[y.below + x.below], points[y.below + x.above], x.weight)),
        above(mix(points[y.above + x.below], points[y.above + x.above], x.weight)) {}
  __device__ __forceinline__ T at(T weight) const { return mix(below, above, weight); }
};

// Sets the bits of the classes that are somewhere in the tile not below the champion. The difference of two classes is bilinear
// between grid lines: it is negative in the whole tile if it is at the corners and where a grid line crosses the tile (kX, kY).
template <bool kX, bool kY, typename T>
__device__ __forceinline__ void mark_candidates(const T* grid, int champion, int count, const Between<T>* rows,
                                                const Between<T>* columns, int32_t* candidates) {
  const Between<T> top = rows[0], bottom = rows[kTileSide - 1], left = columns[0], right = columns[kTileSide - 1];
  constexpr int kRows = kY ? 3 : 2, kColumns = kX ? 3 : 2;
  const int y[3] = {top.below, top.above, bottom.above}, x[3] = {left.below, left.above, right.above};
  T of_champion[kRows][kColumns];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) of_champion[i][j] = grid[champion * kTileGrid + y[i] + x[j]];

  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int c = lane; c < count; c += 32) {
    T at_edges[kRows][kColumns];  // at the left edge, at the right edge, and at the column between if there is one
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      T difference[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) difference[j] = grid[c * kTileGrid + y[i] + x[j]] - of_champion[i][j];
      at_edges[i][0] = mix(difference[0], difference[1], left.weight);
      at_edges[i][1] = mix(difference[kColumns - 2], difference[kColumns - 1], right.weight);
      if constexpr (kX) at_edges[i][2] = difference[1];
    }
    bool below = true;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      below &= mix(at_edges[0][j], at_edges[1][j], top.weight) < T(0);
      below &= mix(at_edges[kRows - 2][j], at_edges[kRows - 1][j], bottom.weight) < T(0);
      if constexpr (kY) below &= at_edges[1][j] < T(0);
    }
    if (!below) atomicOr(candidates + c / 32, static_cast<int32_t>(1u << lane));
  }
}

template <typename S>
__global__ void __launch_bounds__(kTileThreads, sizeof(S) == 8 ? 2 : 6)
    argmax_tiles_kernel(Map<S> logits, int height, int width, typename Accumulate<S>::type y_scale,
                        typename Accumulate<S>::type x_scale, unsigned rows_of_blocks, unsigned columns_of_blocks,
                        int64_t* labels) {
  using T = typename Accumulate<S>::type;
  constexpr int kWords = kTileWords<T>, kClasses = 32 * kWords;
  __shared__ T grid[kClasses * kTileGrid];
  __shared__ Between<T> rows[kTileSide];  // of the block's pixels
  __shared__ Between<T> columns[kTiles * kTileSide];
  __shared__ int champions[kTiles];
  __shared__ int32_t candidates[kTiles][kWords];
  __shared__ int32_t nonfinite[4];  // [0]: whether the block has grid points that are not finite; filled up to 16 bytes
  const int lane = threadIdx.x % 32, tile = threadIdx.x / 32;
  const unsigned block_column = blockIdx.x % columns_of_blocks, block_line = blockIdx.x / columns_of_blocks;
  const unsigned block_row = block_line % rows_of_blocks, image = block_line / rows_of_blocks;
  const auto y_of = [&](int q) { return static_cast<int>(block_row) * kTileSide + q; };
  const auto x_of = [&](int q) { return static_cast<int>(block_column) * (kTiles * kTileSide) + q; };

  // The block's grid points: `grid_rows` and `grid_columns` from the first of either.
  const auto row = [&](int q) { return position<T>(y_of(q) < height ? y_of(q) : height - 1, logits.h, y_scale); };
  const auto column = [&](int q) { return position<T>(x_of(q) < width ? x_of(q) : width - 1, logits.w, x_scale); };
  const int first_row = row(0).below, grid_rows = row(kTileSide - 1).above - first_row + 1;
  const int first_column = column(0).below, grid_columns = column(kTiles * kTileSide - 1).above - first_column + 1;
  if (threadIdx.x < kTiles * kTileSide) {
    const Position<T> p = column(threadIdx.x);
    columns[threadIdx.x] = {p.below - first_column, p.above - first_column, p.weight};
  } else if (threadIdx.x < (kTiles + 1) * kTileSide) {
    const int q = threadIdx.x - kTiles * kTileSide;
    const Position<T> p = row(q);
    rows[q] = {(p.below - first_row) * kTileGridColumns, (p.above - first_row) * kTileGridColumns, p.weight};
  } else if (threadIdx.x == kTileThreads - 1) {
    nonfinite[0] = 0;
  }
  __syncthreads();

  // The lane's pixels: one column, rows `upper` and `upper` + kRowsApart.
  constexpr int kRowsApart = 32 / kTileSide;
  const int own_column = tile * kTileSide + lane % kTileSide, upper = lane / kTileSide;
  T best0 = lowest<T>(), best1 = lowest<T>();
  int label0 = 0, label1 = 0;
  bool finite0 = true, finite1 = true;
  for (int first = 0; first < logits.classes; first += kClasses) {
    const int count = logits.classes - first < kClasses ? logits.classes - first : kClasses;
    if (first > 0) __syncthreads();  // the classes before are done with
    T product = T(0);
    for (int j = threadIdx.x % kTileSide; j < grid_columns; j += kTileSide) {
      const S* column_points = logits.data + image * logits.image_stride + first * logits.class_stride +
                               first_row * logits.y_stride + (first_column + j) * logits.x_stride;
#pragma unroll 2
      for (int c = threadIdx.x / kTileSide; c < count; c += kTileThreads / kTileSide) {
        const S* points = column_points + c * logits.class_stride;
        T values[kTileGridRows];
#pragma unroll
        for (int i = 0; i < kTileGridRows; ++i)  // the last row again instead of a branch
          values[i] = to_accumulate(points[(i < grid_rows ? i : grid_rows - 1) * logits.y_stride]);
#pragma unroll
        for (int i = 0; i < kTileGridRows; ++i) {
          grid[c * kTileGrid + i * kTileGridColumns + j] = values[i];
          product += values[i] * T(0);
        }
      }
    }
    if (!(product == T(0))) atomicOr(nonfinite, 1);
    if (lane < kWords) candidates[tile][lane] = 0;
    __syncthreads();

    // The champion: the best class in the middle of the tile.
    {
      const Between<T> y = rows[kTileSide / 2], x = columns[tile * kTileSide + kTileSide / 2];
      T best = lowest<T>();
      int champion = 0;
#pragma unroll 2
      for (int c = lane; c < count; c += 32) {
        const T value = Blends<T>(grid + c * kTileGrid, y, x).at(y.weight);
        if (value > best) best = value, champion = c;
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        const T other = __shfl_down_sync(0xFFFFFFFFu, best, step);
        const int its_class = __shfl_down_sync(0xFFFFFFFFu, champion, step);
        if (other > best) best = other, champion = its_class;
      }
      if (lane == 0) champions[tile] = champion;
    }
    __syncthreads();
    const bool y_crossed = rows[0].below != rows[kTileSide - 1].below;
    {
      const Between<T>* own = columns + tile * kTileSide;
      const bool x_crossed = own[0].below != own[kTileSide - 1].below;
      const int champion = champions[tile];
      if (x_crossed && y_crossed) mark_candidates<true, true>(grid, champion, count, rows, own, candidates[tile]);
      else if (x_crossed) mark_candidates<true, false>(grid, champion, count, rows, own, candidates[tile]);
      else if (y_crossed) mark_candidates<false, true>(grid, champion, count, rows, own, candidates[tile]);
      else mark_candidates<false, false>(grid, champion, count, rows, own, candidates[tile]);
    }
    __syncthreads();

    // In ascending order: the lowest class keeps a tie.
    const Between<T> x = columns[own_column], y0 = rows[upper], y1 = rows[upper + kRowsApart];
    for (int k = 0; 32 * k < count; ++k) {
      uint32_t left_over = static_cast<uint32_t>(candidates[tile][k]);
      while (left_over != 0) {
        const int c = 32 * k + lowest_bit(left_over);
        left_over &= left_over - 1;
        const Blends<T> blends0(grid + c * kTileGrid, y0, x);
        const T value0 = blends0.at(y0.weight);
        const T value1 = (y_crossed ? Blends<T>(grid + c * kTileGrid, y1, x) : blends0).at(y1.weight);
        if (value0 > best0) best0 = value0, label0 = first + c;
        if (value1 > best1) best1 = value1, label1 = first + c;
      }
    }
    if (nonfinite[0] != 0)
#pragma unroll 1
      for (int c = 0; c < count; ++c) {
        finite0 = finite0 && Blends<T>(grid + c * kTileGrid, y0, x).at(y0.weight) * T(0) == T(0);
        finite1 = finite1 && Blends<T>(grid + c * kTileGrid, y1, x).at(y1.weight) * T(0) == T(0);
      }
  }
  const int x = x_of(own_column), y = y_of(upper);
  if (x >= width) return;
  int64_t* to = labels + (static_cast<int64_t>(image) * height + y) * width + x;
  if (y < height) to[0] = finite0 ? label0 : -1;
  if (y + kRowsApart < height) to[static_cast<int64_t>(kRowsApart) * width] = finite1 ? label1 : -1;
}

}  // namespace reclip::cuda
