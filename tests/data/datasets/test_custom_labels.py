"""A user's labels as the data set ``custom_val``: registration, checks, and that training opens none."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.data.classes import class_names_of
from reclip_d2.data.datasets.custom import CUSTOM, register_custom
from reclip_d2.data.datasets.custom_labels import CUSTOM_VAL
from reclip_d2.data.images import read_geometry
from reclip_d2.engine import program
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_files import DatasetLabels, check_no_background
from reclip_d2.evaluation.label_maps import check_own_labels
from reclip_d2.evaluation.labelled_data import labelled_records
from tests.helpers import config_arguments, config_files


@pytest.fixture(autouse=True)
def forget_custom():
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in (CUSTOM, CUSTOM_VAL):
            if name in catalog.list():
                catalog.remove(name)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three photos of 96 x 64 px, two of them with a label; three classes and two background names."""
    rng = np.random.default_rng(0)
    for name in ("a", "street/b", "c"):
        write_photo(tmp_path, name, rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    for name in ("a", "street/b"):
        write_label(tmp_path, name, rng.integers(0, 3, (64, 96)))
    (tmp_path / "classes.txt").write_text("sky, heaven\nwood\nfire\nbackground: snow, wall\n")
    return tmp_path


def write_photo(folder: Path, name: str, pixels: np.ndarray, orientation: int = 1) -> None:
    path = folder / "photos" / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def write_label(folder: Path, name: str, ids: np.ndarray) -> Path:
    path = folder / "labels" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(ids).astype(np.uint8)).save(path)
    return path


def keys(folder: Path, *more: str) -> list[str]:
    return [
        "DATASETS.CUSTOM.IMAGES", str(folder / "photos"), "DATASETS.CUSTOM.CLASSES", str(folder / "classes.txt"),
        "DATASETS.CUSTOM.LABELS", str(folder / "labels"), *more,
    ]  # fmt: skip


def register(folder: Path, *more: str) -> list[dict]:
    register_custom(load_config(config_files("custom-reclip-embedded", "maskclip"), keys(folder, *more)))
    return DatasetCatalog.get(CUSTOM_VAL)


def problem(folder: Path) -> str:
    """What the check of all labels says."""
    with pytest.raises(ReclipError) as caught:
        register(folder)
        check_own_labels(CUSTOM_VAL)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is registered -------------------------------------------------------------------------------------------


def test_the_images_that_have_a_label(folder, caplog):
    write_label(folder, "nobody", np.zeros((3, 3)))
    with caplog.at_level(logging.INFO):
        records = register(folder)
    assert records == [
        {
            "file_name": str(folder / "photos" / f"{name}.jpg"),
            "image_id": f"{name}.jpg",
            "sem_seg_file_name": str(folder / "labels" / f"{name}.png"),
        }
        for name in ("a", "street/b")
    ]
    assert "1 images without a label are left out" in caplog.text
    assert "1 labels have no image, first nobody.png" in caplog.text
    assert [record["image_id"] for record in DatasetCatalog.get(CUSTOM)] == ["a.jpg", "c.jpg", "street/b.jpg"]
    assert all("sem_seg_file_name" not in record for record in DatasetCatalog.get(CUSTOM))


def test_classes_of_the_model_and_of_the_labels(folder):
    register(folder)
    assert class_names_of(CUSTOM_VAL) == class_names_of(CUSTOM) == [
        ["sky", "heaven"], ["wood"], ["fire"], ["snow"], ["wall"],
    ]  # fmt: skip
    labels = DatasetLabels(CUSTOM_VAL)
    assert labels.class_names == ["sky", "wood", "fire", "background"]
    assert labels.predicted_ids(np.array([[0, 2, 3, 4]])).tolist() == [[0, 2, 3, 3]]


