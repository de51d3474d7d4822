"""``reclip predict``: further images with a trained model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reclip_d2.engine import program
from reclip_d2.evaluation.label_maps import LabelMapEvaluator
from reclip_d2.workspace.trained_model import TrainedModel
from tests.cli.conftest import FAST_KEYS, all_files, picture, read_mask


def test_predict(reclip, model, photos, tmp_path):
    # The images of the training get the masks of the training.
    same = reclip("predict", "photos", "--model", "out", "--output", "same", "--device", "cpu")
    assert same.status == 0, same.err
    assert all_files(tmp_path / "same" / "masks") == all_files(model / "masks")
    assert "ReCLIP++, rectified" in same.out

    # Others, and one more later: only that is made.
    more = tmp_path / "more photos"
    more.mkdir()
    Image.fromarray(picture(30, 50, 70)).save(more / "a.webp")
    call = ("predict", more, "--model", "out", "--output", "more", "--formats", "palette", "--device", "cpu")
    assert reclip(*call).status == 0
    assert read_mask(tmp_path / "more" / "masks" / "a.png").shape == (50, 70)
    assert (tmp_path / "more" / "palette" / "a.png").exists()
    Image.fromarray(picture(31)).save(more / "b.bmp")
    grown = reclip(*call)
    assert grown.status == 0 and "2 masks" in grown.out and "(1 new)" in grown.out

    # An image that was changed is noticed.
    Image.fromarray(picture(32)).save(more / "a.webp")
    assert "1 changed, such as 'a'" in reclip(*call).error
    assert reclip(*call, "--overwrite").status == 0
    assert read_mask(tmp_path / "more" / "masks" / "a.png").shape == (96, 96)


def test_use(reclip, segment, model, tmp_path):
    result = reclip("predict", "photos", "--model", "out", "--output", "clip", "--use", "maskclip", "--device", "cpu",
                    "--opts", "MODEL.CLIP.TEMPLATES", "photo")  # fmt: skip
    assert result.status == 0, result.err
    assert "MaskCLIP" in result.out
    assert segment("--fast", output="fast").status == 0
    assert all_files(tmp_path / "clip" / "masks") == all_files(tmp_path / "fast" / "masks")
    assert (
        "no finished model (student)"
        in reclip("predict", "photos", "--model", "out", "--output", "x", "--use", "student").error
    )


def test_student(reclip, segment, model, tmp_path):
    rectified = all_files(model / "masks")
    result = segment("--student", "--student-iterations", "3")
    assert result.status == 0, result.err
    for words in ("rectification: done before", "distillation ...", "6 masks by ReCLIP++, distilled student"):
        assert words in result.out
    assert all_files(model / "previous-rectified-ignore" / "masks") == rectified
    again = segment("--student", "--student-iterations", "3")
    assert "distillation: done before" in again.out and "(0 new)" in again.out
    # The last model is the student; it needs neither CLIP nor teacher.
    (model / "run" / "rectified" / "model_final.pth").unlink()
    more = reclip("predict", "photos", "--model", "out", "--output", "more", "--device", "cpu")
    assert more.status == 0, more.err
    assert all_files(tmp_path / "more" / "masks") == all_files(model / "masks")


def test_background(reclip, model, tmp_path):
    for choice, value in (("ignore", 255), ("keep", 3)):
        call = ("predict", "photos", "--model", "out", "--output", "bg", "--background", choice, "--device", "cpu")
        assert reclip(*call).status == 0
        masks = [read_mask(path) for path in sorted((tmp_path / "bg" / "masks").rglob("*.png"))]
        assert {value} == set(np.unique(np.concatenate([mask.ravel() for mask in masks]))) - {0, 1, 2}


def test_broken_images(reclip, model, photos):
    (photos / "bad.png").write_bytes(b"")
    call = ("predict", "photos", "--model", "out", "--output", "more", "--device", "cpu")
    assert "1 of 7 images have no mask" in reclip(*call).error
    assert reclip(*call, "--skip-broken").status == 0


def test_a_model_that_was_trained_anew_is_another(reclip, segment, model):
    call = ("predict", "photos", "--model", "out", "--output", "more", "--device", "cpu")
    assert reclip(*call).status == 0
    assert segment("--overwrite", keys=("SEED", "1")).status == 0
    assert "SEED 0 instead of 1" in reclip(*call).error
    assert reclip(*call, "--opts", "SEED", "0").error.count("was made with the checkpoint")
    assert reclip(*call, "--overwrite").status == 0


def test_masks_of_two_models_do_not_mix(reclip, segment, model, tmp_path):
    """A run that trains, and a prediction with the same settings by another folder's model."""
    shutil.copytree(model, tmp_path / "second")
    call = ("predict", "photos", "--model", "out", "--device", "cpu", "--output")
    assert reclip(*call, "more").status == 0
    masks = all_files(tmp_path / "more")
    for outcome in (reclip(*call, "second"), segment(output="more")):
        assert "was made with another trained model (rectified): give --overwrite" in outcome.error
    assert all_files(tmp_path / "more") == masks and all_files(tmp_path / "second") == all_files(model)
    # CLIP's own masks are the same, whoever makes them.
    assert segment("--fast", output="fast").status == 0
    again = reclip(*call, "fast", "--use", "maskclip", "--opts", *FAST_KEYS)
    assert again.status == 0 and "masks: done before" in again.out, again.err


