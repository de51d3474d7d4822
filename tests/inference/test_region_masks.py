"""Votes of regions from a folder of masks: whole images, windows, tiles and views, by hand and from end to end."""

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.inference import ImagePredictor
from reclip_d2.inference.band import Band
from reclip_d2.inference.refinements import Denoise
from reclip_d2.inference.region_masks import RegionMasks, vote_in_bands
from reclip_d2.inference.video import predict_frames
from tests.helpers import make_maskclip, random_image

KEYS = ("INPUT.MIN_SIZE_TEST", 0, "TEST.REFINE", "['region_vote']", "TEST.REGION_VOTE.REGIONS", "masks")


def config(folder: object, *keys: object):
    return load_config("", list(map(str, (*KEYS, "TEST.REGION_VOTE.FOLDER", folder, *keys))))


def test_votes_by_hand():
    """Regions reach across bands; pixels of no region keep their label."""
    probabilities = torch.tensor(
        [[[0.9, 0.4, 0.2], [0.1, 0.4, 0.2]], [[0.1, 0.6, 0.8], [0.9, 0.6, 0.8]]], dtype=torch.float64
    )
    regions = torch.tensor([[1, 1, 0], [2, 1, 2]])

    def bands():
        for row in range(2):
            yield Band(slice(row, row + 1), lambda row=row: probabilities[:, row : row + 1].log() + 3)

    found = list(vote_in_bands(bands, regions))
    values = torch.cat([band.logits for band in found], dim=1).exp()
    one, two = (0.9 + 0.4 + 0.4) / 3, (0.1 + 0.2) / 2
    torch.testing.assert_close(values[0], torch.tensor([[one, one, 0.2], [two, one, two]], dtype=torch.float64))
    assert torch.cat([band.labels for band in found]).tolist() == [[0, 0, 1], [1, 0, 1]]


@pytest.fixture
def folder(tmp_path):
    """A mask of three bands and a hole of no region for ``a.jpg``."""
    mask = np.kron(np.array([[7], [9], [200]], np.uint8), np.ones((16, 64), np.uint8))
    mask[20:30, 10:20], mask[0, 0] = 0, 255
    (tmp_path / "regions" / "sub").mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "regions" / "sub" / "a.png")
    return tmp_path / "regions", mask


def test_reading(folder):
    path, mask = folder
    masks = RegionMasks.from_config(config(path))
    regions = masks.read("photos/a.jpg", (48, 64))
    assert regions.unique().tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal((regions == 0).numpy(), (mask == 0) | (mask == 255))
    Image.fromarray(np.full((48, 64), 3, np.int32).astype(np.uint16)).save(path / "b.png")
    assert masks.from_config(config(path)).read("b.jpg", (48, 64)).unique().tolist() == [1]


WAYS = {
    "whole": (),
    "views": ("TEST.REFINE", "['flip', 'region_vote']"),
    "windows": ("TEST.SLIDING_WINDOW.ENABLED", True, "TEST.SLIDING_WINDOW.SIZE", "[32, 32]",
                "TEST.SLIDING_WINDOW.STRIDE", "[16, 16]"),
    "tiles": ("INPUT.TILES.FROM_SIDE", 48, "INPUT.TILES.SIZE", 48),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_way_of_prediction(folder, way):
    """The label of a region is that of its mean probabilities, whichever way these come about."""
    path, mask = folder
    model = make_maskclip().eval()
    image = random_image(5, 48, 64).permute(1, 2, 0).contiguous().numpy()
    cfg = config(path, *WAYS[way])
    predictor = ImagePredictor.from_config(model, cfg)
    assert predictor.refines and predictor.refinements == []
    labels = predictor.labels(image, "a.jpg")
    plain = ImagePredictor.from_config(model, cfg)
    plain.region_masks = None
    plain.refinements = [Denoise(load_config("", ["TEST.DENOISE.THRESHOLD", "0.0"]))]  # scaled logits, without votes
    probabilities = torch.cat([band.logits for band in plain.bands(image)], dim=1).softmax(0).numpy()
    for value in (7, 9, 200):
        assert (labels[mask == value] == probabilities[:, mask == value].mean(1).argmax()).all()
    free = (mask == 0) | (mask == 255)
    np.testing.assert_array_equal(labels[free], probabilities.argmax(0)[free])


def test_errors(folder, tmp_path):
    path, _ = folder
    model = make_maskclip().eval()
    image = random_image(5, 48, 64).permute(1, 2, 0).contiguous().numpy()
    predictor = ImagePredictor.from_config(model, config(path))
    with pytest.raises(ReclipError, match="which this image does not have, .*: use REGIONS superpixels"):
        predictor.labels(image)
    with pytest.raises(ReclipError, match="1 images have no mask in .*whose mask is b.png"):
        predictor.labels(image, "b.jpg")
    with pytest.raises(ReclipError, match="has size 64x48, its image 64x40"):
        predictor.labels(image[:40], "a.jpg")
    with pytest.raises(ReclipError, match="not for videos"):
        list(predict_frames(predictor, [], 0))
    with pytest.raises(ReclipError, match="needs TEST.REGION_VOTE.FOLDER"):
        ImagePredictor.from_config(model, config("''"))
    with pytest.raises(ReclipError, match="does not exist"):
        ImagePredictor.from_config(model, config(tmp_path / "none"))
