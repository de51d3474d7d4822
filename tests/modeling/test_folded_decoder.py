"""Eqs. (3) and (4) folded into one convolution of Z and one of the bias map, against their literal form.

Shape letters: B images, (h, w) patch grid, n = h*w patches, C classes, D joint embedding.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclip_d2.modeling.bias_head import query_logits, rectified_logits
from reclip_d2.modeling.mask_decoder import MaskDecoder
from tests.helpers import make_reclip, make_rectified, random_image
from tests.modeling.test_mask_decoder import literal_batch_norm, literal_convolution
from tests.modeling.test_rectified_clip_training import PADDED, USUAL, batch

B, C, D, H, W = 2, 3, 4, 4, 6
F64 = torch.float64


def make_decoder(dtype: torch.dtype = F64, *, classes: int = C, **options: object) -> MaskDecoder:
    """No parameter and no statistic is left at 0 or 1."""
    decoder = MaskDecoder(D, classes, **options).to(dtype)
    for name, tensor in decoder.named_buffers():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2) if name.endswith("var") else tensor.normal_()
    for parameter in decoder.norm.parameters():
        nn.init.normal_(parameter)
    return decoder


def make_inputs(dtype: torch.dtype = F64, classes: int = C, images: int = B) -> dict[str, Tensor]:
    features = F.normalize(torch.randn(images, D, H, W) + 1, dim=1)  # as of CLIP, far from mean 0
    tensors = {"features": features, "queries": F.normalize(torch.randn(classes, D), dim=1)}
    tensors["bias"] = 0.3 * torch.randn(H * W, classes) + 0.2
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def unfolded(decoder: MaskDecoder, features: Tensor, queries: Tensor, bias: Tensor | None) -> Tensor:
    return decoder(rectified_logits(query_logits(features, queries), bias), features)


def folded(decoder: MaskDecoder, features: Tensor, queries: Tensor, bias: Tensor | None) -> Tensor:
    return decoder.rectify_and_decode(features, queries, bias).tensor()


def literal(decoder: MaskDecoder, features: Tensor, queries: Tensor, bias: Tensor | None) -> Tensor:
    """One value after the other: M, then the convolution of concat(Z, M), then the norm."""
    rectified = torch.stack([torch.einsum("bdhw,d->bhw", features, query) for query in queries], dim=1)
    if bias is not None:
        rectified = torch.stack([rectified[:, k] - bias[:, k].reshape(H, W) for k in range(len(queries))], dim=1)
    out = literal_convolution(decoder, rectified, features, decoder.padding_mode)
    return out if isinstance(decoder.norm, nn.Identity) else literal_batch_norm(out, decoder.norm, decoder.training)


def results(function, decoder: MaskDecoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """M_o, and the gradients that a fixed weighting of it gives to inputs and parameters."""
    decoder.zero_grad()
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    logits = function(decoder, leaves["features"], leaves["queries"], leaves.get("bias"))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(logits)
    (weights * logits + logits.sin()).sum().backward()
    grads = {**leaves, **dict(decoder.named_parameters())}
    return {"M_o": logits.detach(), **{name: tensor.grad for name, tensor in grads.items()}}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest value. The gradient of a bias in front of batch statistics is 0 but for rounding: there
    the convolution weight's is the measure."""
    assert set(found) == set(expected)
    for name, tensor in found.items():
        measure = expected["conv.weight" if name == "conv.bias" else name].abs().max().item()
        error = (tensor.double() - expected[name].double()).abs().max().item()
        assert error <= tolerance * measure, (name, error / measure)


CASES = [(mode, size, norm) for mode in ("replicate", "zeros") for size, norm in ((1, "BN"), (3, ""), (5, "BN"))]


