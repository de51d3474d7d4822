"""Calibration of MaskCLIP on unlabelled images, from files to the model's offset.

Shape letters: C classes, (h, w) patch grid.
"""

import pytest
import torch
from detectron2.config import CfgNode

from reclip_d2.config import load_config
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.engine.calibration import calibrate
from reclip_d2.features.views import ViewPlan, Views
from reclip_d2.features.whole_images import WholeImages
from reclip_d2.modeling.class_shares import estimate_class_shares
from tests.helpers import make_maskclip, write_scenes


def mapper() -> UnlabelledDatasetMapper:
    return UnlabelledDatasetMapper(config(), is_train=False)


def config() -> CfgNode:
    return load_config("", ["INPUT.MIN_SIZE_TEST", "0"])


def features_of(model, records) -> WholeImages:
    records = [{"image_id": record["file_name"], "file_name": record["file_name"]} for record in records]
    views = Views(config(), records, ViewPlan.whole_images(config()))
    return WholeImages(views, model.backbone.stride, model.view_encoder)


def mean_probability(model, records) -> torch.Tensor:
    """Mean soft-max over the images, ``(C, h, w)``."""
    means = []
    for record in records:
        image = model.preprocess_image([mapper()(record)]).tensor
        means.append((model.mask_logits(image)[0] * model.backbone.logit_scale).softmax(0))
    return torch.stack(means).mean(0)


def test_by_class(tmp_path):
    records = write_scenes(tmp_path, 4, size=(32, 40))
    model = make_maskclip(calibration="class")
    calibrate(model, features_of(model, records))
    assert model.calibration_offset.shape == (4, 1, 1)
    uniform = torch.full((4,), 0.25)
    torch.testing.assert_close(mean_probability(model, records).mean((1, 2)), uniform, rtol=1e-3, atol=0)
    plain = mean_probability(make_maskclip(), records).mean((1, 2))
    assert (plain - uniform).abs().max() > 0.02


def test_to_estimated_shares(tmp_path):
    records = write_scenes(tmp_path, 4, size=(32, 40))
    model = make_maskclip(calibration="estimated")
    calibrate(model, features_of(model, records))
    plain = make_maskclip()
    features = []
    for record in records:
        images = plain.preprocess_image([mapper()(record)])
        features.append(plain.backbone.dense(images.tensor, images.image_sizes)[0].flatten(1).T)
    shares = estimate_class_shares(torch.cat(features), plain.query_features, plain.backbone.logit_scale)
    torch.testing.assert_close(mean_probability(model, records).mean((1, 2)), shares, rtol=2e-3, atol=1e-4)


def test_by_position_and_class(tmp_path):
    records = write_scenes(tmp_path, 4, size=(32, 40))
    model = make_maskclip(calibration="position_class")
    calibrate(model, features_of(model, records))
    assert model.calibration_offset.shape == (4, 4, 5)
    torch.testing.assert_close(mean_probability(model, records), torch.full((4, 4, 5), 0.25), rtol=2e-3, atol=0)


def test_padding_has_no_say(tmp_path):
    """18 x 34 pixels are 2 x 4 patches and a strip of two pixels, which is mostly padding."""
    records = write_scenes(tmp_path, 3, size=(18, 34))
    model = make_maskclip(calibration="class")
    calibrate(model, features_of(model, records))
    inside = []
    for record in records:
        image = model.preprocess_image([mapper()(record)]).tensor
        inside.append((model.mask_logits(image)[0, :, :2, :4] * model.backbone.logit_scale).softmax(0))
    torch.testing.assert_close(torch.stack(inside).mean((0, 2, 3)), torch.full((4,), 0.25), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["class", "position_class"])
def test_images_of_several_sizes_and_a_limit(tmp_path, kind):
    records = [
        *write_scenes(tmp_path / "a", 2, size=(32, 40)),
        *write_scenes(tmp_path / "b", 2, size=(24, 64), seed=1),
    ]
    model = make_maskclip(calibration=kind)
    calibrate(model, features_of(model, records))
    assert model.calibration_offset.shape == ((4, 1, 1) if kind == "class" else (4, 4, 5))
    assert torch.isfinite(model.calibration_offset).all()
    limited = make_maskclip(calibration=kind)
    calibrate(limited, features_of(limited, records), max_images=2)  # the first and the third
    expected = make_maskclip(calibration=kind)
    calibrate(expected, features_of(expected, records[::2]))
    torch.testing.assert_close(limited.calibration_offset, expected.calibration_offset)
