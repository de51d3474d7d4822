"""Which files count as images, and the names of their masks. No file's content is read here."""

import os
from pathlib import Path

import pytest

from reclip_d2.data import image_file
from reclip_d2.data.image_folder import find_images
from reclip_d2.errors import ReclipError


@pytest.fixture(autouse=True)
def without_heif(monkeypatch):
    """As if pillow-heif were not installed."""
    monkeypatch.setattr(image_file, "has_heif", lambda: False)


@pytest.fixture
def tree(tmp_path) -> Path:
    """``photos`` with images, other files and hidden ones."""
    for name in (
        "b.JPG", "a.jpeg", "notes.txt", "in/c.png", "in/deep/d.webp", "in/e.TIFF", "in/f.bmp", "in/g.heic",
        ".hidden.jpg", "._a.jpeg", ".thumbs/x.jpg", "in/.y.png",
    ):  # fmt: skip
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "photos"


def ids(*sources: object, **options: object) -> list[str]:
    return [image.image_id for image in find_images([str(source) for source in sources], **options).images]


def message_of(*sources: object) -> str:
    with pytest.raises(ReclipError) as caught:
        ids(*sources)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ALL = ["a", "b", "in/c", "in/deep/d", "in/e", "in/f"]


def test_folder(tree):
    images = find_images([tree]).images
    assert [image.image_id for image in images] == ALL
    assert images[1].path == tree / "b.JPG"


def test_folder_by_a_relative_path(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)
    assert ids("photos") == ids("./photos/") == ids("photos/../photos") == ALL
    assert all(image.path.is_absolute() for image in find_images(["photos"]).images)


def test_single_file_and_files(tree):
    assert ids(tree / "in/c.png") == ["c"]
    assert ids(tree / "b.JPG", tree / "in/deep/d.webp") == ["b", "in/deep/d"]
    assert ids(tree / "in/e.TIFF", tree / "in/f.bmp") == ["e", "f"]


def test_glob(tree):
    assert ids(tree / "in/*.bmp") == ["f"]
    assert ids(tree / "**/*.webp") == ["in/deep/d"]
    assert ids(f"{tree}/*") == ["a", "b"]  # other files are skipped
    assert ids(f"{tree}/**") == ALL
    assert ids(f"{tree}/in/[cd].*") == ["c"]


def test_a_name_with_wild_cards_that_exists_is_a_name(tmp_path):
    (tmp_path / "photo [1].jpg").touch()
    assert ids(tmp_path / "photo [1].jpg") == ["photo [1]"]


def test_brackets_in_the_folder_that_a_glob_begins_at(tmp_path, monkeypatch):
    """They are not wildcards: the user has not typed them."""
    folder = tmp_path / "trip [1]"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "a.jpg").touch()
    (tmp_path / "b.jpg").touch()
    listing = folder / "list.txt"
    listing.write_text("in/*.jpg\n../*.jpg\n")
    assert ids(listing) == ["b", "trip [1]/in/a"]
    monkeypatch.chdir(folder)
    assert ids("**/*.jpg") == ["in/a"]
    assert ids("in/*") == ids("in/../in/*.jpg") == ["a"]
    assert "does not exist" in message_of("*/../none.jpg")


def test_list(tree):
    listing = tree.parent / "list.txt"
    listing.write_text(f"\ufeff# mine\r\nphotos/b.JPG\r\n\r\n{tree}/in/c.png\r\nphotos/in/deep\r\n", encoding="utf-8")
    assert ids(listing) == ["b", "in/c", "in/deep/d"]


def test_several_sources_keep_their_folders_names(tree):
    other = tree.parent / "other"
    other.mkdir()
    (other / "a.jpg").touch()
    assert ids(tree / "in/deep", other) == ["other/a", "photos/in/deep/d"]


def test_an_image_that_is_named_twice_counts_once(tree):
    assert ids(tree, tree / "b.JPG", tree / "in") == ALL


def test_folders_that_are_left_out(tree):
    assert ids(tree, exclude=[tree / "in" / "deep"]) == ["a", "b", "in/c", "in/e", "in/f"]
    assert ids(f"{tree}/**", exclude=[tree / "in"]) == ["a", "b"]
    (tree / "in" / "reclip.json").touch()  # results of ours
    assert ids(tree) == ["a", "b"]
    assert ids(tree / "in") == ["c", "deep/d", "e", "f"]  # named explicitly


def test_images_in_the_folder_of_the_results(tree):
    for source in (tree, tree / "in/..", f"{tree}/*", f"{tree}/in/*.bmp"):
        with pytest.raises(ReclipError, match=r"the output folder: choose another --output"):
            ids(source, exclude=[tree])
    assert ids(tree / "in", exclude=[tree]) == ["c", "deep/d", "e", "f"]


