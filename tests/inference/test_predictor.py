"""Labels of whole images: the same as the model's own, and in bounded memory."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T

from reclip_d2.config import load_config
from reclip_d2.data.tiling import Tiling
from reclip_d2.errors import ReclipError
from reclip_d2.inference import ImagePredictor
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from tests.helpers import make_maskclip, make_rectified, random_image

NO_TILES = Tiling(10_000, 1024, 0.25)


def pixels(seed: int, height: int, width: int) -> np.ndarray:
    return random_image(seed, height, width).permute(1, 2, 0).contiguous().numpy()


def own_logits(model: LanguageSegmentor, image: np.ndarray, resize: T.Augmentation | None = None) -> torch.Tensor:
    """Logits ``(C, H, W)`` of the model's own inference."""
    inputs = T.AugInput(image)
    if resize:
        T.AugmentationList([resize])(inputs)
    record = {"image": torch.from_numpy(inputs.image.copy()).permute(2, 0, 1)}
    return model([{**record, "height": image.shape[0], "width": image.shape[1]}])[0]["sem_seg"]


@pytest.mark.parametrize("size", [(32, 40), (37, 50), (70, 33)])
@pytest.mark.parametrize("short_side", [0, 32])
@pytest.mark.parametrize("make", [make_maskclip, make_rectified])
def test_an_image_looked_at_as_a_whole_is_the_models_own(make, short_side, size):
    model = make(label_maps=False).eval()
    resize = T.ResizeShortestEdge([short_side, short_side], 64) if short_side else None
    image = pixels(1, *size)
    predictor = ImagePredictor(model, [resize] if resize else [], NO_TILES, 4000)
    expected = own_logits(model, image, resize)
    logits = torch.cat([band for _, band in predictor.bands(image)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    best = expected.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-4).numpy()  # ties may fall either way
    labels = predictor.labels(image)
    assert labels.dtype == np.uint8 and labels.shape == size
    assert clear.mean() > 0.9
    assert (labels == expected.argmax(0).numpy())[clear].all()


def test_a_tile_is_looked_at_as_an_image_is():
    """Four tiles without overlap, each resized to 32 px: the predictions of the four pieces."""
    model = make_maskclip(label_maps=False)
    resize = T.ResizeShortestEdge([32, 32], 64)
    image = pixels(2, 96, 96)
    predictor = ImagePredictor(model, [resize], Tiling(90, 48, 0.0), 10**6)
    logits = torch.cat([band for _, band in predictor.bands(image)], dim=1)
    for top in (0, 48):
        for left in (0, 48):
            expected = own_logits(model, image[top : top + 48, left : left + 48].copy(), resize)
            torch.testing.assert_close(
                logits[:, top : top + 48, left : left + 48], expected, rtol=0, atol=2e-5
            )  # fmt: skip


def test_an_image_of_the_size_of_a_tile_needs_one():
    model = make_maskclip(label_maps=False)
    image = pixels(3, 48, 48)
    whole = ImagePredictor(model, [], NO_TILES, 10**6).labels(image)
    assert (ImagePredictor(model, [], Tiling(1, 48, 0.25), 10**6).labels(image) == whole).all()
    assert (ImagePredictor(model, [], Tiling(1, 500, 0.25), 10**6).labels(image) == whole).all()


def test_labels_do_not_depend_on_the_memory():
    model = make_rectified().eval()
    image = pixels(4, 90, 130)
    results = [ImagePredictor(model, [], Tiling(64, 40, 0.3), memory).labels(image) for memory in (1, 30_000, 10**8)]
    assert (results[0] == results[1]).all() and (results[1] == results[2]).all()


def test_when_tiles_apply():
    tiling = Tiling(100, 40, 0.25)
    assert tiling.stride == 30
    assert not tiling.applies_to((100, 100)) and tiling.applies_to((5, 101)) and tiling.applies_to((101, 5))
    assert Tiling(100, 40, 0.99).stride == 1


def test_keys():
    cfg = load_config("", ["INPUT.TILES.FROM_SIDE", "64", "INPUT.TILES.SIZE", "40", "TEST.BAND_MEMORY", "3"])
    predictor = ImagePredictor.from_config(make_maskclip(), cfg)
    assert predictor.tiling == Tiling(64, 40, 0.25) and predictor.memory == 3 * 2**20
    for key, value in (
        ("INPUT.TILES.OVERLAP", "1.0"),
        ("INPUT.TILES.SIZE", "0"),
        ("TEST.BAND_MEMORY", "0"),
        ("INPUT.COPIES.SHORT_SIDE", "0"),
    ):
        with pytest.raises(ReclipError, match=key.rsplit(".", 1)[0]):
            load_config("", [key, value])


def test_the_evaluations_sliding_window_is_another_thing():
    with pytest.raises(ReclipError, match=r"INPUT\.TILES"):
        ImagePredictor(make_maskclip(sliding_window=((32, 32), (16, 16))), [], NO_TILES, 1)


LARGE = """
import resource, sys
import numpy as np, torch
from reclip_d2.data.tiling import Tiling
from reclip_d2.inference import ImagePredictor
from tests.helpers import make_maskclip

model = make_maskclip(class_names=[[f"class {i}"] for i in range(60)])
predictor = ImagePredictor(model, [], Tiling(256, 64, 0.25), 8 * 2**20)
predictor.labels(np.zeros((300, 300, 3), np.uint8))  # what PyTorch takes once
side = int(sys.argv[1])
image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
labels = predictor.labels(image)
assert len(np.unique(labels)) > 3
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_of_a_large_image():
    """800 x 800 pixels and 60 classes: the logits at the image's size would be 146 MiB. Bands of 8 MiB, the tiles'
    logits on their grids and the labels stay far below."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    result = subprocess.run(
        [sys.executable, "-c", LARGE, "800"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 60


@pytest.mark.cuda
@pytest.mark.parametrize("tiling", [NO_TILES, Tiling(64, 40, 0.3)])
def test_labels_on_a_gpu_are_those_on_the_cpu(tiling):
    image = pixels(5, 90, 130)
    model = make_rectified().eval()
    on_cpu = torch.cat([band for _, band in ImagePredictor(model, [], tiling, 30_000).bands(image)], dim=1)
    on_gpu = torch.cat([band for _, band in ImagePredictor(model.cuda(), [], tiling, 30_000).bands(image)], dim=1)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
