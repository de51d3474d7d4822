"""The distilled student as a separate model.

Shape letters: B images, C classes, D width of the joint embedding, (h, w) grid of the student's features.
"""

import pytest
import torch
import torch.nn.functional as F

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.meta_arch.distillation import inherit
from reclip_d2.modeling.meta_arch.student import Student, bias_grid, empty_head
from reclip_d2.modeling.student.inherited import HEADS
from tests.helpers import (
    CLASS_NAMES,
    EMBED_DIM,
    IMAGENET_MEAN,
    IMAGENET_STD,
    make_maskclip,
    make_reclip,
    make_rectified,
    make_student,
    random_image,
    register_tiny_model,
)

TEACHERS = {"ReCLIP++": make_rectified, "ReCLIP": make_reclip, "MaskCLIP": make_maskclip}


@pytest.fixture
def config(tmp_path, datasets):
    """``config(*keys)``: config of a student of the tiny CLIP."""
    names = [name for name, *_ in CLASS_NAMES]
    dataset = datasets("reclip_test_student", [], names, stuff_class_synonyms=CLASS_NAMES)
    base = {
        "MODEL.BACKBONE.NAME": "DenseCLIP",
        "MODEL.CLIP.NAME": register_tiny_model(tmp_path),
        "MODEL.CLIP.PRETRAINED": "random",
        "MODEL.RESNETS.DEPTH": "18",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": "8",
        "MODEL.RESNETS.RES2_OUT_CHANNELS": "8",
        "DATASETS.TRAIN": f"('{dataset}',)",
        "DATASETS.TEST": "()",
        "INPUT.CROP.ENABLED": "True",
        "INPUT.CROP.SIZE": "[32, 40]",
    }
    return lambda *keys: load_config("", [part for item in base.items() for part in item] + list(keys))


# ---- inputs and features ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_normalisation_in_the_order_of_the_backbone(image_format):
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if image_format == "RGB" else ([10.0, 20.0, 30.0], [1.0, 2.0, 4.0])
    student = make_student(make_maskclip(), image_format=image_format, pixel_mean=mean, pixel_std=std)
    image = random_image(0)
    order = [0, 1, 2] if image_format == "RGB" else [2, 1, 0]
    expected = torch.stack([(image[c].float() - m) / s for c, m, s in zip(order, mean, std, strict=True)])
    torch.testing.assert_close(student.normalize(image), expected)
    assert image.dtype == torch.uint8


@torch.no_grad()
def test_features_are_of_length_1_and_read_by_the_head():
    student = make_student(make_rectified()).eval()
    images = torch.randn(2, 3, 32, 40)
    features, logits = student.segment(images)
    assert features.shape == (2, EMBED_DIM, 4, 5) and logits.shape == (2, 4, 4, 5)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2, 4, 5))
    raw = student.feature_head(student.backbone(images)["res5"])
    torch.testing.assert_close(features, F.normalize(raw, dim=1))
    torch.testing.assert_close(logits, student.inherited(features))
    torch.testing.assert_close(student.pixel_embedding(images), torch.cat([features, logits], dim=1))
    torch.testing.assert_close(student.mask_logits(images), logits)


@torch.no_grad()
def test_a_classifier_of_the_students_own_reads_features_of_any_length():
    student = make_student(make_rectified(), head="original").eval()
    images = torch.randn(1, 3, 32, 40)
    raw = student.feature_head(student.backbone(images)["res5"])
    features, logits = student.segment(images)
    torch.testing.assert_close(logits, student.inherited.classifier(raw))
    torch.testing.assert_close(features, F.normalize(raw, dim=1))


