"""``reclip segment`` from a folder to masks, and a second call."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_free import Verdict
from reclip_d2.workspace import judgement, training
from tests.cli.conftest import CLASSES, all_files, picture, read_mask

MASKS = ["0", "1", "2", "3", "in/4", "in/5"]
SIZES = {"0": (96, 96), "1": (96, 128), "2": (70, 60), "3": (200, 150), "in/4": (96, 96), "in/5": (96, 96)}


def test_a_whole_run(segment, tmp_path):
    first = segment("--formats", "overlay", "coco")
    assert first.status == 0, first.err
    out = tmp_path / "out"
    for name in MASKS:
        mask = read_mask(out / "masks" / f"{name}.png")
        assert mask.shape == SIZES[name]
        assert set(np.unique(mask)) <= {0, 1, 2, 255}
        assert (out / "overlay" / f"{name}.jpg").exists()
    ids = json.loads((out / "masks" / "classes.json").read_text())
    assert [entry["name"] for entry in ids["classes"]] == ["sky", "wood", "fire"] and ids["background"] is None
    assert json.loads((out / "coco" / "annotations" / "instances_default.json").read_text())["images"]

    # What it says: what it will do, how long that takes, what came out, and where.
    for words in (
        "images    6", "classes   3: sky, wood, fire", "ignored: road, snow", "reclip-embedded",
        "steps     hypotheses, first masks (MaskCLIP), rectification (ReCLIP++), masks", "estimate: about", "(6 new)",
        str(out / "masks"), str(out / "overlay"), "reclip predict IMAGES --model",
    ):  # fmt: skip
        assert words in first.out
    assert "hypotheses" in first.err and "rectification" in first.err  # progress bars

    # The summary is of the masks that are there.
    summary = json.loads((out / "summary.json").read_text())
    masks = np.concatenate([read_mask(out / "masks" / f"{name}.png").ravel() for name in MASKS])
    assert summary["pixels"] == masks.size and summary["masks"] == summary["images"] == 6
    for row in summary["classes"]:
        assert row["pixels"] == (masks == row["id"]).sum()
        assert row["images"] == sum((read_mask(out / "masks" / f"{name}.png") == row["id"]).any() for name in MASKS)

    names = {path.name for path in (out / "run" / "rectified").iterdir()}
    assert {"config.yaml", "model_final.pth", "metrics.json"} <= names
    assert not any(name.startswith("model_0") for name in names)  # only the last checkpoint is left
    model = torch.load(out / "run" / "rectified" / "model_final.pth", weights_only=True)
    assert model["iteration"] == 5

    # What was trained on are images and nothing else: no record names a label.
    assert all(set(record) == {"file_name", "image_id"} for record in DatasetCatalog.get("custom"))

    # The same again: nothing is made, nothing changes.
    before = all_files(out / "masks")
    second = segment("--formats", "overlay", "coco")
    assert second.status == 0
    for stage in ("hypotheses", "rectification", "masks"):
        assert f"{stage}: done before" in second.out
    assert "estimate" not in second.out and "(0 new)" in second.out
    assert all_files(out / "masks") == before

    # A lost mask is made again, with no training.
    (out / "masks" / "in" / "4.png").unlink()
    third = segment()
    assert "rectification: done before" in third.out and "(1 new)" in third.out
    assert all_files(out / "masks") == before


def test_fast_then_trained_then_fast(segment, tmp_path):
    out = tmp_path / "out"
    fast = segment("--fast")
    assert fast.status == 0, fast.err
    assert "6 masks by MaskCLIP" in fast.out and "steps     masks by MaskCLIP" in fast.out
    assert "reclip predict" not in fast.out
    assert not (out / "run" / "hypotheses.jsonl").exists()
    maskclip = all_files(out / "masks")

    trained = segment()
    assert trained.status == 0, trained.err
    aside = out / "previous-maskclip-ignore"
    assert all_files(aside / "masks") == maskclip
    rectified = all_files(out / "masks")
    assert rectified != maskclip

    again = segment("--fast")
    assert "masks: done before" in again.out
    assert all_files(out / "masks") == maskclip and not aside.exists()
    assert all_files(out / "previous-rectified-ignore" / "masks") == rectified


def test_keep(segment, reclip, tmp_path):
    """CLIP's own masks or the trained model's, also changed afterwards; prediction uses the model that was kept."""
    assert segment("--fast", output="fast").status == 0
    kept = segment("--keep", "maskclip")
    assert kept.status == 0, kept.err
    assert "kept the masks of maskclip, as --keep maskclip asks" in kept.out and "rectified" in kept.out
    assert "(6 new)" in kept.out and "done before" not in kept.out
    out = tmp_path / "out"
    maskclip = all_files(out / "masks")
    assert maskclip == all_files(tmp_path / "fast" / "masks")
    rectified = all_files(out / "previous-rectified-ignore" / "masks")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["kept"]["kind"] == summary["model"] == "maskclip"
    for kind, folder in (("maskclip", "masks"), ("rectified", "previous-rectified-ignore/masks")):
        labels = np.concatenate([read_mask(out / folder / f"{name}.png").ravel() for name in MASKS])
        assert summary["shares"][kind] == [(labels == row["id"]).mean() for row in summary["classes"]]
    assert "MaskCLIP (kept)" in (out / "summary.html").read_text()
    assert not (out / "run" / "features").exists()

    assert reclip("predict", "photos", "--model", "out", "--output", "more", "--device", "cpu").status == 0
    assert all_files(tmp_path / "more" / "masks") == maskclip
    assert "masks: done before" in segment("--keep", "maskclip").out

    other = segment("--keep", "rectified")
    assert "rectification: done before" in other.out and "(0 new)" in other.out
    assert all_files(out / "masks") == rectified != maskclip
    assert all_files(out / "previous-maskclip-ignore" / "masks") == maskclip
    assert reclip("predict", "photos", "--model", "out", "--output", "most", "--device", "cpu").status == 0
    assert all_files(tmp_path / "most" / "masks") == rectified


@pytest.mark.parametrize("best", ["maskclip", "calibrated", "rectified"])
def test_keep_the_best(segment, reclip, tmp_path, monkeypatch, best):
    """The judge chooses; the summary says so, and prediction gives the same masks."""
    judged = []

    def judge(candidates: list, reference: object) -> Verdict:
        judged.append([candidate.name for candidate in candidates])
        scores = {candidate.name: 10.0 + (candidate.name == best) for candidate in candidates}
        return Verdict(best, scores, f"kept the masks of {best}: they look best", "look twice")

    monkeypatch.setattr(judgement, "judge_masks", judge)
    result = segment("--keep", "best", "--iterations", "2", "--background", "keep")
    assert result.status == 0, result.err
    assert f"kept the masks of {best}: they look best" in result.out and "warning: look twice" in result.out
    assert judged == [["maskclip", "calibrated", "rectified"]]
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["model"] == summary["kept"]["kind"] == best and summary["kept"]["scores"][best] == 11
    assert summary["kept"]["warning"] == "look twice" and set(summary["shares"]) == {"maskclip", "rectified"}
    assert "look twice" in (out / "summary.html").read_text()
    call = ("predict", "photos", "--model", "out", "--output", "more", "--device", "cpu", "--background", "keep")
    assert reclip(*call).status == 0
    assert all_files(tmp_path / "more" / "masks") == all_files(out / "masks")
    again = segment("--keep", "best", "--iterations", "2", "--background", "keep")
    assert "(0 new)" in again.out and f"kept the masks of {best}" in again.out and len(judged) == 1


def test_the_published_method(segment, tmp_path):
    """With 121 crops (here 9) and new crops in each iteration: no feature store."""
    result = segment("--method", "reclippp_rectify", "--iterations", "2")
    assert result.status == 0, result.err
    assert "hypotheses" in result.err and "features" not in result.out + result.err
    header = json.loads((tmp_path / "out" / "run" / "hypotheses.jsonl").read_text().splitlines()[0])
    assert "crops" in json.dumps(header)
    assert "was made with" in segment("--iterations", "2").error  # the default method's keys differ


def test_no_room_for_the_features(segment, tmp_path):
    """Views are encoded again, with the same masks."""
    assert segment("--iterations", "2", output="whole").status == 0
    result = segment("--iterations", "2", keys=("FEATURE_STORE.MAX_SIZE", "1e-9"))
    assert result.status == 0, result.err
    assert "features: not stored, but encoded whenever they are needed" in result.out
    assert all_files(tmp_path / "out" / "masks") == all_files(tmp_path / "whole" / "masks")


def test_bank(segment, reclip, tmp_path):
    """Made once, used for the masks and for further images, also after the folder has moved; not for a student."""
    plain = segment("--fast")
    assert plain.status == 0, plain.err
    masks = all_files(tmp_path / "out" / "masks")
    assert segment("--fast", "--bank", "--overwrite", keys=("TEST.BANK.WEIGHT", "1.0")).status == 0
    file = tmp_path / "out" / "run" / "maskclip" / "bank.safetensors"
    refined, bank = all_files(tmp_path / "out" / "masks"), file.read_bytes()
    assert refined.keys() == masks.keys() and refined != masks
    assert segment("--fast", "--bank", keys=("TEST.BANK.WEIGHT", "1.0")).status == 0 and file.read_bytes() == bank
    (tmp_path / "out").rename(tmp_path / "moved")
    assert reclip("predict", "photos", "--model", "moved", "--output", "more", "--device", "cpu").status == 0
    more = all_files(tmp_path / "more" / "masks")
    assert all(more[name] == data for name, data in refined.items() if name.endswith(".png") and name in more)
    assert "which a student does not have" in segment("--student", "--bank", "--overwrite").err


def test_classes_are_left_out(segment, reclip, tmp_path):
    """Shares of five classes are not all 0.2, so some are below: they are said, and in no mask, also of further images;
    without the training's evidence it comes from these."""
    result = segment("--fast", keys=("TEST.MIN_CLASS_SHARE", "0.2"))
    assert result.status == 0, result.err
    file = tmp_path / "out" / "run" / "class_evidence.json"
    shares = json.loads(file.read_text())["shares"]
    dropped = [index for index, share in enumerate(shares) if share < 0.2]
    said = f"class pruning: leaves out {len(dropped)} of 5 classes: "
    assert dropped and said in result.out
    kept = {id for index, id in enumerate([0, 1, 2, 255, 255]) if index not in dropped}
    masks = all_files(tmp_path / "out" / "masks")
    assert {id for path in (tmp_path / "out" / "masks").rglob("*.png") for id in np.unique(read_mask(path))} <= kept
    file.rename(tmp_path / "evidence.json")
    more = reclip("predict", "photos", "--model", "out", "--output", "more", "--device", "cpu")
    assert more.status == 0 and said in more.out, more.err
    assert json.loads((tmp_path / "more" / "run" / "class_evidence.json").read_text())["shares"] == shares
    made = all_files(tmp_path / "more" / "masks")
    assert all(made[name] == data for name, data in masks.items() if name.endswith(".png"))