def test_wrong_models(reclip, segment, tmp_path):
    for wrong in ("none", "photos", "classes.txt"):
        assert (
            "is neither an output folder of reclip segment"
            in reclip("predict", "photos", "--model", wrong, "--output", "x").error
        )
    assert segment("--fast").status == 0
    assert "is the model's folder" in reclip("predict", "photos", "--model", "out", "--output", "out").error
    assert not (tmp_path / "x").exists()
    assert reclip("predict", "photos", "--model", "out", "--output", "x", "--device", "cpu").status == 0  # MaskCLIP


def test_an_unfinished_training(reclip, segment, model):
    (model / "run" / "rectified" / "model_final.pth").unlink()
    error = reclip("predict", "photos", "--model", "out", "--output", "x").error
    assert "no finished model" in error and "run its reclip segment to the end" in error


def test_a_damaged_memory(reclip, segment, model):
    (model / "reclip.json").write_text("{")
    assert "reclip.json is damaged" in reclip("predict", "photos", "--model", "out", "--output", "x").error
    assert "reclip.json is damaged" in segment().error
    (model / "reclip.json").unlink()
    model.rename(model.parent / "no model")
    assert segment("--fast", output="fast").status == 0
    call = ("predict", "photos", "--model", "fast", "--output", "more", "--device", "cpu")
    assert reclip(*call).status == 0
    (model.parent / "more" / "reclip.json").write_text("{")
    assert "more/reclip.json is damaged" in reclip(*call).error
    assert reclip(*call, "--overwrite").status == 0


def test_a_damaged_checkpoint(reclip, model, tmp_path):
    (model / "run" / "rectified" / "model_final.pth").write_bytes(b"nothing")
    error = reclip("predict", "photos", "--model", "out", "--output", "x", "--device", "cpu").error
    assert "model_final.pth cannot be read as tensors" in error
    assert not list((tmp_path / "x" / "masks").glob("*.png"))


def test_the_model_s_own_folder_by_another_path(reclip, model, tmp_path):
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "far").symlink_to(tmp_path / "deep" / "er")
    before = all_files(model)
    for output in ("out", "./out", "photos/../out", "link", str(model), "link/../out", "far/../../out"):
        call = ("predict", "photos", "--model", "out", "--output", output, "--device", "cpu", "--overwrite")
        assert "is the model's folder" in reclip(*call).error, output
    (tmp_path / "reclip.json").write_text((model / "reclip.json").read_text())
    call = ("predict", "photos", "--model", "out", "--output", ".", "--device", "cpu", "--overwrite")
    assert "contains the model's folder" in reclip(*call).error
    assert all_files(model) == before


SLIDING = ("TEST.SLIDING_WINDOW.ENABLED", "True", "TEST.SLIDING_WINDOW.SIZE", "(48, 64)",
           "TEST.SLIDING_WINDOW.STRIDE", "(32, 40)")  # fmt: skip
TILES = ("INPUT.TILES.FROM_SIDE", "90", "INPUT.TILES.SIZE", "64")


@pytest.mark.parametrize(
    "keys",
    [(), ("INPUT.MIN_SIZE_TEST", "0"), SLIDING, TILES, (*SLIDING, *TILES)],
    ids=["whole", "own size", "sliding windows", "tiles", "sliding windows in tiles"],
)
def test_the_masks_are_what_train_net_evaluates(keys, reclip, model, photos, tmp_path, monkeypatch):
    """Pixel for pixel: photos with and without padding, above and below a tile, and one that the camera turned."""
    turned = Image.fromarray(picture(7, 60, 110))
    exif = turned.getexif()
    exif[0x0112] = 6  # shown as 110 x 60
    turned.save(photos / "turned.jpg", quality=95, exif=exif)
    call = ("predict", "photos", "--model", "out", "--output", "more", "--device", "cpu", "--background", "keep")
    result = reclip(*call, "--opts", *keys)
    assert result.status == 0, result.err

    masks = {
        path.relative_to(tmp_path / "more/masks"): read_mask(path) for path in tmp_path.glob("more/masks/**/*.png")
    }
    assert len(masks) == 7 and masks[Path("turned.png")].shape == (110, 60)
    for name, mask in masks.items():  # labels to evaluate with, of the right size
        (tmp_path / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.arange(mask.size).reshape(mask.shape).astype(np.uint8) % 3).save(tmp_path / "labels" / name)
    trained = TrainedModel.find("out", None, None)
    (tmp_path / "config.yaml").write_text(trained.config(["MODEL.DEVICE", "cpu", *keys]).dump())
    seen = {}

    def process(self, inputs, outputs):
        for record, output in zip(inputs, outputs, strict=True):
            seen[Path(record["file_name"]).relative_to(photos).with_suffix(".png")] = output["sem_seg"].numpy()
        original(self, inputs, outputs)

    original = LabelMapEvaluator.process
    monkeypatch.setattr(LabelMapEvaluator, "process", process)
    overrides = {
        "MODEL.WEIGHTS": trained.weights, "OUTPUT_DIR": tmp_path / "evaluation", "DATASETS.TEST": "('custom_val',)",
        "DATASETS.CUSTOM.IMAGES": photos, "DATASETS.CUSTOM.CLASSES": tmp_path / "classes.txt",
        "DATASETS.CUSTOM.LABELS": tmp_path / "labels",
    }  # fmt: skip
    pairs = [str(part) for pair in overrides.items() for part in pair]
    arguments = ["--config-file", str(tmp_path / "config.yaml"), "--eval-only", *pairs]
    scores = program.main(program.argument_parser().parse_args(arguments))
    assert 0 <= scores["sem_seg"]["mIoU"] <= 100
    assert seen.keys() == masks.keys()
    background = 3  # road and snow, the last two of the model's classes
    for name, labels in seen.items():
        np.testing.assert_array_equal(np.minimum(labels, background), masks[name], err_msg=str(name))
