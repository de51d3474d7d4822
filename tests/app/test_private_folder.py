"""Folders that are removed with the program, and leftovers of killed programs."""

import json
import multiprocessing
import os
import signal

import pytest

from reclip_d2.app.private_folder import MARKER, private_folder, remove_leftovers
from reclip_d2.workspace.run_folder import RunFolder


def _be_killed(parent):
    with private_folder(parent, "page-") as folder:
        (folder / "masks").mkdir()
        (folder / "masks" / "a.png").touch()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def leftover(tmp_path):
    """What a program that was killed has left, made from a folder of this process."""
    with private_folder(tmp_path, "page-") as folder:
        copy = tmp_path / folder.name.replace("page-", "page-copy")
        copy.mkdir()
        content = json.loads((folder / MARKER).read_text())
        (copy / MARKER).write_text(json.dumps({**content, "folder": copy.name}))
        (copy / "image.png").touch()
    assert not folder.exists()
    return copy


def test_it_goes_with_the_block(tmp_path):
    with pytest.raises(ZeroDivisionError), private_folder(tmp_path, "page-") as folder:
        assert folder.is_absolute() and folder.parent == tmp_path
        (folder / "file").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_program(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=_be_killed, args=(tmp_path,))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "masks" / "a.png").exists()
    with private_folder(tmp_path, "page-") as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_a_leftover_is_removed(tmp_path, leftover):
    assert remove_leftovers(tmp_path, "reclip-app-") == [] and leftover.exists()
    assert remove_leftovers(tmp_path, "page-") == [leftover] and not leftover.exists()


def test_one_in_use_stays(tmp_path):
    with private_folder(tmp_path, "page-") as folder:
        assert remove_leftovers(tmp_path, "page-") == []
        assert (folder / MARKER).exists()


def test_one_with_a_training_under_way_stays(tmp_path, leftover):
    with RunFolder(leftover / "training-1" / "out").lock():
        assert remove_leftovers(tmp_path, "page-") == []
    assert remove_leftovers(tmp_path, "page-") == [leftover]


def _no_marker(folder):
    (folder / MARKER).unlink()


def _renamed(folder):
    (folder / MARKER).write_text((folder / MARKER).read_text().replace(folder.name, "page-other"))


def _linked_marker(folder):
    (folder / MARKER).rename(folder.parent / "marker")
    (folder / MARKER).symlink_to(folder.parent / "marker")


def _a_link(folder):
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def _deep_marker(folder):
    (folder / MARKER).write_text("[" * 1000)


def _foreign(folder):
    os.chown(folder, 12345, 12345)


@pytest.mark.parametrize(
    "change",
    [_no_marker, _renamed, _linked_marker, _a_link, _deep_marker,
     pytest.param(_foreign, marks=pytest.mark.skipif(os.getuid() != 0, reason="needs root"))],
)  # fmt: skip
def test_what_does_not_prove_to_be_ours_stays(tmp_path, leftover, change):
    change(leftover)
    assert remove_leftovers(tmp_path, "page-") == []
    assert (leftover / "image.png").exists()