def test_background_names_share_an_id(folder):
    register(folder)
    with pytest.raises(ReclipError, match="a label id for each class, but queries or background names of"):
        check_no_background(CUSTOM_VAL, "this report")
    with pytest.raises(ReclipError, match=r"LINEAR_PROBE\.DATASETS needs a label id for each class"):
        labelled_records([CUSTOM_VAL], class_names_of(CUSTOM_VAL))
    (folder / "classes.txt").write_text("sky\nwood\nfire\n")
    register(folder)
    check_no_background(CUSTOM_VAL, "this report")
    assert len(labelled_records([CUSTOM_VAL], class_names_of(CUSTOM_VAL))) == 2


def test_labels_below_the_images_are_no_images(folder):
    (folder / "labels").rename(folder / "photos" / "labels")
    records = register(folder, "DATASETS.CUSTOM.LABELS", str(folder / "photos" / "labels"))
    assert len(records) == 2
    assert all(record["file_name"].endswith(".jpg") for record in DatasetCatalog.get(CUSTOM))


def test_three_keys_are_enough(folder):
    cfg = load_config(config_files("custom-reclip-embedded", "reclippp_rectify"), keys(folder))
    register_custom(cfg)
    assert tuple(cfg.DATASETS.TEST) == (CUSTOM_VAL,) and tuple(cfg.DATASETS.TRAIN) == (CUSTOM,)
    cfg = load_config(
        config_files("custom-reclip-embedded", "reclippp_rectify"), keys(folder, "DATASETS.TEST", "('voc20_val',)")
    )
    register_custom(cfg)
    assert tuple(cfg.DATASETS.TEST) == ("voc20_val",)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["DATASETS.CUSTOM.LABELS", ""], "DATASETS.CUSTOM.LABELS is empty"),
        (["DATASETS.CUSTOM.LABELS", "/none"], "DATASETS.CUSTOM.LABELS /none is not a folder"),
        (["DATASETS.TRAIN", "('custom_val',)"], "custom_val in DATASETS.TRAIN has labels, which training never reads"),
        (["DATASETS.CUSTOM.CLASSES", ""], "DATASETS.CUSTOM.CLASSES is empty"),
    ],
)
def test_wrong_keys(folder, more, words):
    with pytest.raises(ReclipError, match=words.replace(".", r"\.")):
        register(folder, "DATASETS.TEST", "('custom_val',)", *more)


# ---- what is checked ----------------------------------------------------------------------------------------------


def test_good_labels(folder, caplog):
    write_label(folder, "a", np.full((64, 96), 3))  # background
    write_label(folder, "street/b", np.where(np.arange(96) < 50, 1, 255)[None].repeat(64, 0))
    register(folder)
    with caplog.at_level(logging.INFO):
        check_own_labels(CUSTOM_VAL)
    assert "custom_val: 2 labels; classes that occur: wood, background" in caplog.text


def test_sizes_and_ids(folder):
    path = write_label(folder, "a", np.zeros((64, 95)))
    assert f"label {path} has size 95x64, its image 96x64" in problem(folder)
    write_label(folder, "a", np.where(np.arange(96) < 50, 4, 255)[None].repeat(64, 0))
    assert f"label {path} has id 4, but the classes are 0 to 3 and 255 is ignored" in problem(folder)


def test_binary_masks(folder):
    for name in ("a", "street/b"):
        write_label(folder, name, np.where(np.arange(96) < 50, 0, 255)[None].repeat(64, 0))
    message = problem(folder)
    assert (
        "the labels of custom_val contain only 0 and 255: the class sky and ignored pixels, or they are bin" in message
    )


def test_labels_that_are_none(folder):
    path = folder / "labels" / "a.png"
    path.write_bytes(b"not a PNG")
    assert f"label {path} cannot be read" in problem(folder)
    path.unlink()
    os.mkfifo(path)
    assert f"label {path} is a named pipe" in problem(folder)


