// The tile operations of tiles.h for one instruction set. Included inside namespace reclip::cpu::<isa>.

template <typename T, typename S>
void scores(Strided logits, Strided bias, int count, int ld, int64_t classes, uint64_t first_element, NoiseKey key,
            T inverse_tau, T* noise, T* y, T* bad) {
  noise += gumbel_run(noise, first_element, count * classes, key);
  Vec<T> nonfinite[kTileMax / kLanes<T>] = {};
  const S* x = static_cast<const S*>(logits.data);
  const T* b = static_cast<const T*>(bias.data);
  for (int64_t c = 0; c < classes; ++c) {
    for (int i = 0; i < ld; i += kLanes<T>) {
      const int64_t left = count - i;
      Vec<T> value = load_strided<T>(x + c * logits.class_stride + i * logits.patch_stride, logits.patch_stride, left);
      if (b) value -= load_strided<T>(b + c * bias.class_stride + i * bias.patch_stride, bias.patch_stride, left);
      value = value * inverse_tau + load_strided<T>(noise + i * classes + c, classes, left);
      nonfinite[i / kLanes<T>] += value * T(0);
      store(y + c * ld + i, value);
    }
  }
  for (int i = 0; i < ld; i += kLanes<T>) store(bad + i, nonfinite[i / kLanes<T>]);
}

template <typename T>
void argmax(const T* y, int ld, int64_t classes, int32_t* best) {
  for (int i = 0; i < ld; i += kLanes<T>) {
    Vec<T> top = load(y + i);
    Index<T> where{};
    for (int64_t c = 1; c < classes; ++c) {
      const Vec<T> value = load(y + c * ld + i);
      const Index<T> larger = value > top;
      top = larger ? value : top;
      where = larger ? Index<T>{} + static_cast<typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type>(c) : where;
    }
    for (int k = 0; k < kLanes<T>; ++k) best[i + k] = static_cast<int32_t>(where[k]);
  }
}

template <typename T>
void softmax(T* y, int ld, int64_t classes, const int64_t* class_of_row, int64_t rows_count, T* log_rows) {
  for (int i = 0; i < ld; i += kLanes<T>) {
    Vec<T> top = load(y + i);
    for (int64_t c = 1; c < classes; ++c) top = maximum(top, load(y + c * ld + i));
    for (int64_t r = 0; r < rows_count; ++r) store(log_rows + r * ld + i, load(y + class_of_row[r] * ld + i) - top);
    Vec<T> total{};
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<T> e = exp_nonpositive(load(y + c * ld + i) - top);
      total += e;
      store(y + c * ld + i, e);
    }
    const Vec<T> scale = T(1) / total;
    for (int64_t c = 0; c < classes; ++c) store(y + c * ld + i, load(y + c * ld + i) * scale);
    if (rows_count == 0) continue;
    const Vec<T> log_total = log_positive(total);
    for (int64_t r = 0; r < rows_count; ++r) store(log_rows + r * ld + i, load(log_rows + r * ld + i) - log_total);
  }
}

template <typename T>
void exp_below(T* values, int64_t count, T top) {
  for (int64_t i = 0; i < count; i += kLanes<T>)
    store_some<T>(values + i, exp_nonpositive(load_some<T>(values + i, count - i) - top), count - i);
}

// The sums of a block of kRowBlock x kPatchBlock dot products stay in registers.
constexpr int kRowBlock = 4;
constexpr int kPatchBlock = kBytes == 64 ? 4 : 2;

template <typename T, typename S, int R, int P>
RECLIP_INLINE void dots_block(const S* features, int64_t patch_stride, const T* weights, int64_t width, int ld, T* rows) {
  Vec<T> sum[R][P] = {};
  int64_t d = 0;
  for (; d + kLanes<T> <= width; d += kLanes<T>) {
    Vec<T> z[P];
    for (int p = 0; p < P; ++p) z[p] = load(features + p * patch_stride + d);
    for (int r = 0; r < R; ++r) {
      const Vec<T> w = load(weights + r * width + d);
      for (int p = 0; p < P; ++p) sum[r][p] += w * z[p];
    }
  }
  if (d < width)
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p)
        sum[r][p] += load_some<T>(weights + r * width + d, width - d) * load_some<T>(features + p * patch_stride + d, width - d);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) rows[r * ld + p] = sum_lanes(sum[r][p]);
}

