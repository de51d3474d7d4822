"""Training of RectifiedCLIP: the losses of a batch against literal loops, and a few steps.

Shape letters: B images, C classes, D joint embedding, n = h*w patches, K hypothesis rows.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from reclip_d2.errors import ReclipError
from reclip_d2.layers import draw_seed, gumbel_softmax
from reclip_d2.modeling.bias_head import bias_to_subtract, query_logits, rectified_logits
from tests.helpers import bias_of, make_rectified, random_image


def batch(*specs: tuple[tuple[int, int], list[int]]) -> list[dict]:
    """Inputs of the given sizes and hypotheses."""
    return [
        {"image": random_image(i, *size), "hypothesis": torch.tensor(h, dtype=torch.int64), "file_name": f"{i}.jpg"}
        for i, (size, h) in enumerate(specs)
    ]


USUAL = [((32, 40), [0, 2]), ((32, 40), [1]), ((32, 40), [0, 1, 3])]
PADDED = [((32, 40), [0, 2]), ((17, 20), [1, 3]), ((8, 33), [0, 1, 3])]


def masks_of(model, inputs, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Z ``(B, n, D)``, mask logits ``(B, n, C)`` and the masks that the operator samples after torch.manual_seed."""
    images = model.preprocess_image(inputs).tensor
    features = model.backbone(images)["dense"]
    logits = query_logits(features, model.query_features)
    bias = bias_of(model.bias_head, model.backbone, features)
    logits = rectified_logits(logits, bias_to_subtract(bias, model.rectification))
    if model.mask_decoder is not None:
        logits = copy.deepcopy(model.mask_decoder)(logits, features)  # the copy's running statistics may change
    logits = logits.flatten(2).transpose(1, 2)
    torch.manual_seed(seed)
    masks = gumbel_softmax(logits, model.gumbel_tau, model.gumbel_hard, draw_seed())
    return features.flatten(2).transpose(1, 2), logits, masks


def inside_image(inputs, grid: tuple[int, int]) -> torch.Tensor:
    """``(B, n)``: patches of 8 pixels whose centre lies in the image."""
    rows = []
    for record in inputs:
        height, width = record["image"].shape[1:]
        rows.append([8 * i + 4 < height and 8 * j + 4 < width for i in range(grid[0]) for j in range(grid[1])])
    return torch.tensor(rows)


def literal_contrastive(model, inputs, features, masks, valid) -> torch.Tensor:
    """Eq. (7): pooled over the valid patches of each mask, cosine similarities, mean over H, mean over images."""
    images = []
    for b, record in enumerate(inputs):
        rows = []
        for k in record["hypothesis"].tolist():
            weights = masks[b, :, k] * valid[b]
            if weights.sum() == 0:
                rows.append(masks.new_zeros(()))
                continue
            pooled = (weights[:, None] * features[b]).sum(0) / weights.sum()
            scores = torch.stack([torch.cosine_similarity(pooled, q, dim=0) for q in model.query_features])
            rows.append(-torch.log_softmax(scores / model.loss_tau, dim=0)[k])
        images.append(torch.stack(rows).sum() / max(len(rows), 1) if rows else masks.new_zeros(()))
    return torch.stack(images).mean()


@pytest.mark.parametrize("specs", [USUAL, PADDED], ids=["one size", "padding"])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_losses_of_a_batch_against_loops(specs, hard, decoder):
    model = make_rectified(
        decoder=decoder,
        gumbel_hard=hard,
        loss_weights={"contrastive": 2.0, "coverage": 0.5, "outside": 3.0, "anchor": 4.0},
    )
    inputs = batch(*specs)
    valid = inside_image(inputs, (4, 5))
    features, logits, masks = masks_of(model, inputs, seed=11)
    torch.manual_seed(11)
    losses = model(inputs)
    assert set(losses) == {"loss_contrastive", "loss_coverage", "loss_outside", "loss_anchor"}
    expected = literal_contrastive(model, inputs, features, masks, valid)
    assert losses["loss_contrastive"].item() == pytest.approx(2 * expected.item(), rel=1e-4)

    probabilities = torch.softmax(logits / model.gumbel_tau, dim=-1)
    inside = torch.stack([probabilities[b][:, r["hypothesis"]].sum(-1) for b, r in enumerate(inputs)])
    count = valid.sum().item()
    assert losses["loss_coverage"].item() == pytest.approx(-0.5 * inside.log()[valid].sum().item() / count, rel=1e-4)
    assert losses["loss_outside"].item() == pytest.approx(3 * (1 - inside)[valid].sum().item() / count, rel=1e-4)
    own = torch.softmax(model.backbone.logit_scale * (features @ model.query_features.T), dim=-1)
    confidence, labels = own.max(-1)
    anchored = -confidence * probabilities.gather(-1, labels[..., None])[..., 0].log()
    assert losses["loss_anchor"].item() == pytest.approx(4 * anchored[valid].sum().item() / count, rel=1e-4)


def test_gradient_of_the_contrastive_loss_without_decoder_in_soft_mode():
    model = make_rectified(decoder=False, gumbel_hard=False)
    inputs = batch(*PADDED)
    features, _, masks = masks_of(model, inputs, seed=5)
    literal_contrastive(model, inputs, features, masks, inside_image(inputs, (4, 5))).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.manual_seed(5)
    model(inputs)["loss_contrastive"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-3, atol=1e-5)


