"""``HYPOTHESIS.CROP_AWARE`` in a training: the hypothesis of each crop against Eq. (6) by hand.

The images are ramps: red tells a pixel's column and green its row, so that the crop and the flip can be read off the
image that the model gets.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, HFlipTransform
from PIL import Image

from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.engine import program
from reclip_d2.hypothesis.crop_aware import CropHypothesis
from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP
from tests.helpers import tiny_config

HEIGHT, WIDTH = 32, 48
NAMES = ["sky", "tree", "water", "wall", "road", "sand"]
# r = 1/4: windows of 8 x 12 px at a stride of half a window, seven along each axis.
CENTRES = [(6 + 6 * column, 4 + 4 * row) for row in range(7) for column in range(7)]
THRESHOLD = 0.1


def top1_of(image: int) -> list[int]:
    """Best class of each window: 0 to 2 by columns in the upper part, 3 in the lower, one window of class 4 or 5."""
    classes = [min(x // 16, 2) if y < 16 else 3 for x, y in CENTRES]
    classes[7 * 6 + (3 + image) % 7] = 4 + image % 2
    return classes


def hypothesis_by_hand(classes: list[int]) -> list[int]:
    """Eq. (6) with its fallback."""
    share = {k: classes.count(k) / len(classes) for k in set(classes)}
    return sorted(k for k in share if share[k] > THRESHOLD) or [max(sorted(share), key=share.get)]


@pytest.fixture
def folder(tmp_path, datasets) -> Path:
    """Ramps, registered as ``reclip_test_ramps``, and a config with a hypothesis file of known window classes."""
    records = []
    for index in range(4):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        pixels[..., 0] = 5 * np.arange(WIDTH)
        pixels[..., 1] = 7 * np.arange(HEIGHT)[:, None]
        pixels[..., 2] = index
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels).save(path)
        records.append({"file_name": str(path), "image_id": str(index), "height": HEIGHT, "width": WIDTH})
    datasets("reclip_test_ramps", records, NAMES)
    (tmp_path / "config.yaml").write_text(
        f"""
{tiny_config(tmp_path)}
HYPOTHESIS: {{WINDOW_RATIO: 0.25, THRESHOLD: {THRESHOLD}, FILE: {tmp_path}/hypotheses.jsonl}}
DATASETS: {{TRAIN: [reclip_test_ramps], TEST: []}}
DATALOADER: {{NUM_WORKERS: 0}}
INPUT:
  MIN_SIZE_TRAIN: [{HEIGHT}]
  CROP: {{ENABLED: true, SIZE: [14, 20]}}
  RANDOM_FLIP: horizontal
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 12, BASE_LR: 0.01}}
"""
    )
    return tmp_path


def run(folder: Path, output: str, *keys: str) -> None:
    arguments = ["--config-file", str(folder / "config.yaml"), "OUTPUT_DIR", str(folder / output), *keys]
    program.main(program.argument_parser().parse_args(arguments))


def write_hypotheses(folder: Path) -> None:
    """Let a run make the hypothesis file, and put the known window classes into it."""
    run(folder, "first", "SOLVER.MAX_ITER", "1")
    file = folder / "hypotheses.jsonl"
    header, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(line["top1"]) for line in lines] == [len(CENTRES)] * 4
    for line in lines:
        line["top1"] = top1_of(int(line["image_id"]))
    file.write_text("\n".join(json.dumps(line) for line in [header, *lines]))


@pytest.fixture
def batches(monkeypatch) -> list[dict]:
    """What the model is trained on."""
    seen: list[dict] = []
    losses = RectifiedCLIP.losses

    def recording(self, batched_inputs):
        seen.extend(batched_inputs)
        return losses(self, batched_inputs)

    monkeypatch.setattr(RectifiedCLIP, "losses", recording)
    return seen


def crop_of(image: torch.Tensor, scale: int) -> tuple[int, int, bool]:
    """(left, top, flipped) of a crop in the image, which was enlarged by ``scale``: read off the ramps in the crop's
    middle, where the interpolation has no border."""
    red, green = image[0, 0].float() / 5, image[1, :, 0].float() / 7
    flipped = bool(red[0] > red[-1])
    column, row = len(red) // 2, len(green) // 2
    x, y = (round(scale * (value.item() + 0.5) - 0.5) for value in (red[column], green[row]))
    return x - (len(red) - 1 - column if flipped else column), y - row, flipped


@pytest.mark.parametrize("scale", [1, 2])
def test_each_crop_has_its_own_hypothesis(folder, batches, scale):
    write_hypotheses(folder)
    batches.clear()
    size = f"[{14 * scale}, {20 * scale}]"
    keys = ["HYPOTHESIS.CROP_AWARE", "True", "INPUT.MIN_SIZE_TRAIN", f"({HEIGHT * scale},)", "INPUT.CROP.SIZE", size]
    run(folder, "out", *keys)
    assert len(batches) == 24
    different, flips, fewer, corners = 0, set(), 0, set()
    for record in batches:
        left, top, flipped = crop_of(record["image"], scale)
        height, width = record["image"].shape[1:]
        assert (height, width) == (14 * scale, 20 * scale)
        assert 0 <= left <= scale * WIDTH - width and 0 <= top <= scale * HEIGHT - height
        classes = top1_of(int(record["image_id"]))
        inside = [
            k
            for (x, y), k in zip(CENTRES, classes, strict=True)
            if left <= scale * x <= left + width and top <= scale * y <= top + height
        ]
        expected = hypothesis_by_hand(inside)
        assert record["hypothesis"].tolist() == expected
        different += expected != hypothesis_by_hand(classes)
        fewer += len(expected) < len(hypothesis_by_hand(classes))
        flips.add(flipped)
        corners.add((left, top))
    assert different > 12 and fewer > 0 and flips == {True, False} and len(corners) > 12


def test_without_it_each_crop_has_the_hypothesis_of_its_image(folder, batches):
    run(folder, "first", "SOLVER.MAX_ITER", "1")
    lines = [json.loads(line) for line in (folder / "hypotheses.jsonl").read_text().splitlines()[1:]]
    of_image = {line["image_id"]: hypothesis_by_hand(line["top1"]) for line in lines}
    run(folder, "out")
    assert len(batches) == 26
    assert all(record["hypothesis"].tolist() == of_image[record["image_id"]] for record in batches)


def test_the_weights_tell_the_difference(folder):
    write_hypotheses(folder)
    for output, value in (("image", "False"), ("crop", "True"), ("again", "True")):
        run(folder, output, "SOLVER.MAX_ITER", "3", "HYPOTHESIS.CROP_AWARE", value)
    image, crop, again = (
        torch.load(folder / name / "model_final.pth", weights_only=True)["model"] for name in ("image", "crop", "again")
    )
    assert all(torch.equal(crop[key], again[key]) for key in crop)
    assert not torch.equal(image["mask_decoder.conv.weight"], crop["mask_decoder.conv.weight"])


# ---- of one crop ------------------------------------------------------------------------------------------------


def test_hypothesis_of_a_crop_by_hand(tmp_path):
    """Four windows of half the size, classes 0 1 / 2 3 by quadrant of their centres; the crop keeps the right half."""
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(path)
    # r = 1/2: starts 0, 4, 8 along x and 0, 2, 4 along y; centres x 4, 8, 12 and y 2, 4, 6.
    classes = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    record = {"file_name": str(path), "hypothesis": [0]}

    def hypothesis(*augmentations, threshold=0.0):
        mapper = UnlabelledDatasetMapper(augmentations=list(augmentations))
        mapped = mapper({**record, "crop_hypothesis": CropHypothesis("image", classes, threshold, 0.5)})
        assert "crop_hypothesis" not in mapped
        return mapped["hypothesis"].tolist()

    assert hypothesis() == classes
    crop = _Fixed(CropTransform(8, 0, 8, 8))  # x from 8: the centres at 8 and 12
    assert hypothesis(crop) == [1, 2, 4, 5, 7, 8]
    assert hypothesis(_Fixed(CropTransform(9, 0, 7, 5))) == [2, 5]  # x from 9, y below 5: the centres (12, 2), (12, 4)
    # A flip before the crop: what was left is now right.
    assert hypothesis(_Fixed(HFlipTransform(16)), crop) == [0, 1, 3, 4, 6, 7]
    # A crop without a window's centre falls back on the image.
    assert hypothesis(_Fixed(CropTransform(0, 0, 2, 2))) == classes
    # Each class is in one of nine windows; in the crop in one of six.
    assert hypothesis(crop, threshold=0.15) == [1, 2, 4, 5, 7, 8]
    assert hypothesis(crop, threshold=0.2) == [1]  # the fallback: the most frequent, of the lowest id


class _Fixed(T.Augmentation):
    """A given transform."""

    def __init__(self, transform):
        self.transform = transform

    def get_transform(self, image):
        return self.transform
