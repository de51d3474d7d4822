// Schemas of the operators, and an empty Python module: `import reclip_d2._C` loads and registers them.
// Fake kernels, and gradients but those in autograd.cpp, are registered in Python, next to each operator's public function in
// reclip_d2/layers.
//
// Shapes: B images, n = h*w patches, D embedding width, C classes, K hypothesis rows. `class_ids` (K), `offsets` (B+1) and
// `seed` (2: seed and offset of the noise) are int64 tensors, on the CPU or on the device of the other arguments. Gradients that
// are not needed are returned empty; an empty grad_area of rectify_and_pool_backward is zero.
#define Py_LIMITED_API 0x030A0000  // one build serves every Python from 3.10 on
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(reclip_d2, m) {
  m.def("gumbel_softmax(Tensor logits, Tensor seed, float tau, bool hard) -> Tensor");
  m.def("gumbel_softmax_backward(Tensor grad_masks, Tensor logits, Tensor seed, float tau) -> Tensor");
  m.def(
      "masked_average_pool(Tensor features, Tensor masks, Tensor class_ids, Tensor offsets) -> (Tensor pooled, Tensor area)");
  m.def(
      "masked_average_pool_backward(Tensor grad_pooled, Tensor grad_area, Tensor features, Tensor masks, Tensor class_ids, "
      "Tensor offsets, Tensor pooled, Tensor area, bool need_features, bool need_masks) -> (Tensor, Tensor)");
  m.def(
      "rectify_and_pool(Tensor logits, Tensor? bias, Tensor features, Tensor class_ids, Tensor offsets, Tensor seed, "
      "float tau, bool hard) -> (Tensor pooled, Tensor area)");
  m.def(
      "rectify_and_pool_forward(Tensor logits, Tensor? bias, Tensor features, Tensor class_ids, Tensor offsets, Tensor seed, "
      "float tau, bool hard) -> (Tensor pooled, Tensor area, Tensor normalizer)");
  m.def(
      "rectify_and_pool_backward(Tensor grad_pooled, Tensor grad_area, Tensor logits, Tensor? bias, Tensor features, "
      "Tensor class_ids, Tensor offsets, Tensor seed, Tensor pooled, Tensor area, float tau, bool hard, bool need_logits, "
      "bool need_bias, bool need_features, Tensor? normalizer=None) -> (Tensor, Tensor, Tensor)");
  m.def("upsample_argmax(Tensor logits, SymInt height, SymInt width) -> Tensor");
  m.def("upsample_cross_entropy(Tensor logits, Tensor labels) -> (Tensor loss, Tensor weight, Tensor normalizer)");
  m.def(
      "upsample_cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor labels, Tensor weight, Tensor normalizer) -> "
      "Tensor");
  m.def("upsample_l1(Tensor student, Tensor teacher, Tensor valid) -> (Tensor loss, Tensor weight)");
  m.def(
      "upsample_l1_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor valid, Tensor weight) -> Tensor");
}

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Compiled operators of reclip_d2.", -1, nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