template <typename T, typename S>
void dots(const void* features, int64_t patch_stride, int count, int ld, const T* weights, int64_t rows_count,
          int64_t width, T* rows) {
  const S* z = static_cast<const S*>(features);
  for (int i = 0; i < count;) {
    const bool block = count - i >= kPatchBlock;
    for (int64_t r = 0; r < rows_count;) {
      const bool tall = rows_count - r >= kRowBlock;
      const S* from = z + i * patch_stride;
      const T* w = weights + r * width;
      T* to = rows + r * ld + i;
      if (block && tall) dots_block<T, S, kRowBlock, kPatchBlock>(from, patch_stride, w, width, ld, to);
      else if (block) dots_block<T, S, 1, kPatchBlock>(from, patch_stride, w, width, ld, to);
      else if (tall) dots_block<T, S, kRowBlock, 1>(from, patch_stride, w, width, ld, to);
      else dots_block<T, S, 1, 1>(from, patch_stride, w, width, ld, to);
      r += tall ? kRowBlock : 1;
    }
    i += block ? kPatchBlock : 1;
  }
  for (int64_t r = 0; r < rows_count; ++r)
    for (int i = count; i < ld; ++i) rows[r * ld + i] = T(0);
}

template <typename T, typename S, int R, int V>
RECLIP_INLINE void accumulate_block(const T* rows, int64_t rows_stride, const S* features, int64_t patch_stride, int count,
                                    int64_t left, T* sums, int64_t sums_stride) {
  Vec<T> sum[R][V] = {};
  for (int i = 0; i < count; ++i) {
    Vec<T> z[V];
    for (int v = 0; v < V; ++v) {
      const int64_t more = left - v * kLanes<T>;
      z[v] = V > 1 ? load(features + i * patch_stride + v * kLanes<T>) : load_some<T>(features + i * patch_stride, more);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += rows[r * rows_stride + i] * z[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      T* to = sums + r * sums_stride + v * kLanes<T>;
      const int64_t more = V > 1 ? kLanes<T> : left;
      store_some<T>(to, load_some<T>(to, more) + sum[r][v], more);
    }
}

template <typename T, typename S>
void accumulate(const T* rows, int64_t rows_stride, int64_t rows_count, const void* features, int64_t patch_stride,
                int count, int64_t width, T* sums, int64_t sums_stride) {
  constexpr int kWide = kPatchBlock;
  const S* z = static_cast<const S*>(features);
  for (int64_t d = 0; d < width;) {
    const bool wide = width - d >= kWide * kLanes<T>;
    for (int64_t r = 0; r < rows_count;) {
      const bool tall = rows_count - r >= kRowBlock;
      const T* row = rows + r * rows_stride;
      T* to = sums + r * sums_stride + d;
      if (wide && tall) accumulate_block<T, S, kRowBlock, kWide>(row, rows_stride, z + d, patch_stride, count, width - d, to, sums_stride);
      else if (wide) accumulate_block<T, S, 1, kWide>(row, rows_stride, z + d, patch_stride, count, width - d, to, sums_stride);
      else if (tall) accumulate_block<T, S, kRowBlock, 1>(row, rows_stride, z + d, patch_stride, count, width - d, to, sums_stride);
      else accumulate_block<T, S, 1, 1>(row, rows_stride, z + d, patch_stride, count, width - d, to, sums_stride);
      r += tall ? kRowBlock : 1;
    }
    d += wide ? kWide * kLanes<T> : kLanes<T>;
  }
}

template <typename T, typename S>
void segment_sum(const int32_t* row, const void* features, int64_t patch_stride, int count, int64_t width, T* sums,
                 int64_t sums_stride) {
  const S* z = static_cast<const S*>(features);
  for (int i = 0; i < count; ++i) {
    if (row[i] < 0) continue;
    const S* from = z + i * patch_stride;
    T* to = sums + row[i] * sums_stride;
    int64_t d = 0;
    for (; d + kLanes<T> <= width; d += kLanes<T>) store(to + d, load(to + d) + load(from + d));
    if (d < width) store_some<T>(to + d, load_some<T>(to + d, width - d) + load_some<T>(from + d, width - d), width - d);
  }
}

template <typename T, typename S>
void spread(const T* rows, int ld, int64_t rows_count, const T* weights, int count, int64_t width, void* out,
            int64_t patch_stride) {
  S* z = static_cast<S*>(out);
  for (int i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += kLanes<T>) {
      Vec<T> sum{};
      for (int64_t r = 0; r < rows_count; ++r) {
        const T factor = rows[r * ld + i];
        if (factor != T(0)) sum += factor * load_some<T>(weights + r * width + d, width - d);
      }
      store_some<T>(z + i * patch_stride + d, sum, width - d);
    }
  }
}

template <typename T, typename S>
void logit_gradient(const T* p, int count, int ld, int64_t classes, const T* rows, const int32_t* row_of_class,
                    const int64_t* class_of_row, int64_t rows_count, bool of_logs, const T* bad, T inverse_tau, Strided out,
                    T* bias_gradient) {
  S* to = static_cast<S*>(const_cast<void*>(out.data));
  Vec<T> total[kTileMax / kLanes<T>] = {};
  for (int64_t r = 0; r < rows_count; ++r)
    for (int i = 0; i < ld; i += kLanes<T>) {
      const Vec<T> own = load(rows + r * ld + i);
      if (of_logs) total[i / kLanes<T>] += own;
      else total[i / kLanes<T>] += load(p + class_of_row[r] * ld + i) * own;
    }
  for (int64_t c = 0; c < classes; ++c) {
    const T* row = row_of_class[c] >= 0 ? rows + row_of_class[c] * ld : nullptr;
    for (int i = 0; i < ld; i += kLanes<T>) {
      const Vec<T> own = row ? load(row + i) : Vec<T>{}, own_p = load(p + c * ld + i), sum = total[i / kLanes<T>];
      Vec<T> gradient = of_logs ? inverse_tau * (own - own_p * sum) : inverse_tau * own_p * (own - sum);
      gradient = load(bad + i) == T(0) ? gradient : Vec<T>{};
      if (to) store_strided<T>(to + c * out.class_stride + i * out.patch_stride, out.patch_stride, gradient, count - i);
      if (bias_gradient) store(bias_gradient + c * ld + i, load(bias_gradient + c * ld + i) - gradient);
    }
  }
}

template <typename T, typename S>
void dense_logit_gradient(const T* p, int count, int ld, int64_t classes, Strided gradient, const T* bad, T inverse_tau,
                          Strided out) {
  const S* g = static_cast<const S*>(gradient.data);
  S* to = static_cast<S*>(const_cast<void*>(out.data));
  for (int i = 0; i < ld; i += kLanes<T>) {
    const int64_t left = count - i;
    const S* from = g + i * gradient.patch_stride;
    Vec<T> mean{};
    for (int64_t c = 0; c < classes; ++c)
      mean += load(p + c * ld + i) * load_strided<T>(from + c * gradient.class_stride, gradient.patch_stride, left);
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<T> own = load_strided<T>(from + c * gradient.class_stride, gradient.patch_stride, left);
      const Vec<T> value = inverse_tau * load(p + c * ld + i) * (own - mean);
      store_strided<T>(to + c * out.class_stride + i * out.patch_stride, out.patch_stride,
                       load(bad + i) == T(0) ? value : Vec<T>{}, left);
    }
  }
}

