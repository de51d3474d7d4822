// The gradient of rectify_and_pool. In C++, since the operator runs in every training step: through Python a call with its
// backward pass took 0.3 ms on the host, several times as long as its kernels.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace reclip {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Pool = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        double, bool);
using PoolForward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                                                       const Tensor&, double, bool);
using PoolBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                                        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                                                        bool, bool, bool, bool, const OptionalTensor&);

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct RectifyAndPool : torch::autograd::Function<RectifyAndPool> {
  static variable_list forward(AutogradContext* context, const Tensor& logits, const OptionalTensor& bias, const Tensor& features,
                               const Tensor& class_ids, const Tensor& offsets, const Tensor& seed, double tau, bool hard) {
    static const auto op = operator_named<PoolForward>("reclip_d2::rectify_and_pool_forward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [pooled, area, normalizer] = op.call(logits, bias, features, class_ids, offsets, seed, tau, hard);
    context->set_materialize_grads(false);
    context->saved_data["tau"] = tau;
    context->saved_data["hard"] = hard;
    context->saved_data["has_bias"] = bias.has_value();
    context->save_for_backward({logits, bias.value_or(Tensor()), features, class_ids, offsets, seed, pooled, area, normalizer});
    return {pooled, area};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    static const auto op = operator_named<PoolBackward>("reclip_d2::rectify_and_pool_backward");
    const variable_list saved = context->get_saved_variables();
    const Tensor &logits = saved[0], &features = saved[2], &pooled = saved[6], &area = saved[7], &normalizer = saved[8];
    const OptionalTensor bias = context->saved_data["has_bias"].toBool() ? OptionalTensor(saved[1]) : std::nullopt;
    // Counted over the tensors that were given.
    const bool need_logits = context->needs_input_grad(0), need_bias = bias.has_value() && context->needs_input_grad(1);
    const bool need_features = context->needs_input_grad(bias.has_value() ? 2 : 1);
    const Tensor of_pooled = gradients[0].defined() ? gradients[0] : at::zeros_like(pooled);
    const Tensor of_area = gradients[1].defined() ? gradients[1] : at::empty({0}, area.options());  // zero
    const auto [of_logits, of_bias, of_features] =
        op.call(of_pooled, of_area, logits, bias, features, saved[3], saved[4], saved[5], pooled, area,
                context->saved_data["tau"].toDouble(), context->saved_data["hard"].toBool(), need_logits, need_bias, need_features,
                OptionalTensor(normalizer));
    return {need_logits ? of_logits : Tensor(), need_bias ? of_bias : Tensor(), need_features ? of_features : Tensor(),
            Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> rectify_and_pool(const Tensor& logits, const OptionalTensor& bias, const Tensor& features,
                                            const Tensor& class_ids, const Tensor& offsets, const Tensor& seed, double tau, bool hard) {
  const bool wanted = logits.requires_grad() || features.requires_grad() || (bias.has_value() && bias->requires_grad());
  if (at::GradMode::is_enabled() && wanted) {
    const variable_list outputs = RectifyAndPool::apply(logits, bias, features, class_ids, offsets, seed, tau, hard);
    return {outputs[0], outputs[1]};
  }
  static const auto op = operator_named<Pool>("reclip_d2::rectify_and_pool");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(logits, bias, features, class_ids, offsets, seed, tau, hard);
}

}  // namespace
}  // namespace reclip

TORCH_LIBRARY_IMPL(reclip_d2, Autograd, m) { m.impl("rectify_and_pool", reclip::rectify_and_pool); }
