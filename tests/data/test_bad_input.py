"""Users' mistakes, and the programs' errors: one line that names the file or key, exit status 1.

Single functions have tests of their own; here the programs run, on a data set of a few small files.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from reclip_d2.backbones.dense import DenseCLIP
from reclip_d2.layers import _extension
from reclip_d2.modeling.meta_arch.maskclip import MaskCLIP
from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP
from tests.data.tiff_writer import BLACK_IS_ZERO, tiff_bytes
from tests.datasets_prep.miniatures import make_ade150
from tests.helpers import tiny_clip
from tests.test_train_net import EVALUATE, NAMES, metrics, mistake, run, scene

__all__ = ["scene"]

SHORT = ("SOLVER.MAX_ITER", "1")


def label_files(scene: Path) -> list[Path]:
    return sorted((scene / "val" / "annotations_detectron2").iterdir())


def save(array: np.ndarray, path: Path, **options: object) -> None:
    Image.fromarray(array).save(path, **options)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


# ---- labels ---------------------------------------------------------------------------------------------------


def test_binary_masks(scene, capfd):
    for path in label_files(scene):
        save(np.where(read(path) > 1, 255, 0).astype(np.uint8), path)
    line = mistake(capfd, scene, *EVALUATE)
    assert "contain only 0 and 255: the class sky and ignored pixels, or they are binary masks" in line


def test_ids_out_of_range(scene, capfd):
    path = label_files(scene)[1]
    save(np.full((36, 44), 77, np.uint8), path)
    line = mistake(capfd, scene, *EVALUATE)
    assert f"label {path} has id 77, but the classes are 0 to 3" in line


def test_ids_that_begin_at_1(scene, capfd):
    """0 is background, and the classes follow."""
    for path in label_files(scene):
        label = read(path) + 1
        label[:4] = 0
        save(label, path)
    line = mistake(capfd, scene, *EVALUATE)
    assert "has id 4, but the classes are 0 to 3" in line and "if its ids begin at 1, subtract 1" in line


def test_label_in_colours(scene, capfd):
    path = label_files(scene)[0]
    save(np.zeros((36, 44, 3), np.uint8), path)
    line = mistake(capfd, scene, *EVALUATE)
    assert f"label {path} is a RGB image: write a single-channel PNG of class ids" in line


def save_with_palette(path, palette):
    image = Image.fromarray(read(path), mode="P")
    image.putpalette(palette)
    image.save(path)


def test_palette_labels_in_the_order_of_the_ids(scene):
    expected = run(scene, "out", *EVALUATE)["sem_seg"]
    for path in label_files(scene):
        save_with_palette(path, [value for index in range(256) for value in (index, index, index)])
    assert run(scene, "out", *EVALUATE)["sem_seg"] == expected


def test_palette_labels_of_unknown_colours(scene, capfd):
    path = label_files(scene)[0]
    save_with_palette(path, [value for index in range(256) for value in (255 - index, index, 7 * index % 256)])
    line = mistake(capfd, scene, *EVALUATE)
    assert f"label {path} is a palette image whose palette is not in the order of the ids" in line


def test_label_of_another_size(scene, capfd):
    path = label_files(scene)[2]
    save(read(path)[:, :-1], path)
    line = mistake(capfd, scene, *EVALUATE)
    assert f"label {path} has size 43x36, its image 44x36: they must be the same" in line


def test_truncated_label(scene, capfd):
    path = label_files(scene)[2]
    path.write_bytes(path.read_bytes()[:60])
    assert f"label {path} cannot be read" in mistake(capfd, scene, *EVALUATE)


# ---- images ---------------------------------------------------------------------------------------------------


def rotate(path: Path, orientation: int = 6) -> None:
    """Store an image with an EXIF orientation; upright it is as before (6: stored a quarter turn anticlockwise)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(np.rot90(read(path)), path, exif=exif, quality=95)


def test_exif_rotation_is_one_for_image_and_label(scene, capfd):
    expected = run(scene, "out", *EVALUATE)["sem_seg"]
    for path in (scene / "val" / "images").iterdir():
        rotate(path)
    for record in DatasetCatalog.get("reclip_test_val"):
        assert (record["height"], record["width"]) == (36, 44)  # upright
    turned = run(scene, "out", *EVALUATE)["sem_seg"]
    assert turned["mIoU"] == pytest.approx(expected["mIoU"], abs=3)  # a JPEG was stored twice
    capfd.readouterr()
    path = label_files(scene)[0]
    save(np.ascontiguousarray(np.rot90(read(path))), path)  # drawn on the stored pixels
    assert f"label {path} has size 36x44, its image 44x36" in mistake(capfd, scene, *EVALUATE)


