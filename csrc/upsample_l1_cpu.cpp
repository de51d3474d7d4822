// upsample_l1 on the CPU: slices of channels, each row by row from blended grid rows of student and teacher.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/upsample.h"

namespace reclip::cpu {
namespace {

constexpr const char* kOp = "upsample_l1";

void check(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& valid) {
  check_upsampled(kOp, "student", student, "valid", valid, at::kBool, c10::DeviceType::CPU);
  check_upsampled(kOp, "teacher", teacher, "valid", valid, at::kBool, c10::DeviceType::CPU);
  check_pair(kOp, "teacher", teacher, "student", student);
  TORCH_CHECK_VALUE(student.size(1) == teacher.size(1), kOp, ": `student` ", student.sizes(), " and `teacher` ", teacher.sizes(),
                    " differ in D");
  TORCH_CHECK_VALUE(valid.is_contiguous(), kOp, ": `valid` must be contiguous");
}

template <typename T>
void forward(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& valid, T* loss, T* weight) {
  const int64_t images = valid.size(0), height = valid.size(1), width = valid.size(2);
  const bool* mask = valid.const_data_ptr<bool>();
  const auto student_rows = positions<T>(student.size(2), height), student_pixels = positions<T>(student.size(3), width);
  const auto teacher_rows = positions<T>(teacher.size(2), height), teacher_pixels = positions<T>(teacher.size(3), width);
  const Slices slices(student.size(1));
  const TileOps<T>& ops = tile_ops<T>(element_type(student));
  const int64_t parts = parts_for_threads(images * slices.count, height);
  std::vector<double> sums(static_cast<size_t>(images * slices.count * height));  // by row: the parts do not change a sum
  at::parallel_for(0, images * slices.count * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t line = task / parts, part = task % parts, image = line / slices.count, slice = line % slices.count;
      Lines<T> of_student(student, image, slices.first(slice), slices.width(slice), slices.ld);
      Lines<T> of_teacher(teacher, image, slices.first(slice), slices.width(slice), slices.ld);
      for (int64_t y = part * height / parts; y < (part + 1) * height / parts; ++y)
        sums[line * height + y] =
            ops.l1_distance(of_student.at(student_rows[y]), student_pixels.data(), of_teacher.at(teacher_rows[y]),
                            teacher_pixels.data(), mask + (image * height + y) * width, width, slices.ld);
    }
  });
  for (int64_t b = 0; b < images; ++b) {
    const int64_t count = std::count(mask + b * height * width, mask + (b + 1) * height * width, true);
    double total = 0;
    for (int64_t k = b * slices.count * height; k < (b + 1) * slices.count * height; ++k) total += sums[k];
    loss[b] = static_cast<T>(total / std::max<int64_t>(count, 1));
    weight[b] = T(1) / static_cast<T>(std::max<int64_t>(count, 1));
  }
}

std::tuple<at::Tensor, at::Tensor> upsample_l1(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& valid) {
  check(student, teacher, valid);
  const auto options = student.options().dtype(accumulate_type(student.scalar_type()));
  at::Tensor loss = at::empty({student.size(0)}, options), weight = at::empty({student.size(0)}, options);
  if (student.scalar_type() == at::kDouble) forward(student, teacher, valid, loss.mutable_data_ptr<double>(), weight.mutable_data_ptr<double>());
  else forward(student, teacher, valid, loss.mutable_data_ptr<float>(), weight.mutable_data_ptr<float>());
  return {loss, weight};
}

template <typename T>
at::Tensor backward(const at::Tensor& grad_loss, const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& valid,
                    const at::Tensor& weight) {
  const int64_t height = valid.size(1), width = valid.size(2);
  const bool* mask = valid.const_data_ptr<bool>();
  const auto student_rows = positions<T>(student.size(2), height), student_pixels = positions<T>(student.size(3), width);
  const auto teacher_rows = positions<T>(teacher.size(2), height), teacher_pixels = positions<T>(teacher.size(3), width);
  const TileOps<T>& ops = tile_ops<T>(element_type(student));
  const at::Tensor factor = grad_loss.mul(weight);
  return upsample_gradient<T>(student, height, factor.const_data_ptr<T>(), [&](int64_t image, int64_t first, int count, int ld) {
    return [&, image, ld, of_student = Lines<T>(student, image, first, count, ld),
            of_teacher = Lines<T>(teacher, image, first, count, ld)](int64_t y, T* sums) mutable {
      ops.l1_gradient(of_student.at(student_rows[y]), student_pixels.data(), of_teacher.at(teacher_rows[y]),
                      teacher_pixels.data(), mask + (image * height + y) * width, width, ld, sums);
    };
  });
}

at::Tensor upsample_l1_backward(const at::Tensor& grad_loss, const at::Tensor& student, const at::Tensor& teacher,
                                const at::Tensor& valid, const at::Tensor& weight) {
  check(student, teacher, valid);
  const at::ScalarType type = accumulate_type(student.scalar_type());
  check_saved(kOp, "grad_loss", grad_loss, {student.size(0)}, type, student);
  check_saved(kOp, "weight", weight, {student.size(0)}, type, student);
  return type == at::kDouble ? backward<double>(grad_loss, student, teacher, valid, weight)
                             : backward<float>(grad_loss, student, teacher, valid, weight);
}

}  // namespace
}  // namespace reclip::cpu

TORCH_LIBRARY_IMPL(reclip_d2, CPU, m) {
  m.impl("upsample_l1", reclip::cpu::upsample_l1);
  m.impl("upsample_l1_backward", reclip::cpu::upsample_l1_backward);
}
