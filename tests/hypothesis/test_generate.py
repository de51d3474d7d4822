"""Generation on constructed images, with a stub in place of the CLIP: a crop's feature is its mean colour.

Shape letters: N windows, C classes.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.hypothesis.file import HypothesisHeader, hypotheses_of, read_hypothesis_file
from reclip_d2.hypothesis.generate import HypothesisGenerator, _read_groups, generate_hypotheses, load_or_generate
from reclip_d2.hypothesis.windows import crop_windows, one_pass_size
from tests.helpers import PIXEL_MEAN, PIXEL_STD, tiny_dense

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
HEADER = HypothesisHeader("colours", [["red"], ["green"], ["blue"]], "stub", "0", "photo", "crops", 0.5)


class MeanColour:
    """Global feature of a crop: its mean colour, of length 1. Counts the crops of each call."""

    image_size = (8, 8)
    logit_scale = 10.0

    def __init__(self) -> None:
        self.calls: list[int] = []

    def global_features(self, crops: Tensor) -> Tensor:
        assert crops.shape[1:] == (3, 8, 8)
        self.calls.append(len(crops))
        pixels = crops * torch.tensor(PIXEL_STD).view(3, 1, 1) + torch.tensor(PIXEL_MEAN).view(3, 1, 1)
        return F.normalize(pixels.mean((2, 3)), dim=1)


def generator(batch_size: int = 100) -> HypothesisGenerator:
    return HypothesisGenerator(MeanColour(), torch.eye(3), PIXEL_MEAN, PIXEL_STD, batch_size)


def picture(path, *columns, height: int = 16, width: int = 8) -> dict:
    """An image of vertical bars, as a record."""
    pixels = np.concatenate([np.full((height, width, 3), colour, np.uint8) for colour in columns], axis=1)
    Image.fromarray(pixels).save(path)
    return {"file_name": str(path), "image_id": path.stem}


@pytest.fixture
def records(tmp_path) -> list[dict]:
    return [
        picture(tmp_path / "red.png", RED, RED),
        # Windows of half the width begin at 0, 8 and 16 of 32: red and red-blue tie only where they overlap.
        picture(tmp_path / "bars.png", RED, RED, BLUE, BLUE),
        picture(tmp_path / "green.png", GREEN, GREEN, GREEN, height=30),
    ]


def test_window_classes_and_hypotheses(tmp_path, records):
    path = tmp_path / "h.jsonl"
    generate_hypotheses(generator(), records, HEADER, path)
    lines = read_hypothesis_file(path, HEADER)
    assert [lines[key]["size"] for key in ("red", "bars", "green")] == [[16, 16], [16, 32], [30, 24]]
    assert lines["red"]["top1"] == [0] * 9 and lines["green"]["top1"] == [1] * 9
    # Along a row of windows: all red, half and half, all blue.
    rows = np.array(lines["bars"]["top1"]).reshape(3, 3)
    assert (rows[:, 0] == 0).all() and (rows[:, 2] == 2).all()
    found = hypotheses_of(lines, HEADER, ["red", "bars", "green"], 0.0)
    assert found == {"red": [0], "bars": [0, 2], "green": [1]}


def test_scores_are_cosine_similarities_of_the_crops():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 24, 40), dtype=np.uint8))
    scores = generator().window_scores([image], 0.5)[0]
    assert scores.shape == (9, 3)
    for row, (x0, y0, x1, y1) in zip(scores, crop_windows(24, 40, 0.5).tolist(), strict=True):
        mean = image[:, y0:y1, x0:x1].float().mean((1, 2))
        torch.testing.assert_close(row, mean / mean.norm(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("batch_size", [1, 4, 9, 20, 1000])
def test_batching_changes_nothing(tmp_path, records, batch_size):
    paths = [tmp_path / "usual.jsonl", tmp_path / "other.jsonl"]
    generate_hypotheses(generator(), records, HEADER, paths[0])
    other = generator(batch_size)
    generate_hypotheses(other, records, HEADER, paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sum(other.backbone.calls) == 27 and max(other.backbone.calls) <= batch_size


@pytest.mark.parametrize("batch_size", [1, 20, 1000])
def test_work_that_is_queued_gives_the_same_file(tmp_path, records, batch_size, monkeypatch):
    """As on a GPU: images are read ahead, and scores fetched a group later."""
    paths = [tmp_path / "usual.jsonl", tmp_path / "queued.jsonl"]
    generate_hypotheses(generator(), records, HEADER, paths[0])
    monkeypatch.setattr(HypothesisGenerator, "on_gpu", True)
    monkeypatch.setattr(HypothesisGenerator, "_to_device", lambda self, image: image)
    generate_hypotheses(generator(batch_size), records, HEADER, paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert generator(0).batch_size == 484


def test_a_file_that_cannot_be_read_ahead_is_named(tmp_path, records):
    records[2]["file_name"] = str(tmp_path / "missing.png")
    groups = _read_groups(records, 1, ahead=True)
    assert [len(next(groups)), len(next(groups))] == [1, 1]
    with pytest.raises(ReclipError, match=r"missing\.png"):
        next(groups)


def test_calibrated_classes(tmp_path):
    """All scores prefer red; an offset that makes the mean soft-max uniform brings the second colours out."""
    second = {"g1": (255, 200, 0), "g2": (255, 210, 0), "b1": (255, 0, 200), "b2": (255, 0, 210), "r1": (255, 0, 0)}
    records = [picture(tmp_path / f"{name}.png", colour, colour) for name, colour in second.items()]
    path = tmp_path / "h.jsonl"
    generate_hypotheses(generator(), records, HEADER, path)
    lines = read_hypothesis_file(path, HEADER)
    plain = hypotheses_of(lines, HEADER, second, 0.0)
    assert all(found == [0] for found in plain.values())
    calibrated = hypotheses_of(lines, HEADER, second, 0.0, calibrated=True)
    assert calibrated == {"g1": [1], "g2": [1], "b1": [2], "b2": [2], "r1": [0]}


def test_calibration_on_a_part_of_the_images(tmp_path, records):
    path = tmp_path / "h.jsonl"
    generate_hypotheses(generator(), records, HEADER, path, calibration_images=1)
    lines = read_hypothesis_file(path, HEADER)
    assert all(len(line["top1_calibrated"]) == 9 for line in lines.values())
    assert [entry for entry in tmp_path.iterdir() if entry.suffix not in (".png", ".jsonl")] == []


def test_whole_image_rule(tmp_path, records):
    header = dataclasses.replace(HEADER, method="image", window_ratio=0.0)
    path = tmp_path / "h.jsonl"
    generate_hypotheses(generator(), records, header, path)
    lines = read_hypothesis_file(path, header)
    assert lines["red"]["scores"] == pytest.approx([1, 0, 0], abs=1e-3)
    assert lines["bars"]["scores"] == pytest.approx([0.7071, 0, 0.7071], abs=0.02)
    assert hypotheses_of(lines, header, ["red", "bars"], 0.23) == {"red": [0], "bars": [0, 2]}


def test_global_features_of_a_real_clip():
    """Crops go through the CLIP's own preprocessing: normalised, at the size that it was trained for."""
    dense = tiny_dense()
    query = F.normalize(torch.randn(4, dense.embed_dim), dim=1)
    image = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 32, 32), dtype=np.uint8))
    generator = HypothesisGenerator(dense, query, PIXEL_MEAN, PIXEL_STD)
    pixels = (image.float() - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)
    feature = F.normalize(dense.clip.encode_image(pixels[None])[0], dim=0)
    torch.testing.assert_close(generator.image_scores(image), query @ feature, rtol=0, atol=1e-4)
    torch.testing.assert_close(generator.window_scores([image], 1.0)[0][0], query @ feature, rtol=0, atol=1e-4)


