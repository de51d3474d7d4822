"""Logits and labels of images: whole, in sliding windows and in tiles, against literal loops, in bounded memory.

Shape letters: C classes, (H', W') size of the resized image, (H, W) size of the image in pixels.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import transforms as T
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.data.tiling import SlidingWindow, Tiling
from reclip_d2.errors import ReclipError
from reclip_d2.inference import ImagePredictor
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from tests.helpers import make_maskclip, make_reclip, make_rectified, make_student, random_image

NO_TILES = Tiling(10_000, 1024, 0.25)


def pixels(seed: int, height: int, width: int) -> np.ndarray:
    return random_image(seed, height, width).permute(1, 2, 0).contiguous().numpy()


def logits_of(predictor: ImagePredictor, image: np.ndarray) -> torch.Tensor:
    return torch.cat([band.logits for band in predictor.bands(image)], dim=1)


def resized(image: np.ndarray, short_side: int) -> np.ndarray:
    """The test augmentation, by hand: the short side to ``short_side`` (0: as it is), the long one to 64 at most."""
    if not short_side:
        return image
    height, width = image.shape[:2]
    scale = min(short_side / min(height, width), 64 / max(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


@torch.no_grad()
def network(model: LanguageSegmentor, pixels: torch.Tensor) -> torch.Tensor:
    """Logits ``(C, H', W')`` of a normalised image or window at its own size: pad, forward pass, resize, crop."""
    height, width = pixels.shape[1:]
    step = model.size_divisibility
    padded = F.pad(pixels, (0, -width % step, 0, -height % step))
    logits = model.mask_logits(padded[None])
    return F.interpolate(logits, padded.shape[1:], mode="bilinear", align_corners=False)[0, :, :height, :width]


@torch.no_grad()
def literal_logits(
    model: LanguageSegmentor, image: np.ndarray, short_side: int, window: SlidingWindow | None = None
) -> torch.Tensor:
    """Logits ``(C, H, W)`` as evaluation has always made them, the (C, H, W) tensors and all."""
    pixels = model.normalize(torch.from_numpy(resized(image, short_side).copy()).permute(2, 0, 1))
    height, width = pixels.shape[1:]
    if window is None:
        step = model.size_divisibility
        if not (height % step or width % step):
            logits = model.mask_logits(pixels[None])
        else:
            logits = network(model, pixels)[None]
    else:
        total, count = torch.zeros(model.num_classes, height, width), torch.zeros(height, width)
        for top in starts(height, window.size[0], window.stride[0]):
            for left in starts(width, window.size[1], window.stride[1]):
                area = (slice(top, top + window.size[0]), slice(left, left + window.size[1]))
                total[:, area[0], area[1]] += network(model, pixels[:, area[0], area[1]])
                count[area] += 1
        logits = (total / count)[None]
    return F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)[0]


def starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of windows: every ``stride``, the last one at the end."""
    result = [0]
    while result[-1] + window < length:
        result.append(min(result[-1] + stride, length - window))
    return result


def literal_tiles(
    model: LanguageSegmentor, image: np.ndarray, side: int, stride: int, short_side: int, window: SlidingWindow | None
) -> torch.Tensor:
    """Logits ``(C, H, W)`` of tiles, each pixel weighted by its distance to the ends of the overlaps."""
    height, width = image.shape[:2]
    total, weights = torch.zeros(model.num_classes, height, width), torch.zeros(height, width)

    def ramp(first: list[int], index: int) -> torch.Tensor:
        weight = torch.ones(side)
        for offset in range(side):
            before = first[index - 1] + side - first[index] if index else 0
            after = first[index] + side - first[index + 1] if index + 1 < len(first) else 0
            if offset < before:
                weight[offset] = min(weight[offset], (offset + 0.5) / before)
            if offset >= side - after:
                weight[offset] = min(weight[offset], (side - offset - 0.5) / after)
        return weight

    tops, lefts = starts(height, side, stride), starts(width, side, stride)
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            tile = image[top : top + side, left : left + side].copy()
            share = ramp(tops, i)[:, None] * ramp(lefts, j)
            total[:, top : top + side, left : left + side] += literal_logits(model, tile, short_side, window) * share
            weights[top : top + side, left : left + side] += share
    return total / weights