template <typename T, typename S>
void load_tile(Strided from, int count, int ld, int64_t classes, T* y) {
  const S* x = static_cast<const S*>(from.data);
  for (int64_t c = 0; c < classes; ++c)
    for (int i = 0; i < ld; i += kLanes<T>)
      store(y + c * ld + i, load_strided<T>(x + c * from.class_stride + i * from.patch_stride, from.patch_stride, count - i));
}

template <typename T, typename S>
void store_tile(const T* y, int count, int ld, int64_t classes, Strided to) {
  S* x = static_cast<S*>(const_cast<void*>(to.data));
  for (int64_t c = 0; c < classes; ++c)
    for (int i = 0; i < ld; i += kLanes<T>)
      store_strided<T>(x + c * to.class_stride + i * to.patch_stride, to.patch_stride, load(y + c * ld + i), count - i);
}

template <typename T>
void blend(const T* above, const T* below, T t, int64_t length, T* out) {
  for (int64_t i = 0; i < length; i += kLanes<T>) store(out + i, (T(1) - t) * load(above + i) + t * load(below + i));
}

// A score between two columns is a convex combination of its two ends. So a class whose larger end is below the largest of all
// smaller ends cannot win anywhere between them, and only the few other classes are compared pixel by pixel.
template <typename T>
void label_between(const T* left, const T* right, int64_t classes, int64_t padded, const T* weight, int64_t count,
                   int32_t* candidates, int64_t* labels) {
  Vec<T> floor_v = minimum(load(left), load(right));
  Vec<T> size_v{}, nonfinite{};
  for (int64_t c = 0; c < padded; c += kLanes<T>) {
    const Vec<T> a = load(left + c), b = load(right + c);
    floor_v = maximum(floor_v, minimum(a, b));
    nonfinite += a * T(0) + b * T(0);
    size_v = maximum(size_v, maximum(maximum(a, -a), maximum(b, -b)));
  }
  if (!(sum_lanes(nonfinite) == T(0))) {
    for (int64_t i = 0; i < count; ++i) labels[i] = -1;
    return;
  }
  T floor_value = floor_v[0], size = size_v[0];
  for (int k = 1; k < kLanes<T>; ++k) {
    floor_value = floor_v[k] > floor_value ? floor_v[k] : floor_value;
    size = size_v[k] > size ? size_v[k] : size;
  }
  // Rounding may raise a combination above its ends by some units in the last place.
  const T threshold = floor_value - size * (sizeof(T) == 4 ? T(0x1p-21) : T(0x1p-50));
  int64_t found = 0;
  for (int64_t c = 0; c < classes; ++c) {
    candidates[found] = static_cast<int32_t>(c);
    found += (left[c] >= threshold) | (right[c] >= threshold);
  }
  using Id = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> t = load(weight + i), s = T(1) - t;
    Vec<T> top = s * left[candidates[0]] + t * right[candidates[0]];
    Index<T> where = Index<T>{} + static_cast<Id>(candidates[0]);
    for (int64_t k = 1; k < found; ++k) {
      const int32_t c = candidates[k];
      const Vec<T> value = s * left[c] + t * right[c];
      const Index<T> larger = value > top;
      top = larger ? value : top;
      where = larger ? Index<T>{} + static_cast<Id>(c) : where;
    }
    const int64_t stop = count - i < kLanes<T> ? count - i : kLanes<T>;
    for (int64_t k = 0; k < stop; ++k) labels[i + k] = where[k];
  }
}

