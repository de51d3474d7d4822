"""Label maps of the as-released configs against a literal transcription of the public test program."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reclip_d2.config import load_config
from reclip_d2.data.images import read_image
from reclip_d2.inference import ImagePredictor
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from tests.helpers import datasets, isolated_cache, write_scenes
from tests.tools.public_code import (
    CLIP_OPTIONS,
    MEAN,
    ROOT,
    STD,
    PublicReCLIP,
    PublicReCLIPPP,
    name_file,
    public_model,
    quick_model,
    save_public,
    tool,
)

__all__ = ["datasets", "isolated_cache", "quick_model", "tool"]
NAMES = ["sky", "brick wall", "chest of drawers", "a very tall old tree"]
SCALES = {PublicReCLIPPP: 10, PublicReCLIP: 100}
METHODS = {PublicReCLIPPP: "reclippp-as-released", PublicReCLIP: "reclip-as-released"}


@torch.no_grad()
def public_test(
    model, query, image: np.ndarray, scale: tuple[int, int], threshold: float, guard: bool = True, factor: float = 0
) -> torch.Tensor:
    """What the public test program does with an RGB image, up to the scores ``(C, H, W)`` whose argmax it takes.

    Args:
        scale: its (long, short) sides.
        guard: keep the best class, as we do; that program may drop all.
        factor: of the logits before the soft-max; 0 for that program's.
    """
    height, width = image.shape[:2]
    shrink = min(max(scale) / max(height, width), min(scale) / min(height, width))
    size = int(width * shrink + 0.5), int(height * shrink + 0.5)
    small = cv2.resize(image[:, :, ::-1], size, interpolation=cv2.INTER_LINEAR)[:, :, ::-1].astype(np.float32)
    pixels = ((torch.from_numpy(small.copy()) - MEAN) / STD).permute(2, 0, 1)[None]
    output = model(pixels, query, NAMES).clone()
    confidence = (output * (factor or SCALES[type(model)])).softmax(1).flatten(2).max(-1)[0]
    dropped = confidence < threshold
    if guard:
        dropped &= confidence < confidence.max()
    output[dropped[:, :, None, None].expand_as(output)] = -100
    output = F.interpolate(output, pixels.shape[2:], None, "bilinear", False)
    return F.interpolate(output, (height, width), None, "bilinear", False)[0]


def our_predictor(tool, tmp_path, datasets, public, *opts):
    """The converted model and its predictor with the as-released config, for images of about 40 pixels."""
    source, token = save_public(tmp_path, public)
    output = tmp_path / "ours.pth"
    arguments = [str(source), str(output), "--class-names", name_file(tmp_path, NAMES), "--class-token", str(token)]
    tool.main([*arguments, *CLIP_OPTIONS])
    datasets("reclip_test_released", [], NAMES)
    method = ROOT / "configs" / "methods" / f"{METHODS[type(public)]}.yaml"
    keys = ["DATASETS.TEST", "('reclip_test_released',)", "DATASETS.TRAIN", "()", "MODEL.DEVICE", "cpu"]
    keys += ["INPUT.MIN_SIZE_TEST", "45", "INPUT.MAX_SIZE_TEST", "160", "OUTPUT_DIR", str(tmp_path / "out")]
    cfg = load_config(
        [str(ROOT / "configs/datasets/voc20.yaml"), str(method), str(output.with_suffix(".yaml"))], [*keys, *opts]
    )
    from detectron2.modeling import build_model

    model = build_model(cfg).eval()
    ReclipCheckpointer(model).load(str(output))
    return model, ImagePredictor.from_config(model, cfg)


@pytest.mark.parametrize("kind", [PublicReCLIPPP, PublicReCLIP])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9])
def test_label_maps_are_equal_up_to_ties(tool, tmp_path, datasets, kind, threshold):
    public = public_model(kind=kind)
    model, predictor = our_predictor(tool, tmp_path, datasets, public, "TEST.DENOISE.THRESHOLD", str(threshold))
    for record in write_scenes(tmp_path / "scenes", 3, size=(38, 54)):
        image = read_image(record["file_name"])
        scores = public_test(public, model.query_features, image, (160, 45), threshold)
        labels = torch.from_numpy(predictor.labels(image).astype(np.int64))
        first, second = scores.topk(2, dim=0).values
        clear = first - second > 1e-4 * first.abs().clamp(min=1)
        assert torch.equal(labels[clear], scores.argmax(0)[clear]) and clear.float().mean() > 0.95
        logits = torch.cat([band.logits for band in predictor.bands(image)], dim=1)
        kept = (scores > -50).all((1, 2))
        torch.testing.assert_close(logits[kept], (SCALES[kind] * scores)[kept], rtol=1e-3, atol=2e-3)


def test_the_public_program_may_drop_all_classes(tool, tmp_path, datasets):
    """Then it labels every pixel with the first class; we keep the best one."""
    public = public_model()
    model, predictor = our_predictor(
        tool, tmp_path, datasets, public, "TEST.DENOISE.THRESHOLD", "0.9", "TEST.SOFTMAX_SCALE", "1e-6"
    )
    image = read_image(write_scenes(tmp_path / "scenes", 1, size=(38, 54))[0]["file_name"])
    arguments = (public, model.query_features, image, (160, 45), 0.9)
    dropped = public_test(*arguments, guard=False, factor=1e-6)
    torch.testing.assert_close(dropped, torch.full_like(dropped, -100))
    guarded = public_test(*arguments, factor=1e-6)
    assert len(guarded.argmax(0).unique()) == 1
    assert np.array_equal(predictor.labels(image), guarded.argmax(0).numpy())


@pytest.mark.parametrize(
    ("dataset", "method", "threshold", "sides"),
    [
        ("voc20", "reclippp", 0.99992, (512, 2048)),
        ("context59", "reclippp", 0.75, (520, 520)),
        ("context59", "reclip", 0.6, (520, 520)),
        ("cityscapes19", "reclippp", 0.74, (512, 2048)),
        ("coco_stuff27", "reclippp", 0.9, (512, 2048)),
        ("ade150", "reclippp", 0, (512, 2048)),
        ("ade150", "reclip", 0.5, (512, 2048)),
    ],
)
def test_thresholds_and_sizes_of_the_public_configs(dataset, method, threshold, sides):
    files = [ROOT / f"configs/datasets/{dataset}.yaml", ROOT / f"configs/methods/{method}-as-released.yaml"]
    cfg = load_config([str(file) for file in files])
    assert threshold == cfg.TEST.DENOISE.THRESHOLD and sides == (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    assert (cfg.INPUT.RESIZE_TEST, cfg.TEST.PADDING, list(cfg.TEST.REFINE)) == ("opencv", "stretch", ["denoise"])


def test_the_papers_configs_refine_nothing():
    for method in ("reclip_rectify", "reclippp_rectify", "reclippp_distill", "maskclip", "reclippp_ext"):
        cfg = load_config([str(ROOT / "configs/datasets/voc20.yaml"), str(ROOT / f"configs/methods/{method}.yaml")])
        assert not cfg.TEST.REFINE and cfg.TEST.PADDING == "crop" and cfg.INPUT.RESIZE_TEST == "pillow"