def test_file_is_made_once(tmp_path, records):
    path = tmp_path / "h.jsonl"
    made = []

    def make() -> HypothesisGenerator:
        made.append(1)
        return generator()

    first = load_or_generate(path, HEADER, records, make)
    assert first == load_or_generate(path, HEADER, records, make)
    assert made == [1]
    # Any threshold is derived from the one file.
    assert hypotheses_of(first, HEADER, ["bars"], 0.5)["bars"] in ([0], [2])


def test_a_broken_image_is_named_and_leaves_no_file(tmp_path, records):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    path = tmp_path / "h.jsonl"
    with pytest.raises(ReclipError, match=r"broken\.jpg cannot be read"):
        generate_hypotheses(generator(), [*records, {"file_name": str(broken), "image_id": "x"}], HEADER, path)
    assert not path.exists()
    assert {entry.suffix for entry in tmp_path.iterdir()} == {".png", ".jpg"}


# ---- windows in one pass ----------------------------------------------------------------------------------------

ONE_PASS = dataclasses.replace(HEADER, method="one_pass", image_sides=[16, 100], split_block=2)


class MeanColourOfWindows(MeanColour):
    """Also gives the mean colour of windows of an image; keeps what it was called with."""

    patch_size = 4

    def window_features(self, images: Tensor, windows: Tensor, split: int) -> Tensor:
        self.calls.append((tuple(images.shape), split))
        pixels = images * torch.tensor(PIXEL_STD).view(3, 1, 1) + torch.tensor(PIXEL_MEAN).view(3, 1, 1)
        means = [pixels[:, :, y0:y1, x0:x1].mean((2, 3)) for x0, y0, x1, y1 in windows.tolist()]
        return F.normalize(torch.stack(means, dim=1), dim=-1)