template <typename T>
void add_scaled(const T* x, T factor, int64_t length, T* y) {
  for (int64_t i = 0; i < length; i += kLanes<T>) store(y + i, load(y + i) + factor * load(x + i));
}

template <typename T>
RECLIP_INLINE Vec<T> between(const T* line, const Position<T>& pixel, int64_t ld, int64_t c) {
  return (T(1) - pixel.weight) * load(line + pixel.below * ld + c) + pixel.weight * load(line + pixel.above * ld + c);
}

// Calls block(v, count of vectors) for the vectors of ld channels, four at a time where there are as many.
template <typename T, typename Block>
RECLIP_INLINE void for_channels(int ld, const Block& block) {
  constexpr int kWide = 4;
  int c = 0;
  for (; c + kWide * kLanes<T> <= ld; c += kWide * kLanes<T>) block(c, std::integral_constant<int, kWide>{});
  for (; c < ld; c += kLanes<T>) block(c, std::integral_constant<int, 1>{});
}

template <typename T>
double l1_distance(const T* student, const Position<T>* student_pixels, const T* teacher, const Position<T>* teacher_pixels,
                   const bool* valid, int64_t width, int ld) {
  constexpr int64_t kPixels = 16;  // summed on their own before they join the total: keeps rounding errors small
  double total = 0;
  for_channels<T>(ld, [&](int c, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    for (int64_t first = 0; first < width; first += kPixels) {
      Vec<T> sum[V] = {};
      for (int64_t x = first; x < (first + kPixels < width ? first + kPixels : width); ++x) {
        if (!valid[x]) continue;
        for (int v = 0; v < V; ++v) {
          const int at = c + v * kLanes<T>;
          const Vec<T> d = between(student, student_pixels[x], ld, at) - between(teacher, teacher_pixels[x], ld, at);
          sum[v] += maximum(d, -d);
        }
      }
      for (int v = 0; v < V; ++v) total += sum_lanes(sum[v]);
    }
  });
  return total;
}

template <typename T>
void l1_gradient(const T* student, const Position<T>* student_pixels, const T* teacher, const Position<T>* teacher_pixels,
                 const bool* valid, int64_t width, int ld, T* sums) {
  for_channels<T>(ld, [&](int c, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    for (int64_t first = 0; first < width;) {
      const Position<T>& pixel = student_pixels[first];
      Vec<T> below[V] = {}, above[V] = {};
      int64_t x = first;
      for (; x < width && student_pixels[x].below == pixel.below; ++x) {  // between the same columns: sums stay in registers
        if (!valid[x]) continue;
        const T t = student_pixels[x].weight;
        for (int v = 0; v < V; ++v) {
          const int at = c + v * kLanes<T>;
          const Vec<T> d = between(student, student_pixels[x], ld, at) - between(teacher, teacher_pixels[x], ld, at);
          const Vec<T> sign = d > T(0) ? splat<Vec<T>>(T(1)) : d < T(0) ? splat<Vec<T>>(T(-1)) : Vec<T>{};
          below[v] += (T(1) - t) * sign;
          above[v] += t * sign;
        }
      }
      for (int v = 0; v < V; ++v) {
        T* to = sums + pixel.below * ld + c + v * kLanes<T>;
        store(to, load(to) + below[v]);
        to = sums + pixel.above * ld + c + v * kLanes<T>;
        store(to, load(to) + above[v]);
      }
      first = x;
    }
  });
}

