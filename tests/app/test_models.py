"""Networks of a session."""

import pytest
import torch

from reclip_d2.app.models import Models, class_places
from reclip_d2.app.session import read_classes
from tests.app.conftest import TINY
from tests.cli.conftest import picture


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ("sky, heaven, blue\nwood\nbackground: road", [0, 1, 2]),
        ("road\nwood", [2, 1]),
        ("sky, blue, heaven\nroad", [0, 2]),  # synonyms are averaged: their order is nothing
        ("heaven, sky, blue\nroad", None),  # the first name is that of the Reference prompt
        ("sky\nroad", None),
        ("wood\nlake", None),
    ],
)
def test_class_places(wanted, places):
    known = read_classes("sky, heaven, blue\nwood\nbackground: road")
    assert class_places(known, read_classes(wanted)) == places


def test_maskclip_gets_other_names():
    """The same as one that was built with these names."""
    image = picture(3)
    used = Models(TINY)
    first = used.maskclip(read_classes("sky\nwood")).labels(image)
    assert set(first.ravel()) <= {0, 1}
    names = read_classes("fire\nsky, heaven\nlake\nbackground: road")
    fresh, renamed = Models(TINY).maskclip(names), used.maskclip(names)
    torch.testing.assert_close(renamed.model.query_features, fresh.model.query_features, rtol=0, atol=0)
    assert (renamed.labels(image) == fresh.labels(image)).all() and renamed.model.num_classes == 4
    assert (used.maskclip(read_classes("sky\nwood")).labels(image) == first).all()