def assert_labels_are(labels: np.ndarray, logits: torch.Tensor) -> None:
    """Labels are the argmax, where the best class leads by more than rounding; that is nearly everywhere."""
    best = logits.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-5).numpy()
    assert clear.mean() > 0.99
    assert (labels == logits.argmax(0).numpy())[clear].all()


WINDOW = SlidingWindow((16, 24), (8, 12))
MODELS = {
    "MaskCLIP": make_maskclip,
    "ReCLIP++": make_rectified,
    "ReCLIP": make_reclip,
    "student": lambda: make_student(make_rectified()),
}


@pytest.mark.parametrize("size", [(32, 40), (37, 50), (70, 33), (9, 14)])
@pytest.mark.parametrize("short_side", [0, 32])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["whole", "sliding"])
@pytest.mark.parametrize("name", MODELS)
def test_an_image_by_a_literal_loop(name, window, short_side, size):
    """Padding, a resize, both and neither; with memory for the whole image and for a few rows."""
    model = MODELS[name]().eval()
    resize = [T.ResizeShortestEdge([short_side, short_side], 64)] if short_side else []
    image = pixels(1, *size)
    expected = literal_logits(model, image, short_side, window)
    for memory in (4000, 10**8):
        predictor = ImagePredictor(model, resize, NO_TILES, memory, window)
        torch.testing.assert_close(logits_of(predictor, image), expected, rtol=0, atol=2e-5)
        labels = predictor.labels(image)
        assert labels.dtype == np.uint8 and labels.shape == size
        assert_labels_are(labels, expected)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["whole", "sliding"])
@pytest.mark.parametrize("short_side", [0, 32])
@pytest.mark.parametrize(("size", "overlap"), [((96, 96), 0.0), ((91, 60), 0.25), ((60, 130), 0.5)])
def test_tiles_by_a_literal_loop(size, overlap, short_side, window):
    """Each tile is predicted as an image is, in sliding windows, too."""
    model = make_rectified().eval()
    resize = [T.ResizeShortestEdge([short_side, short_side], 64)] if short_side else []
    image = pixels(2, *size)
    predictor = ImagePredictor(model, resize, Tiling(90, 48, overlap), 20_000, window)
    expected = literal_tiles(model, image, 48, round(48 * (1 - overlap)), short_side, window)
    torch.testing.assert_close(logits_of(predictor, image), expected, rtol=0, atol=2e-5)
    assert_labels_are(predictor.labels(image), expected)


def test_labels_are_one_resize_without_logits_at_the_image_s_size():
    """The fused operator: bands know their labels before anything asks for logits."""
    predictor = ImagePredictor(make_maskclip(), [], NO_TILES, 1)  # a row at a time
    bands = list(predictor.bands(pixels(1, 32, 40)))
    assert len(bands) == 32 and all(band.known_labels is not None for band in bands)
    assert torch.equal(torch.cat([band.labels for band in bands]), torch.cat([b.logits for b in bands], 1).argmax(0))


def test_some_of_the_classes():
    """Every pixel gets the best remaining class; the predictor itself keeps all classes."""
    predictor = ImagePredictor(make_maskclip(), [], Tiling(60, 32, 0.25), 10**5)
    for size in ((40, 50), (70, 40)):
        image = pixels(6, *size)
        logits = logits_of(predictor, image)
        some = predictor.for_classes([3, 1])
        torch.testing.assert_close(logits_of(some, image), logits[[3, 1]])
        assert set(np.unique(some.labels(image))) == {0, 1}
        assert (some.labels(image) == logits[[3, 1]].argmax(0).numpy()).mean() > 0.999
        assert len(logits_of(predictor, image)) == 4


def test_scores_that_are_not_finite():
    model = make_maskclip()
    model.template_query_features[1] = float("nan")
    with pytest.raises(ReclipError, match="not finite.*checkpoint"):
        ImagePredictor(model, [], NO_TILES, 10**6).labels(pixels(1, 32, 32))


def test_a_turn_is_one_forward_pass():
    turns, passes = [], []
    model = make_maskclip()
    model.mask_logits = lambda *inputs, inner=model.mask_logits: passes.append(turns[-1]) or inner(*inputs)

    @contextlib.contextmanager
    def turn():
        turns.append(len(turns))
        yield
        turns.append(None)

    image = pixels(1, 40, 48)
    for tiling, window, count in ((NO_TILES, None, 1), (NO_TILES, WINDOW, 4 * 3), (Tiling(30, 24, 0.0), None, 4)):
        turns.clear(), passes.clear()
        list(ImagePredictor(model, [], tiling, 10**6, window).bands(image, turn))
        assert len(passes) == count and None not in passes and len(set(passes)) == count