def test_all_kinds_of_images_train_and_evaluate(scene, datasets):
    """Grey, alpha, 16-bit, CMYK and palette, as one data set."""
    folder, source = scene / "kinds", read(scene / "train" / "images" / "000.jpg")
    folder.mkdir()
    image = Image.fromarray(source)
    grey = np.asarray(image.convert("L"))
    files = {
        "grey.jpg": image.convert("L"),
        "grey.png": image.convert("L"),
        "alpha.png": Image.fromarray(np.dstack([source, np.full(source.shape[:2], 9, np.uint8)])),
        "grey_alpha.png": image.convert("LA"),
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "deep.tif": Image.fromarray(grey.astype(np.uint16) * 257),
        "cmyk.jpg": image.convert("CMYK"),
        "cmyk.tif": image.convert("CMYK"),
        "palette.png": image.quantize(64),
        "bits.png": image.convert("1"),
    }
    records = []
    for name, content in files.items():
        content.save(folder / name)
        label = folder / f"{name}.label.png"
        save(read(scene / "train" / "annotations_detectron2" / "000.png"), label)
        records.append({"file_name": str(folder / name), "image_id": name, "sem_seg_file_name": str(label)})
    datasets("reclip_test_kinds", records, NAMES)
    keys = ["DATASETS.TRAIN", "('reclip_test_kinds',)", "DATASETS.TEST", "('reclip_test_kinds',)"]
    run(scene, "out", *keys, "TEST.EVAL_PERIOD", "6")
    assert 0 < metrics(scene, "out")["total_loss"] < 20 and 0 <= metrics(scene, "out")["sem_seg/mIoU"] <= 100
    log = (scene / "out" / "log.txt").read_text()
    assert "10 training images" in log
    line = "reclip_test_kinds: 2 images have an alpha channel: transparent regions are read as white"
    assert log.count(line) == 1


def test_images_of_a_kind_that_is_not_read(scene, capfd, datasets):
    (scene / "float.tif").write_bytes(tiff_bytes(np.ones((32, 40)), BLACK_IS_ZERO))
    datasets("reclip_test_float", [{"file_name": str(scene / "float.tif")}], NAMES)
    line = mistake(capfd, scene, "DATASETS.TRAIN", "('reclip_test_float',)")
    assert f"image {scene}/float.tif is a TIFF with 1 band of 64-bit floating-point samples" in line


@pytest.mark.parametrize("content", ["none", "heic"])
def test_folder_without_images(scene, capfd, datasets_root, content):
    make_ade150(datasets_root)
    folder = datasets_root / "ADEChallengeData2016/images/training"
    for path in list(folder.iterdir()):
        path.unlink() if content == "none" else path.rename(path.with_suffix(".heic"))
    line = mistake(capfd, scene, "DATASETS.TRAIN", "('ade150_train',)", "DATASETS.TEST", "()")
    found = ", only .heic" if content == "heic" else ""
    assert f"folder {folder} has no .jpg files{found}: put ade150 there, see datasets/README.md" in line


# ---- weights --------------------------------------------------------------------------------------------------


def test_checkpoint_of_another_clip(scene, capfd):
    run(scene, "good", *SHORT)
    torch.save(tiny_clip(seed=9).state_dict(), scene / "clip.pt")
    capfd.readouterr()
    checkpoint = ("MODEL.WEIGHTS", str(scene / "good" / "model_final.pth"))
    other = ("MODEL.CLIP.PRETRAINED", str(scene / "clip.pt"))
    for flags in (("--eval-only",), ()):
        line = mistake(capfd, scene, *flags, *checkpoint, *other)
        assert "model_final.pth is of another fingerprint: " in line
    shipped = ("MODEL.CLIP.PRETRAINED", "embedded")
    line = mistake(capfd, scene, "--eval-only", *checkpoint, "MODEL.CLIP.NAME", "reclip-embedded", *shipped)
    assert "model_final.pth is of another clip: reclip-test-tiny instead of reclip-embedded" in line


def test_quick_gelu(scene, capfd):
    keys = ("MODEL.CLIP.NAME", "ViT-B-16", "MODEL.CLIP.PRETRAINED", "openai")
    for flags in (EVALUATE, ()):
        line = mistake(capfd, scene, *flags, *keys)
        assert "'openai' need QuickGELU: set MODEL.CLIP.NAME to ViT-B-16-quickgelu instead of ViT-B-16" in line


def test_hub_that_cannot_be_reached(scene, capfd):
    keys = ("MODEL.CLIP.NAME", "ViT-B-16-quickgelu", "MODEL.CLIP.PRETRAINED", "openai")
    for flags in (EVALUATE, ()):
        line = mistake(capfd, scene, *flags, *keys)
        assert "'openai' of ViT-B-16-quickgelu are not on this machine, and their server cannot be reached" in line
        assert "ViT-B-16.pt" in line and "set MODEL.CLIP.PRETRAINED to its path" in line


def test_clip_without_a_value_path(scene, capfd):
    line = mistake(capfd, scene, *EVALUATE, "MODEL.CLIP.NAME", "RN50")
    assert "MODEL.CLIP.NAME 'RN50' is not supported: " in line and "a ResNet" in line


# ---- hypotheses -----------------------------------------------------------------------------------------------


def make_hypotheses(scene: Path, capfd) -> Path:
    """A hypothesis file of the scene's config."""
    run(scene, "good", *SHORT, "HYPOTHESIS.FILE", str(scene / "h.jsonl"))
    capfd.readouterr()
    return scene / "h.jsonl"


