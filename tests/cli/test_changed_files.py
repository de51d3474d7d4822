"""Inputs are identified by content; folders of earlier versions, which recorded less, still work."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from reclip_d2.utils.digest import _legacy_signature, file_digest
from reclip_d2.workspace.run_folder import CHECKPOINT
from tests.cli.conftest import all_files, picture


def test_an_image_that_is_changed_in_its_middle(segment, photos):
    path = photos / "large.bmp"
    image = picture(8, 300, 300)
    Image.fromarray(image).save(path)
    size = path.stat().st_size
    assert segment("--fast").status == 0
    image[140:160] = 255 - image[140:160]  # both ends, and the size, stay
    Image.fromarray(image).save(path)
    assert path.stat().st_size == size
    assert "(1 changed, such as 'large')" in segment("--fast").error


def to_earlier_version(folder: Path, photos: Path, weights: Path | None) -> None:
    """Give a folder the signatures that earlier versions recorded."""
    images = folder / "run" / "images.json"
    content = json.loads(images.read_text())
    files = {path.relative_to(photos).with_suffix("").as_posix(): path for path in photos.rglob("*.*")}
    content["signatures"] = {key: _legacy_signature(files[key]) for key in content["signatures"]}
    images.write_text(json.dumps(content))
    state = json.loads((folder / "reclip.json").read_text())
    for settings in state["settings"].values():
        if CHECKPOINT in settings:
            settings[CHECKPOINT] = _legacy_signature(weights)
    (folder / "reclip.json").write_text(json.dumps(state))


def test_folders_of_earlier_versions(reclip, segment, model, photos, tmp_path):
    weights = model / "run" / "rectified" / "model_final.pth"
    call = ("predict", "photos", "--model", "out", "--output", "more", "--device", "cpu")
    assert reclip(*call).status == 0
    masks = all_files(tmp_path / "more" / "masks")
    for folder in (model, tmp_path / "more"):
        to_earlier_version(folder, photos, weights)
    survey = model / "run" / "survey.jsonl"
    lines = [json.loads(line) for line in survey.read_text().split("\n") if line]
    for line in lines:
        path = next(photos.rglob(f"{Path(line['image_id']).name}.*"))
        line["signature"] = f"{_legacy_signature(path)} {line['signature'].partition(' ')[2]}"
    survey.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    again = segment()
    assert again.status == 0 and "rectification: done before" in again.out and "(0 new)" in again.out
    assert len(survey.read_text().split()) == sum(len(json.dumps(line).split()) for line in lines)  # not surveyed
    more = reclip(*call)
    assert more.status == 0 and "masks: done before" in more.out, more.err
    assert all_files(tmp_path / "more" / "masks") == masks
    for folder in (model, tmp_path / "more"):
        recorded = json.loads((folder / "run" / "images.json").read_text())["signatures"]
        assert recorded["in/4"] == file_digest(photos / "in" / "4.png")
    settings = json.loads((tmp_path / "more" / "reclip.json").read_text())["settings"]["rectified"]
    assert settings[CHECKPOINT] == file_digest(weights)

    to_earlier_version(model, photos, None)
    Image.fromarray(picture(77)).save(photos / "in" / "4.png")
    assert "(1 changed, such as 'in/4')" in segment().error
