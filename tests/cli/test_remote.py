"""``reclip predict`` and ``segment`` on images at URLs."""

import pytest

from tests.cli.conftest import all_files, segment_arguments

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def bucket(photos):
    """``memory://bucket`` with the images, one that is broken and none of a list's last line."""
    system = fsspec.filesystem("memory")
    for path in photos.rglob("*.*"):
        system.pipe(f"/bucket/{path.relative_to(photos)}", path.read_bytes())
    system.pipe("/bucket/bad.png", b"not an image")
    yield system
    system.rm("/bucket", recursive=True)


def test_predict(reclip, model, photos, bucket, tmp_path):
    arguments = ("--model", "out", "--device", "cpu", "--formats", "palette", "--output")
    assert reclip("predict", "photos", *arguments, "local").status == 0
    urls = [f"memory://bucket/{path.relative_to(photos)}" for path in photos.rglob("*.*")]
    (tmp_path / "list.csv").write_text("\n".join(["url", *urls, "memory://bucket/bad.png", "memory://bucket/gone.png"]))
    call = ("predict", "list.csv", *arguments, "remote")
    first = reclip(*call)
    assert "2 of 8 images have no mask" in first.error
    assert "no mask of bad: image" in first.out
    assert "no mask of gone: image memory://bucket/gone.png does not exist" in first.out
    for part in ("masks", "palette"):
        assert all_files(tmp_path / "remote" / part) == all_files(tmp_path / "local" / part)
    assert not (tmp_path / "remote" / "run" / "copies").exists()

    for path in photos.rglob("*.*"):
        bucket.rm(f"/bucket/{path.relative_to(photos)}")  # finished masks need no image
    again = reclip(*call, "--skip-broken")
    assert again.status == 0 and "6 masks" in again.out and "(0 new)" in again.out, again.err


def test_formats_keep_the_copies(reclip, model, photos, bucket, tmp_path):
    arguments = ("--model", "out", "--device", "cpu", "--formats", "overlay", "--output")
    assert reclip("predict", "photos", *arguments, "local").status == 0
    for shard in ("2/2", "1/2"):
        part = reclip("predict", "memory://bucket/", *arguments, "remote", "--skip-broken", "--shard", shard)
        assert part.status == 0, part.err
    assert all_files(tmp_path / "remote" / "overlay") == all_files(tmp_path / "local" / "overlay")
    assert (tmp_path / "remote" / "run" / "copies" / "in" / "4.png").exists()


def test_segment_without_training(reclip, photos, classes, bucket, tmp_path):
    assert reclip(*segment_arguments("--fast", output="local")).status == 0
    result = reclip(*segment_arguments("--fast", "--skip-broken", output="remote", images=("memory://bucket",)))
    assert result.status == 0 and "no mask of bad" in result.out, result.err
    assert all_files(tmp_path / "remote" / "masks") == all_files(tmp_path / "local" / "masks")