@torch.no_grad()
def test_the_head_works_in_full_precision_under_autocast():
    student = make_student(make_rectified()).eval()
    images = torch.randn(1, 3, 32, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = student.segment(images)
    assert features.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, student.inherited(features))


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("size", [(32, 40), (33, 25), (7, 50)])
def test_predictions_of_any_size(stride, size):
    student = make_student(make_rectified(), stride=stride).eval()
    record = {"image": random_image(1, *size), "height": 21, "width": 30}
    logits = student([record])[0]["sem_seg"]
    assert logits.shape == (4, 21, 30)
    padded = [-(-side // stride) * stride for side in size]
    images = F.pad(student.normalize(record["image"]), [0, padded[1] - size[1], 0, padded[0] - size[0]])
    with torch.no_grad():
        expected = student.mask_logits(images[None])
    if padded != list(size):  # the padding is cropped off at the size of the image
        expected = F.interpolate(expected, padded, mode="bilinear")[..., : size[0], : size[1]]
    torch.testing.assert_close(logits, F.interpolate(expected, (21, 30), mode="bilinear")[0], rtol=1e-4, atol=1e-5)


def test_it_does_not_train_alone():
    with pytest.raises(ReclipError, match=r"MODEL\.META_ARCHITECTURE Distillation"):
        make_student(make_maskclip())([{"image": random_image(0)}])


# ---- its place in checkpoints -----------------------------------------------------------------------------------


def test_identity():
    identity = make_student(make_rectified()).identity()
    assert identity == {
        "clip": "tiny",
        "class_names": CLASS_NAMES,
        "templates": "photo",
        "student_head": "query_bias_decoder",
        "bias_grid": [4, 5],
    }
    assert make_student(make_maskclip(), head="query").identity()["bias_grid"] is None
    # The weights do not show the sign of the bias.
    added = make_student(make_rectified(rectification="add")).identity()
    assert added == {**identity, "rectification": "add"}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_head_from_the_config_has_room_for_what_the_teacher_gives(config, teacher, head):
    keys = ["MODEL.STUDENT.HEAD", head, "MODEL.TEACHER.META_ARCHITECTURE"]
    keys += ["MaskCLIP" if teacher == "MaskCLIP" else "RectifiedCLIP"]
    if teacher == "ReCLIP":
        keys += ["MODEL.BIAS_HEAD.NAME", "ReCLIPBiasHead", "MODEL.MASK_DECODER.ENABLED", "False"]
    cfg = config(*keys)
    student = Student(cfg)
    given = inherit(TEACHERS[teacher]().eval(), head, bias_grid(cfg))
    own = {k: v.shape for k, v in student.inherited.state_dict().items() if not k.startswith("classifier.")}
    assert own == {key: value.shape for key, value in given.items()}
    assert (student.head, student.output_stride, student.class_names) == (head, 8, CLASS_NAMES)
    assert student.identity()["clip"] == cfg.MODEL.CLIP.NAME


@pytest.mark.parametrize("mode", ["subtract", "add", "none"])
def test_rectification_of_the_config(config, mode):
    head = empty_head(config("MODEL.BIAS_HEAD.RECTIFICATION", mode), 4)
    assert head.rectification == mode and (head.bias_map is None) == (mode == "none")


@pytest.mark.parametrize(
    ("keys", "grid"),
    [
        ([], (4, 5)),
        (["INPUT.CROP.SIZE", "[30, 33]"], (4, 5)),
        (["INPUT.CROP.ENABLED", "False", "INPUT.MIN_SIZE_TRAIN", "(48, 64)"], (6, 6)),
        (["INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", "[0.5, 0.75]", "INPUT.MIN_SIZE_TRAIN", "(64,)"], (4, 6)),
        (["INPUT.MIN_SIZE_TRAIN", "(0,)"], (4, 5)),
    ],
)
def test_grid_of_the_bias_map(config, keys, grid):
    assert bias_grid(config(*keys)) == grid  # patches of 8 px


def test_images_as_they_are_have_no_grid(config):
    with pytest.raises(ReclipError, match=r"INPUT\.MIN_SIZE_TRAIN 0"):
        bias_grid(config("INPUT.CROP.ENABLED", "False", "INPUT.MIN_SIZE_TRAIN", "(0,)"))


def test_a_clip_that_nobody_knows(config):
    with pytest.raises(ReclipError, match=r"MODEL\.CLIP\.NAME 'nothing'"):
        Student(config("MODEL.CLIP.NAME", "nothing"))


def test_channels_last_gives_the_same_features_and_gradients():
    student = make_student(make_rectified())
    student, images = student.double().train(), torch.randn(2, 3, 40, 48, dtype=torch.float64)
    formats, found = [], []
    student.backbone.register_forward_hook(
        lambda _, __, out: formats.append(out["res5"].is_contiguous(memory_format=torch.channels_last))
    )
    for student.channels_last in ("never", "auto", "always"):
        student.zero_grad()
        features = student._raw_features(images)
        features.square().sum().backward()
        found.append([features, *(p.grad.clone() for p in student.parameters() if p.grad is not None)])
    assert formats == [False, False, True]
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