def test_one_pass_gives_a_file_like_that_of_crops(tmp_path, records):
    backbone = MeanColourOfWindows()
    path = tmp_path / "h.jsonl"
    generate_hypotheses(HypothesisGenerator(backbone, torch.eye(3), PIXEL_MEAN, PIXEL_STD), records, ONE_PASS, path)
    lines = read_hypothesis_file(path, ONE_PASS)
    assert lines["bars"]["size"] == [16, 32] and len(lines["bars"]["top1"]) == len(lines["bars"]["top1_calibrated"])
    found = hypotheses_of(lines, ONE_PASS, ["red", "bars", "green"], 0.0)
    assert found == {"red": [0], "bars": [0, 2], "green": [1]}
    # The short side is 16; 30 x 24 becomes 20 x 16, in patches of 4. No two neighbours have one size.
    assert backbone.calls == [((1, 3, 16, 16), 2), ((1, 3, 16, 32), 2), ((1, 3, 20, 16), 2)]


def test_images_of_one_size_share_a_pass():
    backbone = MeanColourOfWindows()
    images = [torch.full((3, 16, side), 7 * side, dtype=torch.uint8) for side in (16, 16, 32, 16)]
    scores = HypothesisGenerator(backbone, torch.eye(3), PIXEL_MEAN, PIXEL_STD).one_pass_scores(images, 0.5)
    assert [shape[0] for shape, _ in backbone.calls] == [2, 1, 1] and [len(s) for s in scores] == [9] * 4


@pytest.mark.parametrize(
    ("size", "sides", "wanted"),
    [
        ((96, 96), (96, 1000), (96, 96)),
        ((480, 640), (512, 2048), (512, 688)),  # 682.7 is 42.7 patches
        ((100, 1000), (512, 1024), (96, 1024)),  # the long side rules: 102.4 is 6.4 patches
        ((50, 70), (0, 0), (48, 64)),  # its own size
        ((3, 2000), (0, 0), (16, 2000)),  # at least a patch
    ],
)
def test_one_pass_size(size, sides, wanted):
    assert one_pass_size(*size, sides, 16) == wanted


def test_one_pass_of_another_size_or_block_is_another_file(tmp_path, records):
    path = tmp_path / "h.jsonl"
    backbone = MeanColourOfWindows()
    generate_hypotheses(HypothesisGenerator(backbone, torch.eye(3), PIXEL_MEAN, PIXEL_STD), records, ONE_PASS, path)
    for change in ({"split_block": 0}, {"image_sides": [32, 100]}, {"method": "crops"}):
        with pytest.raises(ReclipError, match=next(iter(change))):
            read_hypothesis_file(path, dataclasses.replace(ONE_PASS, **change))


def test_a_file_from_before_one_pass_is_still_read(tmp_path, records):
    path = tmp_path / "h.jsonl"
    generate_hypotheses(generator(), records, HEADER, path)
    head, *rest = path.read_text().splitlines()
    old = {key: value for key, value in json.loads(head).items() if key not in ("image_sides", "split_block")}
    path.write_text("\n".join([json.dumps(old), *rest]))
    assert set(read_hypothesis_file(path, HEADER)) == {"red", "bars", "green"}