def test_links_are_followed_once(tree):
    outside = tree.parent / "outside"
    outside.mkdir()
    (outside / "z.jpg").touch()
    os.symlink(outside, tree / "link")
    os.symlink(tree, tree / "in" / "circle")
    assert ids(tree) == [*ALL, "link/z"]


def test_two_images_of_one_stem(tree):
    (tree / "in" / "c.jpg").touch()
    message = message_of(tree)
    assert "in/c.jpg and c.png would share the mask in/c.png" in message and ".txt list" in message
    listing = tree.parent / "list.txt"
    listing.write_text("photos/in/c.jpg\nphotos/a.jpeg\n")
    assert ids(listing) == ["a", "in/c"]


def test_nothing_there(tree):
    assert "does not exist" in message_of(tree / "none")
    assert "does not exist" in message_of(tree / "none.jpg")
    (tree / "empty").mkdir()
    assert "has no images (.jpg" in message_of(tree / "empty")
    (tree / "empty" / "a.heic").touch()
    (tree / "empty" / "b.heic").touch()
    (tree / "empty" / "README").touch()
    assert (
        "its files are 2 .heic (to read them: pip install 'reclip_d2[heif]'), 1 without extension: check"
        in message_of(tree / "empty")
    )
    assert "matches nothing" in message_of(f"{tree}/*.gif")
    assert "matches 1 .heic (to read them: pip install 'reclip_d2[heif]'), but no images (.jpg" in message_of(
        f"{tree}/in/*.heic"
    )
    assert "no images given" in message_of()


def test_what_is_left_out_is_counted(tree, monkeypatch):
    (tree / "h.heic").touch()
    (tree / "b.gif").touch()
    found = find_images([tree, f"{tree}/in/*", tree / "a.jpeg"])
    heic = "2 .heic (to read them: pip install 'reclip_d2[heif]')"
    assert found.left_out == f"left out: {heic}, 1 .gif, 1 .txt"
    assert find_images([f"{tree}/in/*"]).left_out == f"left out: {heic.replace('2', '1', 1)}"
    assert find_images([tree / "b.JPG"]).left_out == ""
    monkeypatch.setattr(image_file, "has_heif", lambda: True)
    found = find_images([tree])
    assert found.left_out == "left out: 1 .gif, 1 .txt"
    assert [image.image_id for image in found.images] == sorted([*ALL, "in/g", "h"])
    for name in ("1.xml", "2.xml", "3.xml", "1.json", "2.json", "1.mp4", "README"):
        (tree / name).touch()
    expected = "left out: 3 .xml, 2 .json, 1 without extension, 1 .gif, 2 of other kinds"
    assert find_images([tree]).left_out == expected


def test_only_regular_files_are_images(tree):
    os.mkfifo(tree / "pipe.jpg")
    os.symlink(tree / "loop.jpg", tree / "loop.jpg")
    os.symlink("/dev/zero", tree / "device.jpg")
    assert f"image {tree}/pipe.jpg is a named pipe, not a regular file" in message_of(tree / "pipe.jpg")
    assert f"image {tree}/loop.jpg is a loop of symbolic links" in message_of(tree / "loop.jpg")
    assert f"image {tree}/device.jpg is a device, not a regular file" in message_of(tree / "device.jpg")
    # In a folder they are listed, so that reading them says what they are.
    assert ids(tree) == sorted([*ALL, "pipe", "loop", "device"])
    os.mkfifo(tree / "list.txt")
    assert f"image list {tree}/list.txt is a named pipe, not a regular file" in message_of(tree / "list.txt")
    os.symlink("/dev/zero", tree / "zero.txt")
    assert f"image list {tree}/zero.txt is a device, not a regular file" in message_of(tree / "zero.txt")


def test_unknown_extension(tree):
    assert "g.heic is none of .jpg" in message_of(tree / "in/g.heic")


def test_lists_that_are_wrong(tree):
    listing = tree.parent / "list.txt"
    for text, words in (
        ("photos/b.JPG\nphotos/none.jpg\n", "line 2: photos/none.jpg does not exist"),
        ("photos/in/g.heic", "line 1: photos/in/g.heic is none of"),
        ("# nothing\n\n", "names no image"),
        ("photos/notes.txt", "line 1: photos/notes.txt is itself a list"),
    ):
        listing.write_text(text)
        assert words in message_of(listing)
    listing.write_bytes(b"\xff\xfe\x00")
    assert "is UTF-16 text: save it as UTF-8" in message_of(listing)


def test_a_folder_that_cannot_be_read(tree, monkeypatch):
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/in"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "photos/in cannot be read (Permission denied)" in message_of(tree)
