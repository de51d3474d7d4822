// upsample_argmax on the CPU: one output row at a time, from two blended rows of the grid.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "checks.h"
#include "cpu/upsample.h"

namespace reclip::cpu {
namespace {

constexpr const char* kOp = "upsample_argmax";

// Consecutive pixels of a row that lie between the same two grid columns.
struct Run {
  int64_t first, count, column, next;
};

template <typename T>
void run(const at::Tensor& logits, int64_t height, int64_t width, int64_t* labels) {
  const int64_t images = logits.size(0), classes = logits.size(1), h = logits.size(2), w = logits.size(3);
  // Columns of classes, each padded to whole vectors by copies of its first class.
  const int64_t padded = (classes + kTileStep - 1) / kTileStep * kTileStep;
  const at::ScalarType type = accumulate_type(logits.scalar_type());
  at::Tensor columns = at::empty({images, h, w, padded}, logits.options().dtype(type).memory_format(std::nullopt));
  columns.narrow(3, 0, classes).copy_(logits.permute({0, 2, 3, 1}));
  if (padded > classes) columns.narrow(3, classes, padded - classes).copy_(columns.narrow(3, 0, 1).expand({images, h, w, padded - classes}));
  const T* grid = columns.const_data_ptr<T>();

  const auto rows = positions<T>(h, height);
  const auto pixels = positions<T>(w, width);
  std::vector<Run> runs;
  std::vector<T> weights(static_cast<size_t>(width + kTileStep));
  for (int64_t x = 0; x < width; ++x) {
    weights[x] = pixels[x].weight;
    if (runs.empty() || runs.back().column != pixels[x].below) runs.push_back({x, 0, pixels[x].below, pixels[x].above});
    ++runs.back().count;
  }
  const TileOps<T>& ops = tile_ops<T>(element_type(logits));
  at::parallel_for(0, images * height, 8, [&](int64_t begin, int64_t end) {
    const auto line = scratch<T>(w * padded);
    const auto candidates = scratch<int32_t>(padded + 1);
    for (int64_t task = begin; task < end; ++task) {
      const Position<T>& row = rows[task % height];
      const T* image = grid + task / height * h * w * padded;
      ops.blend(image + row.below * w * padded, image + row.above * w * padded, row.weight, w * padded, line.get());
      for (const Run& r : runs)
        ops.label_between(line.get() + r.column * padded, line.get() + r.next * padded, classes, padded, weights.data() + r.first,
                          r.count, candidates.get(), labels + task * width + r.first);
    }
  });
}

at::Tensor upsample_argmax(const at::Tensor& logits, int64_t height, int64_t width) {
  check_tensor(kOp, "logits", logits, 4, c10::DeviceType::CPU);
  TORCH_CHECK_VALUE(logits.size(1) > 0 && logits.size(2) > 0 && logits.size(3) > 0, kOp,
                    ": `logits` must have classes and a grid, got shape ", logits.sizes());
  TORCH_CHECK_VALUE(height > 0 && width > 0, kOp, ": `size` must be (H,W) with both at least 1, got (", height, ", ", width, ")");
  at::Tensor labels = at::empty({logits.size(0), height, width}, logits.options().dtype(at::kLong));
  if (labels.numel() == 0) return labels;
  if (logits.scalar_type() == at::kDouble) run<double>(logits, height, width, labels.mutable_data_ptr<int64_t>());
  else run<float>(logits, height, width, labels.mutable_data_ptr<int64_t>());
  return labels;
}

}  // namespace
}  // namespace reclip::cpu

TORCH_LIBRARY_IMPL(reclip_d2, CPU, m) { m.impl("upsample_argmax", reclip::cpu::upsample_argmax); }