template <typename T>
double cross_entropy(const T* line, const Position<T>* pixels, const int64_t* labels, int64_t width, int64_t classes, int64_t ld,
                     T* values, T* top, T* inverse) {
  Index<T> lane{};
  for (int k = 0; k < kLanes<T>; ++k) lane[k] = k;
  using Id = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
  double loss = 0;
  for (int64_t x = 0; x < width; ++x) {
    top[x] = inverse[x] = T(0);
    if (labels[x] < 0) continue;
    Vec<T> top_v = splat<Vec<T>>(values[0] = between(line, pixels[x], ld, 0)[0]), nonfinite{}, total{};
    for (int64_t c = 0; c < classes; c += kLanes<T>) {
      const Vec<T> value = between(line, pixels[x], ld, c);
      store(values + c, value);
      nonfinite += value * T(0);
      top_v = maximum(top_v, lane < static_cast<Id>(classes - c) ? value : top_v);
    }
    T largest = top_v[0];
    for (int k = 1; k < kLanes<T>; ++k) largest = top_v[k] > largest ? top_v[k] : largest;
    for (int64_t c = 0; c < classes; c += kLanes<T>) {
      const Vec<T> e = exp_nonpositive(load(values + c) - largest);
      total += lane < static_cast<Id>(classes - c) ? e : Vec<T>{};
    }
    const T sum = sum_lanes(total);
    top[x] = largest;
    inverse[x] = T(1) / sum;
    loss += __builtin_log(static_cast<double>(sum)) - (values[labels[x]] - largest) + sum_lanes(nonfinite);
  }
  return loss;
}

template <typename T>
void cross_entropy_gradient(const T* line, const Position<T>* pixels, const int64_t* labels, const T* top, const T* inverse,
                            int64_t width, int64_t first_class, int ld, T* sums) {
  Index<T> lane{};
  for (int k = 0; k < kLanes<T>; ++k) lane[k] = k;
  using Id = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
  for (int c = 0; c < ld; c += kLanes<T>) {
    for (int64_t first = 0; first < width;) {
      const Position<T>& pixel = pixels[first];
      Vec<T> below{}, above{};
      int64_t x = first;
      for (; x < width && pixels[x].below == pixel.below; ++x) {
        if (labels[x] < 0) continue;
        const Vec<T> p = exp_nonpositive(between(line, pixels[x], ld, c) - top[x]) * inverse[x];
        // The label's 1 comes off before the sum: where p is nearly 1, its digits would be lost after it.
        const Vec<T> residual = lane == static_cast<Id>(labels[x] - first_class - c) ? p - T(1) : p;
        below += (T(1) - pixels[x].weight) * residual;
        above += pixels[x].weight * residual;
      }
      T* to = sums + pixel.below * ld + c;
      store(to, load(to) + below);
      to = sums + pixel.above * ld + c;
      store(to, load(to) + above);
      first = x;
    }
  }
}

template <typename T, typename S>
const TileOps<T>& table() {
  static const TileOps<T> ops = {
      sizeof(S),          scores<T, S>,         argmax<T>,    softmax<T>,  exp_below<T>, dots<T, S>,
      accumulate<T, S>,   segment_sum<T, S>,    spread<T, S>, logit_gradient<T, S>,
      dense_logit_gradient<T, S>, load_tile<T, S>, store_tile<T, S>, label_between<T>, blend<T>,
      add_scaled<T>, l1_distance<T>, l1_gradient<T>, cross_entropy<T>, cross_entropy_gradient<T>,
  };
  return ops;
}

const TileOps<float>& tiles_float(ElementType type) {
  switch (type) {
    case ElementType::kFloat16:
      return table<float, Half>();
    case ElementType::kBFloat16:
      return table<float, BFloat16>();
    default:
      return table<float, float>();
  }
}
const TileOps<double>& tiles_double() { return table<double, double>(); }
