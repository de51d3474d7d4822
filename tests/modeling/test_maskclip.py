"""MaskCLIP: its logits, its test-time options and controls, and inference at any size.

Shape letters: B images, C classes, (h, w) patch grid, n = h*w patches, E width of the image transformer.
"""

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.backbones.query import get_templates
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from reclip_d2.modeling.meta_arch import base
from reclip_d2.modeling.meta_arch.maskclip import denoise_prompts, mean_filter, smooth_by_keys
from reclip_d2.modeling.view_batch import stack_on
from tests.helpers import PIXEL_MEAN, PIXEL_STD, make_maskclip, random_image


def normalise(image: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    return (image.float() - mean) / std


def predict(model, image, **record) -> torch.Tensor:
    return model([{"image": image, **record}])[0]["sem_seg"]


# ---- the model ------------------------------------------------------------------------------------------------


def test_logits_are_similarities_of_patches_and_class_names():
    model = make_maskclip()
    image = random_image(0, 32, 48)
    features = model.backbone(normalise(image)[None])["dense"][0]
    got = model.mask_logits(normalise(image)[None])[0]
    assert got.shape == (4, 4, 6)
    for row in range(4):
        for column in range(6):
            expected = model.query_features @ features[:, row, column]
            torch.testing.assert_close(got[:, row, column], expected, rtol=0, atol=1e-6)
    large = F.interpolate(got[None], size=(32, 48), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(predict(model, image), large, rtol=0, atol=1e-6)


def test_other_classes_share_the_clip():
    """Logits of other names are their similarities; the first model keeps its own."""
    model, image = make_maskclip(), normalise(random_image(4, 24, 32))[None]
    names = [["lake", "pond"], ["wood"]]
    before = model.mask_logits(image)
    other = model.with_classes(names)
    assert other.backbone is model.backbone and (other.num_classes, model.num_classes) == (2, 4)
    features = F.normalize(model.backbone(image)["dense"], dim=1)
    expected = torch.einsum("bdhw,cd->bchw", features, model.backbone.query_features(names, get_templates("photo")))
    torch.testing.assert_close(other.mask_logits(image), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.mask_logits(image), before, rtol=0, atol=0)
    with pytest.raises(ReclipError, match="share the name 'lake'"):
        model.with_classes([["lake"], ["pond", "lake"]])


@pytest.mark.parametrize("size", [(32, 32), (31, 50), (8, 8), (5, 3), (1, 40)])
def test_any_image_size(size):
    logits = predict(make_maskclip(), random_image(2, *size))
    assert logits.shape == (4, *size) and torch.isfinite(logits).all()
    assert predict(make_maskclip(), random_image(2, *size), height=7, width=9).shape == (4, 7, 9)


def test_batch_mates_do_not_matter():
    model = make_maskclip()
    images = [random_image(seed, *size) for seed, size in enumerate([(32, 40), (17, 60), (24, 24)])]
    together = model([{"image": image} for image in images])
    for image, output in zip(images, together, strict=True):
        torch.testing.assert_close(output["sem_seg"], predict(model, image), rtol=0, atol=1e-6)


def test_padding_is_black_after_normalisation_and_cropped_before_the_resize():
    model = make_maskclip()
    image = random_image(3, 20, 27)
    padded = F.pad(normalise(image), (0, 5, 0, 4))[None]
    logits = model.mask_logits(padded)
    large = F.interpolate(logits, size=(24, 32), mode="bilinear", align_corners=False)[..., :20, :27]
    expected = F.interpolate(large, size=(40, 54), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(predict(model, image, height=40, width=54), expected, rtol=0, atol=1e-5)


def test_refuses_to_train():
    with pytest.raises(ReclipError, match="nothing to train"):
        make_maskclip().train()([{"image": random_image(0)}])


def test_nothing_is_trained_or_saved():
    model = make_maskclip()
    assert model.state_dict() == {}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not predict(make_maskclip(), random_image(0)).requires_grad


def test_identity_names_clip_classes_and_templates():
    model = make_maskclip()
    identity = model.identity()
    assert identity["clip"] == "tiny" and identity["templates"] == "photo"
    assert identity["fingerprint"] == model.backbone.fingerprint
    assert identity["class_names"][1] == ["tall tree", "oak"]


# ---- options --------------------------------------------------------------------------------------------------


def test_prompt_denoising_against_a_loop():
    logits = torch.rand(2, 5, 3, 4, dtype=torch.float64) * 0.4
    scale, threshold = 14.0, 0.6
    got = denoise_prompts(logits, scale, threshold)
    dropped = 0
    for b in range(2):
        best = []
        for k in range(5):
            probabilities = [
                (torch.exp(scale * logits[b, k, i, j]) / torch.exp(scale * logits[b, :, i, j]).sum()).item()
                for i in range(3)
                for j in range(4)
            ]
            best.append(max(probabilities))
        for k in range(5):
            if best[k] < threshold and best[k] < max(best):
                dropped += 1
                assert (got[b, k] <= -1).all()
            else:
                assert torch.equal(got[b, k], logits[b, k])
    assert 0 < dropped < 10


def test_prompt_denoising_keeps_the_best_class():
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 1, 0, 0] = 0.01
    assert (denoise_prompts(logits, 10.0, 0.99).argmax(1)[0, 0, 0] == 1).all()
    assert torch.equal(denoise_prompts(logits, 10.0, 0.99)[0, 1], logits[0, 1])


def test_key_smoothing_against_a_loop():
    logits = torch.rand(2, 3, 2, 3, dtype=torch.float64) * 0.3
    keys = torch.randn(2, 6, 5, dtype=torch.float64)
    scale, threshold = 14.0, 0.7
    got = smooth_by_keys(logits, keys, scale, threshold)
    unsure = 0
    for b in range(2):
        probabilities = torch.softmax(scale * logits[b].flatten(1), dim=0)
        for i in range(6):
            own = probabilities[:, i]
            if own.max() < threshold:
                unsure += 1
                own = sum(
                    torch.cosine_similarity(keys[b, i], keys[b, j], dim=0) * probabilities[:, j] for j in range(6)
                )
            torch.testing.assert_close(got[b, :, i // 3, i % 3], own, rtol=0, atol=1e-12)
    assert 0 < unsure < 12


def test_mean_filter_is_cut_at_the_border():
    logits = torch.arange(12, dtype=torch.float64).reshape(1, 1, 3, 4)
    got = mean_filter(logits, 3)[0, 0]
    assert got[0, 0].item() == pytest.approx((0 + 1 + 4 + 5) / 4)
    assert got[1, 1].item() == pytest.approx(5.0)
    assert got[2, 1].item() == pytest.approx((4 + 5 + 6 + 8 + 9 + 10) / 6)
    assert got[0, 3].item() == pytest.approx((2 + 3 + 6 + 7) / 4)
    assert torch.equal(mean_filter(logits, 1), logits)


def test_options_in_the_model():
    image = normalise(random_image(6))[None]
    plain = make_maskclip().mask_logits(image)
    scale = make_maskclip().backbone.logit_scale
    torch.testing.assert_close(make_maskclip(mean_filter=3).mask_logits(image), mean_filter(plain, 3))
    torch.testing.assert_close(
        make_maskclip(prompt_denoising=0.3).mask_logits(image), denoise_prompts(plain, scale, 0.3)
    )
    _, keys = make_maskclip().backbone.dense_and_keys(image)
    torch.testing.assert_close(
        make_maskclip(key_smoothing=0.9).mask_logits(image), smooth_by_keys(plain, keys, scale, 0.9)
    )


# ---- calibration ----------------------------------------------------------------------------------------------


def test_calibration_without_an_offset_says_how_to_get_one():
    with pytest.raises(ReclipError, match=r"MODEL\.MASKCLIP\.CALIBRATION 'class' needs unlabelled images"):
        predict(make_maskclip(calibration="class"), random_image(0))


def test_offset_by_class_and_by_position():
    image = normalise(random_image(7))[None]
    plain = make_maskclip().mask_logits(image)
    model = make_maskclip(calibration="class")
    model.calibration_offset = torch.tensor([0.1, -0.2, 0.3, -0.2])[:, None, None]
    torch.testing.assert_close(model.mask_logits(image), plain + model.calibration_offset)
    model = make_maskclip(calibration="position_class")
    model.calibration_offset = torch.randn(4, 4, 4)
    torch.testing.assert_close(model.mask_logits(image), plain + model.calibration_offset)
    wide = normalise(random_image(7, 32, 64))[None]
    resized = F.interpolate(model.calibration_offset[None], size=(4, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.mask_logits(wide), make_maskclip().mask_logits(wide) + resized)


def test_a_calibrated_model_in_a_checkpoint(tmp_path):
    """The offset, found on images, is saved and loaded; other models have none."""
    model = make_maskclip(calibration="estimated")
    model.calibration_offset = torch.tensor([0.3, -0.1, -0.2, 0.0])[: model.num_classes, None, None]
    ReclipCheckpointer(model, str(tmp_path)).save("model_final")
    other = make_maskclip(calibration="estimated")
    ReclipCheckpointer(other).load(str(tmp_path / "model_final.pth"))
    assert torch.equal(other.calibration_offset, model.calibration_offset)
    image = random_image(40, 60)
    assert torch.equal(predict(other, image), predict(model, image))
    with pytest.raises(ReclipError, match="calibration_offset is unknown"):
        ReclipCheckpointer(make_maskclip()).load(str(tmp_path / "model_final.pth"))


@pytest.mark.parametrize("sizes", [[(32, 40), (32, 40)], [(30, 33), (30, 33)], [(32, 40), (24, 40)]])
def test_images_of_a_batch_in_one_copy(sizes, monkeypatch):
    """As on a GPU: the same batch, to the bit."""
    model, records = make_maskclip(), [{"image": random_image(k, *size)} for k, size in enumerate(sizes)]
    expected, copies = model.preprocess_image(records), []
    monkeypatch.setattr(base, "_is_gpu", lambda _: True)
    monkeypatch.setattr(base, "stack_on", lambda *given: copies.append(1) or stack_on(*given))
    found = model.preprocess_image(records)
    assert torch.equal(found.tensor, expected.tensor) and len(copies) == (sizes[0] == sizes[1])
    assert [tuple(size) for size in found.image_sizes] == [tuple(size) for size in expected.image_sizes] == sizes
