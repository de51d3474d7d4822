"""RectifiedCLIP with the bias head of ReCLIP: a bias for each image.

Shape letters: B images, (h, w) patch grid, n = h*w patches, C classes.
"""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from reclip_d2.config import load_config
from reclip_d2.layers import draw_seed, gumbel_softmax, masked_average_pool
from reclip_d2.modeling.bias_head import query_logits
from reclip_d2.modeling.losses import contrastive_loss
from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP
from reclip_d2.modeling.pooling import PooledHypotheses, pack_hypotheses
from reclip_d2.modeling.reclip_bias_head import ReCLIPBiasHead
from tests.helpers import bias_of, make_reclip, random_image


def inputs_of(*specs: tuple[tuple[int, int], list[int]]) -> list[dict]:
    return [
        {"image": random_image(i, *size), "hypothesis": torch.tensor(h, dtype=torch.int64), "file_name": f"{i}.jpg"}
        for i, (size, h) in enumerate(specs)
    ]


USUAL = [((32, 40), [0, 2]), ((32, 40), [1]), ((32, 40), [0, 1, 3])]


@pytest.mark.parametrize(("mode", "sign"), [("subtract", -1), ("add", 1), ("none", 0)])
@pytest.mark.parametrize("decoder", [True, False])
def test_mask_logits(mode, sign, decoder):
    model = make_reclip(rectification=mode, decoder=decoder).eval()
    images = model.preprocess_image([{"image": random_image(i, 32, 40)} for i in range(2)]).tensor
    with torch.no_grad():
        features = model.backbone(images)["dense"]
        bias = bias_of(model.bias_head, model.backbone, features).transpose(1, 2).unflatten(2, (4, 5))
        expected = query_logits(features, model.query_features) + sign * bias
        expected = model.mask_decoder(expected, features) if decoder else expected
        torch.testing.assert_close(model.mask_logits(images), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.mask_logits(images[1:]), expected[1:], rtol=0, atol=1e-5)


def test_text_and_places_are_computed_once_and_images_each(monkeypatch):
    model = make_reclip().eval()
    counts = {"reference_features": 0, "shared_bias": 0, "image_bias": 0}

    def counted(name):
        inner = getattr(model.bias_head, name)

        def call(*args):
            counts[name] += 1
            return inner(*args)

        return call

    for name in counts:
        monkeypatch.setattr(model.bias_head, name, counted(name))
    outputs = [model([{"image": random_image(i, 32, 32)}])[0]["sem_seg"] for i in range(3)]
    assert counts == {"reference_features": 1, "shared_bias": 1, "image_bias": 3}
    model([{"image": random_image(0, 32, 40)}])
    assert counts == {"reference_features": 1, "shared_bias": 2, "image_bias": 4}
    model.train().eval()
    torch.testing.assert_close(model([{"image": random_image(2, 32, 32)}])[0]["sem_seg"], outputs[2])
    assert counts["reference_features"] == 2


def test_a_text_of_other_weights_is_forgotten():
    model, other = make_reclip().eval(), make_reclip().eval()
    with torch.no_grad():
        other.bias_head.reference_prompt.vectors.normal_()
    record = {"image": random_image(0)}
    before = model([record])[0]["sem_seg"]
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model([record])[0]["sem_seg"], other([record])[0]["sem_seg"])
    assert (before - model([record])[0]["sem_seg"]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["subtract", "add"])
@pytest.mark.parametrize("kernels", [True, False])
def test_losses_of_a_batch(mode, kernels):
    model = make_reclip(
        rectification=mode, kernels=kernels, gumbel_tau=0.5, loss_weights={"coverage": 0.5, "outside": 2.0}
    )
    inputs = inputs_of(*USUAL)
    images = model.preprocess_image(inputs).tensor
    features = model.backbone(images)["dense"]
    bias = bias_of(copy.deepcopy(model.bias_head), model.backbone, features)  # the copy's running statistics change
    logits = query_logits(features, model.query_features).flatten(2).transpose(1, 2)
    logits = logits - bias if mode == "subtract" else logits + bias
    ids, offsets = pack_hypotheses([record["hypothesis"] for record in inputs])
    torch.manual_seed(7)
    masks = gumbel_softmax(logits, 0.5, True, draw_seed())
    pooled, area = masked_average_pool(features.flatten(2).transpose(1, 2), masks, ids, offsets)
    expected = contrastive_loss(PooledHypotheses(pooled, area, ids, offsets), model.query_features, model.loss_tau)
    torch.manual_seed(7)
    losses = model(inputs)
    assert losses["loss_contrastive"].item() == pytest.approx(expected.item(), rel=1e-4)
    probabilities = torch.softmax(logits / 0.5, dim=-1)
    inside = torch.stack([p[:, record["hypothesis"]].sum(-1) for p, record in zip(probabilities, inputs, strict=True)])
    assert losses["loss_coverage"].item() == pytest.approx(-0.5 * inside.log().mean().item(), rel=1e-4)
    assert losses["loss_outside"].item() == pytest.approx(2 * (1 - inside).mean().item(), rel=1e-4)


def test_loss_falls_and_all_of_the_head_trains():
    model = make_reclip(loss_weights={"coverage": 1.0})
    start = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in start} == {"bias_head"}
    inputs = inputs_of(*USUAL)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    values = []
    for step in range(30):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = sum(model(inputs).values())
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    unchanged = {name for name, value in start.items() if torch.equal(value, model.get_parameter(name))}
    assert not {name for name in unchanged if not name.endswith(("convs.0.bias", "convs.1.bias", "convs.2.bias"))}


def test_the_picture_shows_the_image_s_own_bias_and_changes_no_statistics(monkeypatch):
    shown = []
    monkeypatch.setattr(
        "reclip_d2.modeling.meta_arch.rectified_clip.training_panel",
        lambda image, logits, bias: shown.append(bias) or torch.zeros(3, 4, 4).numpy(),
    )
    model = make_reclip(vis_period=1)
    silent, twin = copy.deepcopy(model), copy.deepcopy(model)
    silent.vis_period = 0
    with EventStorage(0):
        model(inputs_of(*USUAL))
        silent(inputs_of(*USUAL))
    assert all(torch.equal(value, silent.state_dict()[name]) for name, value in model.state_dict().items())
    assert len(shown) == 1
    features = twin.backbone(twin.preprocess_image(inputs_of(*USUAL)).tensor)["dense"]
    torch.testing.assert_close(shown[0], bias_of(twin.bias_head, twin.backbone, features)[0].unflatten(0, (4, 5)))


def test_the_config_builds_it(datasets):
    datasets("reclip_test_model", [], ["sky", "water", "brick wall"])
    options = ["MODEL.META_ARCHITECTURE", "RectifiedCLIP", "MODEL.BACKBONE.NAME", "DenseCLIP", "MODEL.DEVICE", "cpu"]
    options += ["MODEL.CLIP.NAME", "reclip-embedded", "MODEL.CLIP.TEMPLATES", "photo"]
    options += ["MODEL.MASK_DECODER.ENABLED", False, "MODEL.BIAS_HEAD.NAME", "ReCLIPBiasHead"]
    options += ["DATASETS.TRAIN", ("reclip_test_model",)]
    model = build_model(load_config("", options))
    assert isinstance(model, RectifiedCLIP) and isinstance(model.bias_head, ReCLIPBiasHead)
    names = {name.rsplit(".", 1)[0] for name in model.state_dict()}
    layers = {f"bias_head.space_projection.{kind}.{i}" for kind in ("convs", "norms") for i in range(3)}
    assert names == {"bias_head.reference_prompt", *layers}