@pytest.mark.parametrize(("padding_mode", "kernel_size", "norm"), CASES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_all_gradients(padding_mode, kernel_size, norm, training, with_bias):
    decoder = make_decoder(kernel_size=kernel_size, padding_mode=padding_mode, norm=norm).train(training)
    tensors = make_inputs()
    if not with_bias:
        del tensors["bias"]
    found = results(folded, copy.deepcopy(decoder), tensors)
    for other in (unfolded, literal):
        assert_close(found, results(other, copy.deepcopy(decoder), tensors), 1e-12)
    assert all(tensor.abs().max() > 1e-3 for name, tensor in found.items() if name != "conv.bias")


@pytest.mark.parametrize("padding_mode", ["replicate", "zeros"])
@pytest.mark.parametrize("training", [True, False])
def test_float32_is_as_near_to_float64_as_the_literal_form(padding_mode, training):
    decoder = make_decoder(padding_mode=padding_mode).train(training)
    tensors = make_inputs()
    expected = results(literal, copy.deepcopy(decoder), tensors)
    low = {name: tensor.float() for name, tensor in tensors.items()}
    assert_close(results(folded, copy.deepcopy(decoder).float(), low), expected, 1e-6)


def test_the_border_feels_zeros_as_the_literal_form_does():
    """A bias on the border alone, seen through a kernel that looks outwards: pad(M_q - M_b), not pad(M_q) - M_b."""
    tensors = make_inputs()
    border = torch.ones(H, W, dtype=F64)
    border[1:-1, 1:-1] = 0
    tensors["bias"] = border.reshape(-1, 1) * torch.arange(1.0, C + 1, dtype=F64)
    outputs = []
    for padding_mode in ("replicate", "zeros"):
        decoder = make_decoder(padding_mode=padding_mode, kernel_size=3).eval()
        torch.manual_seed(0)
        nn.init.normal_(decoder.conv.weight)
        outputs.append(folded(decoder, **tensors))
        torch.testing.assert_close(outputs[-1], unfolded(decoder, **tensors), rtol=0, atol=1e-12)
    assert (outputs[0] - outputs[1])[..., 0, 0].abs().min() > 1e-3


# ---- batch norm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_are_updated_as_by_batch_norm(images, momentum):
    plain = make_decoder().train()
    plain.norm.momentum = momentum
    twin = copy.deepcopy(plain)
    for _ in range(3):
        tensors = make_inputs(images=images)
        with torch.no_grad():
            torch.testing.assert_close(folded(twin, **tensors), unfolded(plain, **tensors), rtol=0, atol=1e-11)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(twin.get_buffer(name), buffer, rtol=1e-12, atol=1e-13)
    assert twin.norm.num_batches_tracked.item() == 3


def test_statistics_without_cancellation():
    """A bias a thousand times the spread of the logits: E[x^2] - E[x]^2 in float32 would have no digit left."""
    decoder = make_decoder(torch.float32, kernel_size=1).train()
    tensors = {name: tensor.float().detach() for name, tensor in make_inputs().items()}
    tensors["bias"] = tensors["bias"] + 1000
    with torch.no_grad():
        found = folded(decoder, **tensors)
        mean, variance = found.mean((0, 2, 3)), found.var((0, 2, 3), correction=0)
    torch.testing.assert_close(mean, decoder.norm.bias, rtol=0, atol=2e-2)
    torch.testing.assert_close(variance, decoder.norm.weight.square(), rtol=1e-2, atol=1e-3)


def test_a_frozen_norm_in_training():
    decoder = make_decoder().train()
    decoder.norm.eval()
    tensors = make_inputs()
    assert_close(results(folded, decoder, tensors), results(unfolded, decoder, tensors), 1e-12)
    assert decoder.norm.num_batches_tracked == 0


def test_one_value_a_class_is_refused_as_by_batch_norm():
    decoder = MaskDecoder(D, C)
    features, queries = torch.randn(1, D, 1, 1), torch.randn(C, D)
    for function in (folded, unfolded):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            function(decoder, features, queries, torch.zeros(1, C))


@pytest.mark.parametrize(
    ("norm", "folds"), [("BN", True), ("", True), ("SyncBN", False), ("FrozenBN", False), ("GN", False)]
)
def test_which_norms_fold(norm, folds):
    assert MaskDecoder(D, 32, norm=norm).folds == folds
    bare = MaskDecoder(D, C)
    bare.norm = nn.BatchNorm2d(C, track_running_stats=False)
    assert not bare.folds


def test_gradients_reach_no_frozen_features():
    decoder = make_decoder()
    tensors = make_inputs()
    features = tensors["features"].detach()
    folded(decoder, features, tensors["queries"].detach(), tensors["bias"]).square().sum().backward()
    assert features.grad is None and tensors["bias"].grad is not None


# ---- in the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "patches", "pays"), [(12, 1024, True), (4, 1024, True), (3, 1024, False), (1, 10**6, False)]
)
def test_small_batches_do_not_fold(images, patches, pays):
    assert MaskDecoder(512, 2).folding_pays(images, patches) == pays


def test_a_batch_folds_by_its_size(monkeypatch):
    model, calls = make_rectified(), []
    inner = MaskDecoder.rectify_and_decode
    monkeypatch.setattr(MaskDecoder, "rectify_and_decode", lambda *args: calls.append(1) or inner(*args))
    model(batch(*USUAL))
    assert not calls
    model(batch(*USUAL, *USUAL))
    assert calls == [1]


@pytest.fixture
def literally(monkeypatch):
    """Batches of any size fold; ``literally()`` takes the literal path from then on."""
    monkeypatch.setattr(MaskDecoder, "folding_pays", lambda self, images, patches: True)
    return lambda: monkeypatch.setattr(MaskDecoder, "folds", property(lambda self: False))