def test_no_label_at_all(folder):
    for path in (folder / "labels").rglob("*.png"):
        path.unlink()
    assert "no image of DATASETS.CUSTOM.IMAGES" in problem(folder)
    assert "the label of a.jpg is a.png" in problem(folder)


def test_palettes(folder):
    """Our own palette masks are valid labels; palettes in another order are not."""
    register(folder)
    ids = np.random.default_rng(1).integers(0, 3, (64, 96)).astype(np.uint8)
    colors = MetadataCatalog.get(CUSTOM_VAL).stuff_colors
    mask = Image.fromarray(ids)
    mask.putpalette([value for color in colors for value in color])
    mask.save(folder / "labels" / "a.png")
    check_own_labels(CUSTOM_VAL)
    mask.putpalette([value for color in colors[::-1] for value in color])
    mask.save(folder / "labels" / "a.png")
    assert "a.png is a palette image whose palette is not in the order of the ids" in problem(folder)


@pytest.mark.parametrize(("other", "turned"), [(None, False), ("stored", True), ("upright", False)])
def test_orientations(folder, caplog, other, turned):
    """Half a turn: the size does not tell. The other image's label does, and without one labels are upright."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    ids = np.zeros((64, 96), np.uint8)
    ids[:10] = 1
    write_photo(folder, "a", pixels, 3)
    write_label(folder, "a", ids)
    if other:
        write_photo(folder, "street/b", pixels, 6)
        write_label(folder, "street/b", ids if other == "stored" else ids.T)
    with caplog.at_level(logging.INFO):
        record = register(folder)[0]
    assert f"custom_val: {2 if other else 1} images have an EXIF orientation of 2 to 8" in caplog.text
    assert ("sem_seg_orientation" in record) == turned
    label = DatasetLabels(CUSTOM_VAL).read(record, read_geometry(record["file_name"]).upright)
    np.testing.assert_array_equal(label, ids[::-1, ::-1] if turned else ids)
    check_own_labels(CUSTOM_VAL)


# ---- train_net.py -------------------------------------------------------------------------------------------------


def run(folder: Path, method: str, *arguments: str):
    flags = [a for a in arguments if a.startswith("--")]
    more = [a for a in arguments if not a.startswith("--")]
    args = program.argument_parser().parse_args([
        *config_arguments("custom-reclip-embedded", method), *flags, *keys(folder), "OUTPUT_DIR", str(folder / "out"),
        "MODEL.DEVICE", "cpu", "MODEL.CLIP.TEMPLATES", "photo", "HYPOTHESIS.WINDOW_RATIO", "0.5",
        "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "1", "SOLVER.MAX_ITER", "2", *more,
    ])  # fmt: skip
    return program.main(args)


def test_training_opens_no_label(folder, capsys):
    """With labels that cannot be opened it trains to its end; the evaluation after it names one."""
    good = (folder / "labels" / "a.png").read_bytes()
    (folder / "labels" / "a.png").unlink()
    os.mkfifo(folder / "labels" / "a.png")
    with pytest.raises(SystemExit):
        run(folder, "reclippp_rectify")
    assert "a.png is a named pipe" in capsys.readouterr().err
    assert (folder / "out" / "model_final.pth").is_file()
    (folder / "labels" / "a.png").unlink()
    (folder / "labels" / "a.png").write_bytes(good)
    scores = run(folder, "reclippp_rectify", "--eval-only", "--resume")["sem_seg"]
    assert {"IoU-sky", "IoU-wood", "IoU-fire", "IoU-background"} <= set(scores) and np.isfinite(scores["mIoU"])
    assert "IoU-snow" not in scores


def test_maskclip_is_evaluated_by_three_keys(folder):
    scores = run(folder, "maskclip", "--eval-only", "TEST.BIAS.ENABLED", "True")
    assert 0 <= scores["sem_seg"]["mIoU"] <= 100
    assert {"score-sky", "score-background"} <= set(scores["class_preference"])
