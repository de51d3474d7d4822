"""The linear probe: its loss, its frozen model, its prediction, its checkpoint.

Shape letters: B images, D width of the joint embedding, C classes, (h, w) patch grid.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reclip_d2.data.tiling import SlidingWindow, Tiling
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.linear_probe import LinearProbe, probe_loss, weights_digest
from reclip_d2.inference import DatasetPredictor, ImagePredictor
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from tests.helpers import EMBED_DIM, make_maskclip, make_rectified, random_image


def inputs(*sizes: tuple[int, int]) -> list[dict]:
    """Images and random labels, a third of the pixels without one."""
    records = []
    for index, size in enumerate(sizes):
        labels = torch.randint(0, 4, size)
        records.append(
            {"image": random_image(index, *size), "sem_seg": labels.masked_fill(torch.rand(size) < 1 / 3, -1)}
        )
    return records


def train(probe: LinearProbe, records: list[dict], steps: int = 3, lr: float = 0.5) -> list[float]:
    probe.train()
    optimizer = torch.optim.SGD([p for p in probe.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = probe(records)["loss_linear_probe"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- loss -------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """Two labelled pixels of four: -log of 3/4 and of 1/4."""
    logits = torch.stack([torch.full((2, 2), math.log(3.0)), torch.zeros(2, 2)])[None]
    labels = torch.tensor([[[0, -1], [-1, 1]]])
    assert probe_loss(logits, labels).item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_loss_at_the_pixels():
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    labels = torch.randint(-1, 3, (2, 11, 16))
    large = F.interpolate(logits, size=(11, 16), mode="bilinear", align_corners=False).log_softmax(1)
    values = [-large[b, labels[b, i, j], i, j] for b, i, j in np.argwhere(labels.numpy() >= 0)]
    assert probe_loss(logits, labels).item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-12)


def test_no_label_at_all_is_no_loss():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = probe_loss(logits, torch.full((1, 4, 4), -1))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


# ---- what is probed -----------------------------------------------------------------------------------------------


def test_embedding_of_maskclip():
    model = make_maskclip()
    images = torch.randn(2, 3, 32, 40)
    embedding = LinearProbe(model).pixel_embedding(images)
    assert torch.equal(embedding, model.backbone(images)["dense"]) and embedding.shape == (2, EMBED_DIM, 4, 5)


@pytest.mark.parametrize("decoder", [True, False])
def test_embedding_of_a_rectified_model(decoder):
    """Z and M_o: the model's own prediction is a linear function of it."""
    model = make_rectified(decoder=decoder)
    images = torch.randn(2, 3, 32, 40)
    probe = LinearProbe(model)
    assert not model.training
    embedding = probe.pixel_embedding(images)
    assert probe.embedding_width == embedding.shape[1] == EMBED_DIM + 4
    features, logits = embedding.split([EMBED_DIM, 4], dim=1)
    assert torch.equal(features, model.backbone(images)["dense"])
    torch.testing.assert_close(logits, model.mask_logits(images))


