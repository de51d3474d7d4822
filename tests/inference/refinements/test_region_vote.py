"""Votes of regions by hand, and along the edges of a picture."""

import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.inference.refinements import Grid, RegionVote, build_refinements
from reclip_d2.inference.refinements.base import pixel_probabilities
from reclip_d2.inference.refinements.region_vote import merge_similar, region_means
from tests.helpers import make_maskclip


def test_means_by_hand():
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [8.0, 0.0]]])
    regions = torch.tensor([[0, 0], [2, 0]])
    expected = torch.tensor([[[7 / 3, 7 / 3], [3.0, 7 / 3]], [[0.0, 0.0], [8.0, 0.0]]])
    torch.testing.assert_close(region_means(values, regions), expected)


def test_labels_follow_the_edge_of_the_picture():
    """The colours change at column 11, the patches of 8 pixels at column 8; superpixels move the border."""
    pixels = torch.full((3, 16, 24), -1.0)
    pixels[:, :, 11:] = 1.0
    probabilities = torch.tensor([[0.9, 0.45, 0.1]] * 2)
    logits = torch.stack([probabilities, 1 - probabilities]).log()
    vote = RegionVote(load_config("", ["TEST.REGION_VOTE.SIZE", "8", "TEST.REGION_VOTE.COMPACTNESS", "0.1"]))
    refined = vote(Grid(logits, pixels, (16, 24)))
    assert refined.logits.shape == (2, 16, 24) and refined.padded_size == (16, 24)
    labels = refined.logits.argmax(0)
    assert (labels[:, :8] == 0).all() and (labels[:, 16:] == 1).all()
    assert all(len(labels[:, columns].unique()) == 1 for columns in (slice(8, 11), slice(11, 16)))


def test_probabilities_at_the_pixels_do_not_depend_on_the_chunk():
    grid = Grid(torch.randn(11, 3, 4), torch.zeros(3, 20, 29), (24, 32))
    whole = torch.cat([part for _, part in pixel_probabilities(grid, 100)])
    assert whole.shape == (11, 20, 29)
    torch.testing.assert_close(torch.cat([part for _, part in pixel_probabilities(grid, 4)]), whole)


def test_merging_by_hand():
    """Four columns of regions; the helper tells the last from the others, and distant equals stay apart."""
    regions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    angles = torch.tensor([0.0, 0.3, 0.6, 2.0, 0.0])  # neighbours of 0.3 rad: a cosine of 0.955
    features = torch.stack([angles.cos(), angles.sin()])[:, None]
    assert merge_similar(regions, features, 0.95).tolist() == [[0, 0, 0, 1, 2]] * 2
    assert merge_similar(regions, features, 0.99).tolist() == regions.tolist()
    assert merge_similar(regions, features, -1.0).unique().tolist() == [0]


def test_a_helper_merges_superpixels():
    """With a random helper of timm: the votes are those of fewer, larger regions."""
    keys = ["TEST.REFINE", "['region_vote']", "TEST.REGION_VOTE.REGIONS", "helper", "TEST.REGION_VOTE.SIZE", "8"]
    helper = ["MODEL.CLIP.HELPER_NAME", "test_vit", "MODEL.CLIP.HELPER_WEIGHTS", "random"]
    model = make_maskclip().eval()
    grid = Grid(torch.randn(3, 4, 6), torch.randn(3, 32, 48), (32, 48))
    counts = []
    for similarity in ("1.0", "-1.0"):
        cfg = load_config("", [*keys, *helper, "TEST.REGION_VOTE.SIMILARITY", similarity])
        (vote,) = build_refinements(cfg, model)
        counts.append(len(vote.regions(grid).unique()))
        assert vote(grid).logits.shape == (3, 32, 48)
    assert counts[0] > 10 and counts[1] == 1
    with pytest.raises(ReclipError, match="HELPER_NAME is empty"):
        build_refinements(load_config("", keys), model)
