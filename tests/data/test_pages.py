"""Pages of TIFFs: which count, their names, reading, and digests."""

import numpy as np
import pytest
from PIL import Image

from reclip_d2.data.image_folder import find_images
from reclip_d2.data.images import peek_size, read_image
from reclip_d2.data.tiff import page_numbers
from reclip_d2.errors import ReclipError
from reclip_d2.utils.digest import file_digest, file_digests
from reclip_d2.utils.pages import page_path, split_page

LEVELS = (10, 90, 200)


@pytest.fixture
def stack(tmp_path):
    """Three grey pages of 8 bits, each of its own level."""
    pages = [Image.fromarray(np.full((6, 9), level, np.uint8)) for level in LEVELS]
    (tmp_path / "in").mkdir()
    pages[0].save(tmp_path / "in" / "stack.tif", save_all=True, append_images=pages[1:])
    return tmp_path / "in" / "stack.tif"


def test_each_page_is_an_image(stack):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(stack.with_name("single.tif"))
    images = find_images([stack.parent]).images
    assert [image.image_id for image in images] == ["single", *(f"stack_page_000{k}" for k in (1, 2, 3))]
    assert [str(image.mask_name) for image in images[1:]] == [f"stack_page_000{k}.png" for k in (1, 2, 3)]
    assert [int(read_image(image.path)[0, 0, 0]) for image in images[1:]] == list(LEVELS)
    assert peek_size(images[2].path) == (6, 9)
    assert len({*file_digests([image.path for image in images])}) == 4
    assert file_digest(images[0].path) and not file_digest(page_path(stack.with_name("none.tif"), 1))


def test_pages_of_16_bits_are_stretched_each_by_itself(tmp_path):
    rng = np.random.default_rng(0)
    pages = [Image.fromarray(rng.integers(low, low + 50, (20, 20)).astype(np.uint16)) for low in (100, 40_000)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    for image in find_images([tmp_path]).images:
        found = read_image(image.path)
        assert found.min() == 0 and found.max() == 255


def test_thumbnails_and_reduced_pages_do_not_count(tmp_path):
    page = Image.fromarray(np.zeros((8, 8), np.uint8))
    page.save(tmp_path / "size.tif", save_all=True, append_images=[page.resize((4, 4))])
    assert page_numbers(tmp_path / "size.tif") == [1]
    reduced = page.copy()
    reduced.encoderinfo = {"tiffinfo": {254: 1}}
    page.save(tmp_path / "type.tif", save_all=True, append_images=[reduced, page])
    assert page_numbers(tmp_path / "type.tif") == [1, 3]
    (tmp_path / "text.tif").write_text("hello")
    assert page_numbers(tmp_path / "text.tif") == [] == page_numbers(tmp_path / "none.tif")


def test_a_loop_of_pages_ends(stack):
    """The last directory points to the first."""
    data = bytearray(stack.read_bytes())
    first = int.from_bytes(data[4:8], "little")
    place = first
    while True:
        count = int.from_bytes(data[place : place + 2], "little")
        link = place + 2 + 12 * count
        following = int.from_bytes(data[link : link + 4], "little")
        if not following:
            break
        place = following
    data[link : link + 4] = first.to_bytes(4, "little")
    stack.write_bytes(bytes(data))
    assert page_numbers(stack) == [1, 2, 3]


def test_paths_of_pages(stack, tmp_path):
    assert split_page(page_path(stack, 12)) == (str(stack), 12)
    assert split_page(stack) == (str(stack), 0)
    (tmp_path / "folder.tif").mkdir()
    assert split_page(tmp_path / "folder.tif" / "page_0001")[1] == 0
    assert split_page("a.png/page_0001")[1] == 0
    with pytest.raises(ReclipError, match=r"stack.tif/page_0009 cannot be read"):
        read_image(page_path(stack, 9))