def test_the_model_stays_as_it_is_and_the_embedding_is_fixed():
    model = make_rectified()
    probe = LinearProbe(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(1, 3, 32, 32)
    embedding = probe.pixel_embedding(images)
    losses = train(probe, inputs((32, 32), (32, 32)), steps=8)
    assert losses[0] == pytest.approx(math.log(4), rel=1e-5)  # weights start at zero
    assert losses[-1] < losses[0] - 0.01
    assert probe.training and not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(probe.pixel_embedding(images), embedding)
        assert probe.mask_logits(images).dtype == torch.float32


def test_labels_of_images_of_different_sizes():
    """Padding has no label: the loss on the padded batch counts only the images' pixels."""
    probe = LinearProbe(make_maskclip(), batch_norm=False)
    train(probe, inputs((32, 32)))
    records = inputs((32, 40), (17, 20))
    images = probe.preprocess_image(records).tensor
    with torch.no_grad():
        large = F.interpolate(probe.mask_logits(images), size=(32, 40), mode="bilinear", align_corners=False)
        parts = [
            (large[b, :, : r["sem_seg"].shape[0], : r["sem_seg"].shape[1]], r["sem_seg"]) for b, r in enumerate(records)
        ]
        values = torch.cat(
            [F.cross_entropy(x[None], y[None], ignore_index=-1, reduction="none")[0][y >= 0] for x, y in parts]
        )
    assert probe(records)["loss_linear_probe"].item() == pytest.approx(values.mean().item(), rel=1e-5)


# ---- prediction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", [True, False])
def test_at_test_time_the_probe_is_an_affine_map(batch_norm):
    probe = LinearProbe(make_rectified(), batch_norm=batch_norm)
    train(probe, inputs((32, 32), (32, 32)))
    probe.eval()
    images = torch.randn(2, 3, 32, 40)
    embedding = probe.pixel_embedding(images).double()
    weight, bias = probe.classifier.weight[:, :, 0, 0].double(), probe.classifier.bias.double()
    if batch_norm:
        scale = (probe.norm.running_var.double() + probe.norm.eps).rsqrt()
        embedding = (embedding - probe.norm.running_mean[:, None, None]) * scale[:, None, None]
    expected = torch.einsum("bfhw,cf->bchw", embedding, weight) + bias[:, None, None]
    torch.testing.assert_close(probe.mask_logits(images).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_norm_has_the_mean_of_all_batches():
    probe = LinearProbe(make_maskclip())
    batches = [inputs((32, 32)), inputs((32, 32), (32, 32))[1:]]
    for batch in batches:
        train(probe, batch, steps=1)
    means = [probe.pixel_embedding(probe.preprocess_image(batch).tensor).mean((0, 2, 3)) for batch in batches]
    torch.testing.assert_close(probe.norm.running_mean, (means[0] + means[1]) / 2)


@pytest.mark.parametrize("sliding_window", [None, SlidingWindow((16, 16), (8, 8))])
def test_prediction(sliding_window):
    """Labels of an image of odd size at another size: as the logits say."""
    probe = LinearProbe(make_maskclip())
    train(probe, inputs((32, 32)))
    record = {"image": random_image(5, 27, 34), "height": 50, "width": 61}
    predictor = ImagePredictor(probe.eval(), [], Tiling(100, 50, 0.0), 10**8, sliding_window)
    labels = DatasetPredictor(probe, predictor)([record])[0]["sem_seg"]
    assert labels.shape == (50, 61) and labels.dtype == torch.int64
    logits = DatasetPredictor(probe, predictor, label_maps=False)([record])[0]["sem_seg"]
    assert logits.shape == (4, 50, 61)
    assert (logits.argmax(0) == labels).float().mean() > 0.999  # rounding at ties apart
    if sliding_window is None:
        torch.testing.assert_close(logits, probe([record])[0]["sem_seg"])
        small = probe.mask_logits(probe.preprocess_image([record]).tensor)
        large = F.interpolate(small, size=(32, 40), mode="bilinear", align_corners=False)[..., :27, :34]
        torch.testing.assert_close(
            logits[None], F.interpolate(large, size=(50, 61), mode="bilinear", align_corners=False)
        )


def test_it_learns_what_is_linear():
    """Each 16 x 16 quarter has one of four colours, which its label names."""
    colors = torch.tensor([[250, 20, 20], [20, 250, 20], [20, 20, 250], [240, 240, 30]], dtype=torch.uint8)
    records = []
    for _ in range(8):
        labels = torch.randint(0, 4, (2, 2)).repeat_interleave(16, 0).repeat_interleave(16, 1)
        records.append({"image": colors[labels].permute(2, 0, 1), "sem_seg": labels})
    probe = LinearProbe(make_maskclip())
    train(probe, records, steps=60)
    found = torch.stack([output["sem_seg"].argmax(0) for output in probe.eval()(records)])
    accuracy = (found == torch.stack([r["sem_seg"] for r in records])).float().mean()
    assert accuracy > 0.9


# ---- checkpoint -------------------------------------------------------------------------------------------------


def test_checkpoint_holds_the_classifier_and_names_the_model(tmp_path):
    probe = LinearProbe(make_rectified())
    train(probe, inputs((32, 32)))
    ReclipCheckpointer(probe, str(tmp_path)).save("probe")
    keys = set(torch.load(tmp_path / "probe.pth", weights_only=True)["model"])
    assert keys == {"classifier.weight", "classifier.bias", *(f"norm.{k}" for k in (
        "running_mean", "running_var", "num_batches_tracked"))}  # fmt: skip

    same = LinearProbe(probe.model)
    ReclipCheckpointer(same).load(str(tmp_path / "probe.pth"))
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(same.eval().mask_logits(images), probe.eval().mask_logits(images))

    other = make_rectified()  # the same CLIP and classes, other weights
    assert other.identity() == probe.model.identity() and weights_digest(other) != weights_digest(probe.model)
    with pytest.raises(ReclipError, match="is of another probed model: "):
        ReclipCheckpointer(LinearProbe(other)).load(str(tmp_path / "probe.pth"))
    with pytest.raises(ReclipError, match="probed model"):
        ReclipCheckpointer(probe.model).load(str(tmp_path / "probe.pth"))