def test_hypotheses_of_another_vocabulary(scene, capfd, datasets):
    hypotheses = make_hypotheses(scene, capfd)
    datasets("reclip_test_names", DatasetCatalog.get("reclip_test_train"), ["sky", "tall tree", "sea", "brick wall"])
    header, *lines = hypotheses.read_text().splitlines()
    renamed = {**json.loads(header), "dataset": "reclip_test_names"}
    hypotheses.write_text("\n".join([json.dumps(renamed), *lines]))
    keys = ("DATASETS.TRAIN", "('reclip_test_names',)", "DATASETS.TEST", "()")
    line = mistake(capfd, scene, *keys, "HYPOTHESIS.FILE", str(hypotheses))
    assert f"{hypotheses} was made with another class_names" in line and "'water'" in line and "'sea'" in line


def test_hypotheses_of_another_data_set(scene, capfd, datasets):
    hypotheses = make_hypotheses(scene, capfd)
    datasets("reclip_test_copy", DatasetCatalog.get("reclip_test_train"), NAMES)
    keys = ("DATASETS.TRAIN", "('reclip_test_copy',)", "HYPOTHESIS.FILE", str(hypotheses))
    line = mistake(capfd, scene, *keys)
    assert f"{hypotheses} was made with another dataset reclip_test_train instead of reclip_test_copy" in line


def test_hypotheses_that_lack_an_image(scene, capfd):
    hypotheses = make_hypotheses(scene, capfd)
    lines = hypotheses.read_text().splitlines()
    missing = json.loads(lines.pop(3))["image_id"]
    hypotheses.write_text("\n".join(lines))
    line = mistake(capfd, scene, "HYPOTHESIS.FILE", str(hypotheses))
    assert f"has no line for image '{missing}' of reclip_test_train: remove the file" in line


def test_damaged_hypotheses(scene, capfd):
    hypotheses = make_hypotheses(scene, capfd)
    hypotheses.write_text(hypotheses.read_text()[:-20])
    assert f"{hypotheses} is damaged" in mistake(capfd, scene, "HYPOTHESIS.FILE", str(hypotheses))


# ---- output, memory, extension --------------------------------------------------------------------------------


def test_output_that_exists(scene, capfd):
    run(scene, "out", *SHORT)
    before = {path.name: path.read_bytes() for path in (scene / "out").glob("*.pth")}
    capfd.readouterr()
    line = mistake(capfd, scene, *SHORT)
    assert f"{scene}/out holds a trained run: add --resume, --overwrite, or another OUTPUT_DIR" in line
    assert {path.name: path.read_bytes() for path in (scene / "out").glob("*.pth")} == before
    run(scene, "out", "--overwrite", *SHORT, "SEED", "5")
    assert (scene / "out" / "model_final.pth").read_bytes() != before["model_final.pth"]


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


def memory_line(scene: Path, capfd, *arguments: str) -> str:
    line = mistake(capfd, scene, *arguments)
    assert line.startswith("error: out of GPU memory (tried to allocate 2.00 GiB): ")
    log = scene / "out" / "log.txt"
    assert not log.exists() or "Traceback" not in log.read_text()
    return line


def test_out_of_memory_in_training(scene, capfd, monkeypatch):
    monkeypatch.setattr(RectifiedCLIP, "losses", out_of_memory)
    assert "lower SOLVER.IMS_PER_BATCH or INPUT.CROP.SIZE" in memory_line(scene, capfd)


def test_out_of_memory_in_hypotheses(scene, capfd, monkeypatch):
    monkeypatch.setattr(DenseCLIP, "global_features", out_of_memory)
    assert memory_line(scene, capfd).endswith("lower HYPOTHESIS.BATCH_SIZE")


def test_out_of_memory_in_evaluation(scene, capfd, monkeypatch):
    monkeypatch.setattr(MaskCLIP, "mask_logits", out_of_memory)
    assert "set TEST.SLIDING_WINDOW.ENABLED True" in memory_line(scene, capfd, *EVALUATE)


def test_out_of_memory_in_an_evaluation_within_training(scene, capfd, monkeypatch):
    monkeypatch.setattr(RectifiedCLIP, "mask_logits", out_of_memory)
    line = memory_line(scene, capfd, "TEST.EVAL_PERIOD", "1")
    assert "TEST.SLIDING_WINDOW" in line and "IMS_PER_BATCH" not in line


def test_missing_extension(scene, monkeypatch):
    """Falls back to plain PyTorch, with one line in the log that says how to build the extension."""
    monkeypatch.setattr(_extension, "_problem", "is not built")
    monkeypatch.setattr(_extension, "_served", frozenset())
    _extension._warn_once.cache_clear()
    run(scene, "out", *SHORT)
    _extension._warn_once.cache_clear()
    log = (scene / "out" / "log.txt").read_text()
    assert log.count("The extension reclip_d2._C is not built; falling back to plain PyTorch: build it with") == 1
    assert (scene / "out" / "model_final.pth").is_file()