def test_regions_of_a_folder(segment, tmp_path):
    """Each region of an image's mask gets one label; an image without a mask is an error that names it."""
    assert segment("--fast").status == 0
    masks = {path.stem: read_mask(path) for path in (tmp_path / "out" / "masks").rglob("*.png")}
    (tmp_path / "regions").mkdir()
    for name, mask in masks.items():
        regions = np.ones(mask.shape, np.uint8)
        regions[: len(mask) // 2] = 2
        Image.fromarray(regions).save(tmp_path / "regions" / f"{name}.png")
    keys = ("TEST.REFINE", "['region_vote']", "TEST.REGION_VOTE.REGIONS", "masks", "TEST.REGION_VOTE.FOLDER", "regions")
    assert segment("--fast", "--overwrite", keys=keys).status == 0
    voted = {path.stem: read_mask(path) for path in (tmp_path / "out" / "masks").rglob("*.png")}
    assert voted.keys() == masks.keys()
    for mask in voted.values():
        half = len(mask) // 2
        assert len(np.unique(mask[:half])) == len(np.unique(mask[half:])) == 1
    next((tmp_path / "regions").iterdir()).unlink()
    assert "have no mask in" in segment("--fast", "--overwrite", keys=keys).err


def test_background_kept(segment, tmp_path):
    ignored = segment("--fast")
    assert ignored.status == 0
    before = {name: read_mask(tmp_path / "out" / "masks" / f"{name}.png") for name in MASKS}
    kept = segment("--fast", "--background", "keep")
    assert kept.status == 0 and "one class: road, snow" in kept.out
    for name, labels in before.items():
        assert (read_mask(tmp_path / "out" / "masks" / f"{name}.png") == np.where(labels == 255, 3, labels)).all()
    ids = json.loads((tmp_path / "out" / "masks" / "classes.json").read_text())
    assert ids["background"] == 3 and ids["classes"][3]["name"] == "background"
    assert "background" in kept.out


def test_scores(segment, tmp_path):
    assert segment("--fast", "--background", "keep", "--formats", "scores,index").status == 0
    for name in MASKS:
        with np.load(tmp_path / "out" / "scores" / f"{name}.npz") as file:
            scores = file["scores"]
        assert scores.dtype == np.float16 and scores.shape == (4, *SIZES[name])
        labels = read_mask(tmp_path / "out" / "masks" / f"{name}.png")
        best = scores.astype(np.float32).max(0)
        chosen = np.take_along_axis(scores.astype(np.float32), labels[None].astype(int), 0)[0]
        assert (best - chosen).max() < 1e-3  # the best but for rounding to 16 bits


def test_orientation_is_the_same_for_image_mask_and_overlay(segment, photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(9, 96, 160)
    stored = np.rot90(upright)  # orientation 6 turns it back
    Image.fromarray(upright).save(photos / "upright.png")
    Image.fromarray(stored).save(photos / "turned.png", exif=exif)
    assert segment("--fast", "--formats", "overlay").status == 0
    out = tmp_path / "out"
    mask = read_mask(out / "masks" / "turned.png")
    assert mask.shape == (96, 160)
    assert (mask == read_mask(out / "masks" / "upright.png")).all()
    assert (out / "overlay" / "turned.jpg").read_bytes() == (out / "overlay" / "upright.jpg").read_bytes()


def test_tiles(segment, photos, tmp_path):
    Image.fromarray(picture(9, 150, 400)).save(photos / "scan.png")
    result = segment("--tile", "100", images=("photos/scan.png", "photos/0.jpg"))
    assert result.status == 0, result.err
    # 2 x 4 tiles, and the image that is smaller than a tile.
    assert "9 training files" in result.out
    tiles = tmp_path / "out" / "run" / "working" / "scan.tiles"
    assert len(list(tiles.iterdir())) == 8
    assert read_mask(tmp_path / "out" / "masks" / "scan.png").shape == (150, 400)
    assert read_mask(tmp_path / "out" / "masks" / "0.png").shape == (96, 96)


def test_output_among_the_images(segment, photos):
    assert segment("--fast", "--formats", "overlay", output="photos/out").status == 0
    again = segment("--fast", output="photos/out")
    assert again.status == 0 and "images    6" in again.out


@pytest.mark.parametrize("training", [True, False])
def test_broken_images(segment, photos, tmp_path, training):
    flags = () if training else ("--fast",)
    (photos / "bad.jpg").write_bytes((photos / "0.jpg").read_bytes()[:900])
    result = segment(*flags)
    assert "1 of 7 images have no mask" in result.error and "--skip-broken" in result.error
    assert "no mask of bad" in result.out and "bad.jpg cannot be read" in result.out
    before = all_files(tmp_path / "out" / "masks")
    assert len(before) == 7  # six masks and classes.json
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["problems"].keys() == {"bad"}

    skipped = segment(*flags, "--skip-broken")
    assert skipped.status == 0 and "no mask of bad" in skipped.out

    # A broken image that has been replaced gets its mask, without another training.
    Image.fromarray(picture(8)).save(photos / "bad.jpg")
    mended = segment(*flags)
    assert mended.status == 0, mended.err
    assert "(1 new)" in mended.out
    after = all_files(tmp_path / "out" / "masks")
    assert after.keys() - before.keys() == {"bad.png"} and before.items() <= after.items()

    # Now it has a mask: another image in its place is refused as any other.
    Image.fromarray(picture(9)).save(photos / "bad.jpg")
    assert "1 changed, such as 'bad'" in segment(*flags).error


def test_an_image_without_a_mask_was_trained_on_all_the_same(model, segment, photos, monkeypatch):
    """What fails when the masks are made has its part in the training: it may not be replaced."""

    def fail(path: Path, *_: object) -> None:
        if path.stem == "2":
            raise ReclipError("image 2 fails")

    (model / "masks" / "2.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("reclip_d2.workspace.masks.check_shape", fail)
        assert "1 of 6 images have no mask" in segment().error
    content = (photos / "2.jpg").read_bytes()
    Image.fromarray(picture(20)).save(photos / "2.jpg")
    assert "1 changed, such as '2'" in segment().error
    (photos / "2.jpg").write_bytes(content)
    assert "(1 new)" in segment().out


def test_only_broken_images(segment, photos):
    for path in photos.rglob("*.*"):
        path.write_bytes(b"nothing")
    assert "no image can be used" in segment().error
    assert "6 of 6 images have no mask" in segment("--fast", output="other").error


# ---- other inputs in the same folder --------------------------------------------------------------------------


def test_other_inputs_are_refused(model, segment, photos, classes, tmp_path):
    before = all_files(tmp_path / "out")

    def refused(words: str, *arguments: object, **options: object) -> None:
        error = segment(*arguments, **options).error
        assert words in error and "--overwrite" in error
        assert all_files(tmp_path / "out") == before

    classes.write_text(CLASSES.replace("fire", "flames"))
    refused("other --classes (number 3 was fire and is flames)")
    classes.write_text(CLASSES + "sand\n")
    refused("other --classes (3 instead of 4)")
    classes.write_text(CLASSES.replace("snow", "ice"))
    refused("background names")
    classes.write_text(CLASSES)
    refused("--iterations 6 instead of 8 (rectified)", "--iterations", "8")
    refused("SOLVER.BASE_LR", keys=("SOLVER.BASE_LR", "0.02"))

    content = (photos / "2.jpg").read_bytes()
    Image.fromarray(picture(20)).save(photos / "2.jpg")
    refused("1 changed, such as '2'")
    (photos / "2.jpg").write_bytes(content)
    Image.fromarray(picture(21)).save(photos / "new.jpg")
    refused("1 new, such as 'new'")
    (photos / "new.jpg").unlink()
    (photos / "in" / "4.png").rename(tmp_path / "4.png")
    refused("1 missing, such as 'in/4'")
    (tmp_path / "4.png").rename(photos / "in" / "4.png")
    assert segment().status == 0


def test_before_anything_is_made_all_may_change(segment, classes, monkeypatch):
    """A run that was stopped to fix an argument resumes without --overwrite."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "make_hypotheses", interrupt)
        assert segment().status == 130
    classes.write_text("road\nsnow\n")
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", interrupt)
        assert segment().status == 130  # now there are hypotheses, of these classes
    assert segment("--iterations", "2", keys=("SOLVER.BASE_LR", "0.02")).status == 0
    assert "SOLVER.BASE_LR 0.02" in segment("--iterations", "2").error


def test_after_the_hypotheses_what_they_depend_on_is_fixed(segment, classes, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupt)
    assert segment().status == 130
    assert "HYPOTHESIS.WINDOW_RATIO 0.5 instead of 0.25" in segment(keys=("HYPOTHESIS.WINDOW_RATIO", "0.25")).error
    classes.write_text("road\nsnow\n")
    assert "other --classes" in segment().error


def test_overwrite(segment, classes, tmp_path):
    assert segment("--fast").status == 0
    assert segment("--fast", "--background", "keep").status == 0
    classes.write_text("sky\nwood\n")
    (tmp_path / "out" / "mine.txt").write_text("not ours")
    assert segment("--fast", "--overwrite").status == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "masks", "run", "reclip.json", "summary.json", "summary.html", "mine.txt", ".lock",
    }  # fmt: skip
    assert set(np.unique(read_mask(tmp_path / "out" / "masks" / "0.png"))) <= {0, 1}


@pytest.mark.parametrize("text", ["{", "null", '{"format": "reclip_d2 run 9"}'])
def test_overwrite_of_a_folder_whose_memory_cannot_be_read(segment, tmp_path, text):
    """What runs leave has known names; the rest is the user's."""
    out = tmp_path / "out"
    assert segment("--fast", "--formats", "overlay").status == 0
    assert segment("--fast", "--background", "keep", "--formats", "palette").status == 0
    (out / "mine.txt").write_text("not ours")
    (out / "reclip.json").write_text(text)
    error = segment("--fast").error
    assert "reclip.json is damaged" in error and "give --overwrite" in error
    assert segment("--fast", "--overwrite").status == 0
    assert {path.name for path in out.iterdir()} == {
        "masks",
        "run",
        "reclip.json",
        "summary.json",
        "summary.html",
        "mine.txt",
        ".lock",
    }


def test_a_folder_of_other_things_is_left_alone(segment, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        assert "contains other files" in segment("--fast", *flags).error
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_harmless_settings_may_change(segment):
    assert segment("--fast").status == 0
    assert segment("--fast", keys=("TEST.BAND_MEMORY", "1", "HYPOTHESIS.BATCH_SIZE", "7")).status == 0


def test_touched_and_moved_images_are_the_same(model, segment, photos, tmp_path):
    photos.rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*.*"):
        path.touch()
    result = segment(images=("moved",))
    assert result.status == 0 and "rectification: done before" in result.out


@pytest.mark.cuda
def test_a_run_on_a_gpu(segment, reclip, tmp_path):
    result = segment("--student", "--student-iterations", "2", "--background", "keep", "--device", "cuda",
                     "--formats", "scores")  # fmt: skip
    assert result.status == 0, result.err
    assert "device    cuda" in result.out
    assert {read_mask(tmp_path / "out" / "masks" / f"{name}.png").shape for name in MASKS} == set(SIZES.values())
    assert reclip("predict", "photos", "--model", "out", "--output", "more", "--use", "rectified").status == 0