def test_what_lies_in_the_padding_has_no_part_in_the_pooled_features():
    """A mate's size decides how much padding there is; the small image's own loss terms must not feel its content."""
    model = make_rectified(decoder=False, rectification="none", gumbel_hard=False, gumbel_tau=1e6)
    # With a huge tau_1 the soft masks depend on the noise alone; pool over the only valid patch gives its feature.
    inputs = batch(((32, 40), []), ((8, 8), [0, 1]))
    features = model.backbone(model.preprocess_image(inputs).tensor)["dense"][1, :, 0, 0]
    scores = torch.log_softmax(model.query_features @ F.normalize(features, dim=0) / model.loss_tau, dim=0)
    expected = -(scores[0] + scores[1]) / 2 / 2  # |H| = 2, two images
    assert model(inputs)["loss_contrastive"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_mask_on_padding_alone_adds_no_loss_and_no_gradient():
    """8 x 8 pixels next to 32 x 40: 19 of 20 patches are padding, so most hard masks miss the image."""
    model = make_rectified(decoder=False, gumbel_tau=1.0)
    inputs = batch(((32, 40), [0]), ((8, 8), [0, 1, 2, 3]))
    for seed in range(5):
        model.zero_grad()
        features, _, masks = masks_of(model, inputs, seed)
        expected = literal_contrastive(model, inputs, features, masks, inside_image(inputs, (4, 5)))
        torch.manual_seed(seed)
        loss = model(inputs)["loss_contrastive"]
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert max(p.grad.abs().max().item() for p in model.bias_head.parameters()) < 1e3


def test_a_batch_without_any_hypothesis():
    model = make_rectified(loss_weights={"coverage": 1.0, "outside": 1.0})
    losses = model(batch(((32, 32), []), ((32, 32), [])))
    assert all(value.item() == 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_rectification_none_gives_the_bias_head_no_gradient():
    model = make_rectified(rectification="none")
    sum(model(batch(*USUAL)).values()).backward()
    assert all(p.grad is None for p in model.bias_head.parameters())
    assert model.mask_decoder.conv.weight.grad.abs().max() > 0


def test_a_loss_of_weight_zero_is_not_computed():
    assert set(make_rectified()(batch(*USUAL))) == {"loss_contrastive"}
    only = make_rectified(loss_weights={"contrastive": 0.0, "outside": 1.0})
    assert set(only(batch(*USUAL))) == {"loss_outside"}


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("weights", [{}, {"contrastive": 0.0, "coverage": 1.0}])
def test_a_loss_that_is_not_finite_names_the_key(decoder, weights):
    model = make_rectified(decoder=decoder, loss_weights=weights)
    with torch.no_grad():
        model.bias_head.positional_projection.conv.weight[0] = float("nan")
    with pytest.raises(ReclipError, match=r"loss_\w+ is not finite: the training has diverged") as caught:
        model(batch(*USUAL))
    assert "SOLVER.BASE_LR" in str(caught.value) and "\n" not in str(caught.value)


def test_the_host_reads_one_flag_a_step():
    """On a GPU each read waits. Sizes of images (integers) and the flag of padding are known on the CPU."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            read = function is torch.ops.aten._local_scalar_dense.default
            self.count += read and args[0].dtype != torch.int64
            return function(*args, **(kwargs or {}))

    model = make_rectified(loss_weights={"coverage": 1.0, "outside": 1.0})
    for specs in (USUAL, PADDED):
        with Reads() as reads:
            assert len(model(batch(*specs))) == 3
        assert reads.count == 1 + (specs is PADDED)


def test_the_seed_governs_the_noise():
    model = make_rectified(decoder=False, gumbel_tau=1.0)
    values = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        values.append(model(batch(*USUAL))["loss_contrastive"].item())
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("decoder", [True, False])
def test_kernels_and_their_twins_give_the_same_losses_and_gradients(decoder):
    """``MODEL.USE_KERNELS``: both draw the same noise. Where nothing is compiled, both are the twins."""
    model = make_rectified(decoder=decoder, loss_weights={"coverage": 1.0})
    results = []
    for kernels in (True, False):
        model.kernels = kernels
        model.zero_grad()
        torch.manual_seed(2)
        losses = model(batch(*PADDED))
        sum(losses.values()).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({**{key: value.detach() for key, value in losses.items()}, **grads})
    assert set(results[0]) == set(results[1])
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("decoder", [True, False])
def test_loss_falls_and_the_clip_stays_as_it_is(decoder):
    model = make_rectified(decoder=decoder, loss_weights={"coverage": 1.0})
    before = {name: value.clone() for name, value in model.backbone.clip.state_dict().items()}
    queries = model.query_features.clone()
    start = copy.deepcopy({name: p for name, p in model.named_parameters() if p.requires_grad})
    inputs = batch(*USUAL)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    def mean_loss() -> float:
        """Over fixed noise, so that luck has no part."""
        values = []
        for seed in range(10):
            torch.manual_seed(seed)
            values.append(sum(model(inputs).values()).item())
        return sum(values) / len(values)

    at_first = mean_loss()
    for _ in range(25):
        optimizer.zero_grad()
        sum(model(inputs).values()).backward()
        optimizer.step()
    assert mean_loss() < 0.9 * at_first
    for name, value in model.backbone.clip.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(model.query_features, queries)
    for name, parameter in start.items():
        assert not torch.equal(parameter, model.get_parameter(name)), name


def test_pictures_for_tensorboard():
    model = make_rectified(vis_period=2)
    inputs = batch(((17, 33), [0]), ((32, 40), [1]))
    with EventStorage(0) as storage:
        model(inputs)
        assert len(storage._vis_data) == 1
        name, picture, step = storage._vis_data[0]
        assert "bias" in name and step == 0
        assert tuple(picture.shape) == (3, 17, 3 * 33)
        storage.step()
        model(inputs)
        assert len(storage._vis_data) == 1