def test_an_image_of_the_size_of_a_tile_needs_one():
    model = make_maskclip()
    image = pixels(3, 48, 48)
    whole = ImagePredictor(model, [], NO_TILES, 10**6).labels(image)
    assert (ImagePredictor(model, [], Tiling(1, 48, 0.25), 10**6).labels(image) == whole).all()
    assert (ImagePredictor(model, [], Tiling(1, 500, 0.25), 10**6).labels(image) == whole).all()


def test_labels_do_not_depend_on_the_memory():
    model = make_rectified().eval()
    image = pixels(4, 90, 130)
    for tiling, window in ((NO_TILES, None), (Tiling(64, 40, 0.3), None), (NO_TILES, WINDOW)):
        first, *others = (
            ImagePredictor(model, [T.Resize((57, 80))], tiling, memory, window).labels(image)
            for memory in (1, 30_000, 10**8)
        )
        assert all((first == other).all() for other in others)


def test_when_tiles_apply():
    tiling = Tiling(100, 40, 0.25)
    assert tiling.stride == 30
    assert not tiling.applies_to((100, 100)) and tiling.applies_to((5, 101)) and tiling.applies_to((101, 5))
    assert Tiling(100, 40, 0.99).stride == 1


def test_keys():
    keys = ["INPUT.TILES.FROM_SIDE", "64", "INPUT.TILES.SIZE", "40", "TEST.BAND_MEMORY", "3"]
    predictor = ImagePredictor.from_config(make_maskclip(), load_config("", keys))
    assert predictor.tiling == Tiling(64, 40, 0.25) and predictor.memory == 3 * 2**20
    assert predictor.sliding_window is None
    keys = ["TEST.SLIDING_WINDOW.ENABLED", "True", "TEST.SLIDING_WINDOW.SIZE", "(32, 48)"]
    predictor = ImagePredictor.from_config(
        make_maskclip(), load_config("", [*keys, "TEST.SLIDING_WINDOW.STRIDE", "(16, 24)"])
    )
    assert predictor.sliding_window == SlidingWindow((32, 48), (16, 24))
    for key, value in (
        ("INPUT.TILES.OVERLAP", "1.0"),
        ("INPUT.TILES.SIZE", "0"),
        ("TEST.BAND_MEMORY", "0"),
        ("INPUT.COPIES.SHORT_SIDE", "0"),
    ):
        with pytest.raises(ReclipError, match=key.rsplit(".", 1)[0]):
            load_config("", [key, value])


LARGE = """
import resource
import numpy as np
from reclip_d2.data.tiling import SlidingWindow, Tiling
from reclip_d2.inference import ImagePredictor
from tests.helpers import make_maskclip

model = make_maskclip(class_names=[[f"class {i}"] for i in range(60)])
ways = [(Tiling(256, 64, 0.25), None), (Tiling(10_000, 64, 0.25), SlidingWindow((64, 64), (48, 48)))]
predictors = [ImagePredictor(model, [], tiling, 8 * 2**20, window) for tiling, window in ways]
image = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
for predictor in predictors:  # what PyTorch takes once
    predictor.labels(image[:300, :300])
for predictor in predictors:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    labels = predictor.labels(image)
    assert len(np.unique(labels)) > 3
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_of_a_large_image():
    """800 x 800 pixels and 60 classes, in tiles and in sliding windows: at the image's size logits would be 146 MiB.
    Bands of 8 MiB, the windows' logits on their grids and the labels stay far below."""
    result = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert result.returncode == 0, result.stderr
    tiles, sliding = map(float, result.stdout.split())
    assert tiles < 60 and sliding < 60


@pytest.mark.cuda
@pytest.mark.parametrize(("tiling", "window"), [(NO_TILES, None), (Tiling(64, 40, 0.3), None), (NO_TILES, WINDOW)])
def test_logits_on_a_gpu_are_those_on_the_cpu(tiling, window):
    image = pixels(5, 90, 130)
    model = make_rectified().eval()
    on_cpu = logits_of(ImagePredictor(model, [], tiling, 30_000, window), image)
    on_gpu = logits_of(ImagePredictor(model.cuda(), [], tiling, 30_000, window), image)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
