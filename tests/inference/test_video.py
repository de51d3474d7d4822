"""Frames of a video: each by itself, or smoothed over its neighbours."""

from fractions import Fraction

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.data.video import Frame
from reclip_d2.errors import ReclipError
from reclip_d2.inference import ImagePredictor
from reclip_d2.inference.video import predict_frames
from tests.helpers import make_maskclip, random_image


def frames(count: int, sizes=((32, 40),)) -> list[Frame]:
    def pixels(k: int):
        return random_image(k, *sizes[k % len(sizes)]).permute(1, 2, 0).contiguous().numpy()

    return [Frame(k, Fraction(k, 25), pixels(k)) for k in range(count)]


def predictor(*opts: str) -> ImagePredictor:
    return ImagePredictor.from_config(make_maskclip().eval(), load_config("", ["INPUT.MIN_SIZE_TEST", "0", *opts]))


def logits(predicted) -> list[torch.Tensor | None]:
    return [None if bands is None else torch.cat([band.logits for band in bands], 1) for _, bands in predicted]


def single(predictor: ImagePredictor, frame: Frame) -> torch.Tensor:
    return torch.cat([band.logits for band in predictor.bands(frame.pixels)], 1)


@pytest.mark.parametrize("window", [0, 1, 2, 9])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_mean_of_the_neighbours_that_exist(window, count):
    model, clip = predictor(), frames(count)
    each = [single(model, frame) for frame in clip]
    found = list(predict_frames(model, clip, window))
    assert [frame.index for frame, _ in found] == list(range(count))
    for k, value in enumerate(logits(found)):
        near = each[max(0, k - window) : k + window + 1]
        torch.testing.assert_close(value, sum(near) / len(near), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [0, 2])
def test_only_what_is_wanted_passes_through_the_network(window, monkeypatch):
    model, clip = predictor(), frames(8)
    expected, passes = logits(predict_frames(model, clip, window)), []
    network = model.network_logits
    monkeypatch.setattr(model, "network_logits", lambda *args: passes.append(1) or network(*args))
    monkeypatch.setattr(model, "image_bands", ImagePredictor.image_bands.__get__(model))
    found = logits(predict_frames(model, clip, window, lambda index: index >= 6))
    assert [value is None for value in found] == [True] * 6 + [False] * 2
    assert torch.equal(found[6], expected[6]) and torch.equal(found[7], expected[7])
    assert len(passes) == (4 if window else 2)


def test_frames_of_another_size_begin_anew():
    model = predictor()
    clip = frames(2) + [Frame(k + 2, frame.seconds, frame.pixels) for k, frame in enumerate(frames(2, ((24, 24),)))]
    found = logits(predict_frames(model, clip, 3))
    assert [tuple(value.shape[1:]) for value in found] == [(32, 40)] * 2 + [(24, 24)] * 2


@pytest.mark.parametrize(
    "opts", [["TEST.SLIDING_WINDOW.ENABLED", "True"], ["TEST.REFINE", "['flip']"], ["INPUT.TILES.FROM_SIDE", "16"]]
)
def test_smoothing_needs_whole_frames(opts):
    with pytest.raises(ReclipError, match=r"TEST\.VIDEO_WINDOW smooths logits of whole frames"):
        list(predict_frames(predictor(*opts), frames(3), 1))