def step(model, specs) -> dict[str, Tensor]:
    """Losses, gradients and state of one training step."""
    torch.manual_seed(4)
    losses = model(batch(*specs))
    sum(losses.values()).backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: value.detach() for name, value in losses.items()}, **grads, **model.state_dict()}


@pytest.mark.parametrize("specs", [USUAL, PADDED], ids=["one size", "padding"])
@pytest.mark.parametrize("rectification", ["subtract", "add", "none"])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_step_of_the_model(specs, rectification, kernels, literally):
    options = {"rectification": rectification, "kernels": kernels, "gumbel_hard": False, "gumbel_tau": 0.5}
    model = make_rectified(**options, loss_weights={"coverage": 0.5, "outside": 2.0})
    twin = copy.deepcopy(model)
    found = step(model, specs)
    literally()
    expected = step(twin, specs)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-6, msg=name)


def test_the_bias_is_left_to_the_operator(literally):
    model = make_rectified()
    images = model.preprocess_image(batch(*USUAL)).tensor
    features = model.backbone(images)["dense"]
    parts = features, model.query_features, model.bias_to_rectify(features)
    assert model.decode(*parts).bias.shape == (20, 4)
    literally()
    assert model.decode(*parts).bias is None
    model = make_reclip(decoder=True)  # a bias of each image does not fold
    assert model.decode(features, model.query_features, model.bias_to_rectify(features)).bias is None


def test_accumulated_gradients_are_the_sum_of_two_steps(literally):
    model = make_rectified(gumbel_hard=False)
    singles = []
    for accumulate in (False, False, True):
        if not accumulate:
            model.zero_grad()
        step(model, USUAL)
        singles.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, total in singles[2].items():
        torch.testing.assert_close(total, 2 * singles[1][name], rtol=1e-4, atol=1e-5)


def test_autocast_decodes_in_float32(literally):
    model = make_rectified(gumbel_hard=False)
    features = model.backbone(model.preprocess_image(batch(*USUAL)).tensor)["dense"]
    full = copy.deepcopy(model).decode(features, model.query_features, model.bias_to_rectify(features)).tensor()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask_logits = model.decode(features, model.query_features, model.bias_to_rectify(features))
        assert mask_logits.logits.dtype == mask_logits.bias.dtype == torch.float32
        mixed = mask_logits.tensor()
    torch.testing.assert_close(mixed, full, rtol=0, atol=0.1)
    assert not torch.equal(mixed, full)  # bfloat16 was at work in the convolution


# ---- caches of eval mode ------------------------------------------------------------------------------------------


def labels_of(model, seed: int = 0, size: tuple[int, int] = (32, 40)) -> Tensor:
    return model([{"image": random_image(seed, *size)}])[0]["sem_seg"]


def test_eval_mode_equals_the_literal_form(literally):
    model = make_rectified()
    step(model, USUAL)  # statistics of images
    model.eval()
    found = [labels_of(model, *case) for case in ((0, (32, 40)), (1, (32, 40)), (2, (17, 20)))]
    literally()
    expected = [labels_of(model, *case) for case in ((0, (32, 40)), (1, (32, 40)), (2, (17, 20)))]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_what_is_folded_is_computed_once_in_eval_mode(monkeypatch):
    model = make_rectified().eval()
    calls = {"fold": 0, "fold_bias": 0}
    for name in calls:
        inner = getattr(model.mask_decoder, name)
        monkeypatch.setattr(
            model.mask_decoder,
            name,
            lambda *args, name=name, inner=inner: calls.update({name: calls[name] + 1}) or inner(*args),
        )
    for seed, size in enumerate([(32, 40), (32, 40), (32, 32), (32, 40)]):
        labels_of(model, seed, size)
    assert calls == {"fold": 1, "fold_bias": 2}


def test_caches_follow_the_weights():
    model, other = (make_rectified().eval() for _ in range(2))
    for parameter in other.mask_decoder.parameters():
        nn.init.normal_(parameter)
    before = labels_of(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(labels_of(model), labels_of(other))
    assert (labels_of(model) - before).abs().max() > 1e-2
    model.train()
    with torch.no_grad():
        model.mask_decoder.norm.bias.add_(torch.arange(4.0))
    found = labels_of(model.eval()) - labels_of(other)
    torch.testing.assert_close(found, torch.arange(4.0)[:, None, None].expand_as(found), rtol=0, atol=1e-4)


def test_with_gradients_nothing_is_cached(literally):
    model = make_rectified().eval()
    images = model.preprocess_image(batch(*USUAL)).tensor
    for _ in range(2):  # a cached graph would be freed by the first backward pass
        model.segment(images)[1].sum().backward()
    assert model.mask_decoder.conv.weight.grad is not None
