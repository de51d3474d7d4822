"""From the source archive to the wheel."""

import base64
import csv
import hashlib
import io
import tarfile
import zipfile

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.install_detectron2.patches import patch_all
from reclip_d2.install_detectron2.wheel import read_sdist, write_wheel
from tests.install_detectron2.sources import SOURCES, make_sdist, package_files


def test_sdist_is_mapped_to_the_wheels_layout():
    files = read_sdist(make_sdist(SOURCES))
    assert files["detectron2/model_zoo/configs/Base.yaml"] == b"VERSION: 2\n"
    assert files["detectron2/projects/deeplab/__init__.py"] == b"from .loss import x\n"
    assert files["detectron2-0.5.dist-info/licenses/LICENSE"] == b"Apache License\n"
    assert not [path for path in files if "setup.py" in path or "train_net.py" in path]


@pytest.mark.parametrize("bad", ["detectron2/../../evil.py", "detectron2/link"])
def test_sdist_with_links_or_parent_folders_is_refused(bad):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        member = tarfile.TarInfo(f"detectron2_cdo-0.5/{bad}")
        if bad.endswith("link"):
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member, io.BytesIO())
    with pytest.raises(ReclipError, match="not a plain file"):
        read_sdist(content.getvalue())


def test_sdist_that_is_cut_short_or_of_something_else_is_refused():
    with pytest.raises(ReclipError, match="the source archive cannot be read"):
        read_sdist(make_sdist(SOURCES)[:200])
    with pytest.raises(ReclipError, match=r"does not contain Detectron2's __init__\.py"):
        read_sdist(make_sdist({"LICENSE": "x"}))


def test_wheel_holds_files_metadata_and_a_true_record(tmp_path):
    files = read_sdist(make_sdist(SOURCES))
    patch_all(files)
    wheel = write_wheel(files, tmp_path / "wheels")
    assert wheel.name == "detectron2-0.5-py3-none-any.whl"
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]  # no temporary files left
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    info = "detectron2-0.5.dist-info"
    metadata = content[f"{info}/METADATA"].decode().splitlines()
    assert {"Name: detectron2", "Version: 0.5", "Requires-Dist: fvcore>=0.1.5,<0.1.6"} <= set(metadata)
    assert b"Tag: py3-none-any" in content[f"{info}/WHEEL"]
    assert files.items() <= content.items()

    rows = {row[0]: row[1:] for row in csv.reader(content[f"{info}/RECORD"].decode().splitlines())}
    assert rows.pop(f"{info}/RECORD") == ["", ""]
    assert rows.keys() == content.keys() - {f"{info}/RECORD"}
    for name, (digest, size) in rows.items():
        sha256 = base64.urlsafe_b64encode(hashlib.sha256(content[name]).digest()).decode().rstrip("=")
        assert (digest, size) == (f"sha256={sha256}", str(len(content[name])))
    # Metadata comes after all code: a copy cut short is recognised by its absence.
    names = list(content)
    assert names.index(f"{info}/METADATA") > max(i for i, n in enumerate(names) if n.endswith(".py"))


def test_wheel_is_the_same_byte_for_byte(tmp_path):
    files = package_files(SOURCES)
    first = write_wheel(files, tmp_path / "a").read_bytes()
    second = write_wheel(dict(reversed(files.items())), tmp_path / "b").read_bytes()
    assert first == second
