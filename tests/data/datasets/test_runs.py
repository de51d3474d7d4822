"""A miniature of each data set, from the archive's layout to the mIoU, through ``train_net.py`` with its configs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reclip_d2.engine import program, trainer
from tests.datasets_prep.miniatures import (
    Case,
    expected_27,
    load_program,
    make_ade150,
    make_cityscapes19,
    make_coco_stuff,
    make_context59,
    make_voc20,
    write_image,
    write_list,
    write_png,
)
from tests.helpers import config_arguments, register_tiny_model


def make_voc20_with_all_classes(root: Path) -> list[Case]:
    """Five further images of val, with four classes each: so all 20 occur, and the mean is over 20."""
    cases, base = [*make_voc20(root)], root / "VOCdevkit/VOC2012"
    for index in range(5):
        ids = [[4 * index + 1, 4 * index + 2], [4 * index + 3, 4 * index + 4]]
        case = Case(f"2008_{index:06d}", (21, 30 + index), ids, [[i - 1 for i in row] for row in ids])
        write_image(base / "JPEGImages" / f"{case.name}.jpg", case)
        write_png(base / "SegmentationClass" / f"{case.name}.png", case.shipped_label(), palette=True)
        cases.append(case)
    write_list(base / "ImageSets/Segmentation/val.txt", [case.name for case in cases])
    return cases


# Data set: maker, preparation program, where labels lie (shipped and prepared), images of train, classes that occur.
RUNS: dict[str, tuple[Callable[[Path], list[Case]], str, tuple[str, ...], int, int]] = {
    "voc20": (
        make_voc20_with_all_classes,
        "voc20",
        ("VOCdevkit/VOC2012/SegmentationClass", "VOCdevkit/VOC2012/annotations_detectron2"),
        4,
        20,
    ),
    "context59": (
        make_context59,
        "context59",
        ("VOC2010/trainval_merged.json", "VOC2010/annotations_detectron2"),
        3,
        5,
    ),
    "ade150": (
        make_ade150,
        "ade150",
        ("ADEChallengeData2016/annotations", "ADEChallengeData2016/annotations_detectron2"),
        3,
        9,
    ),
    "cityscapes19": (
        make_cityscapes19,
        "cityscapes19",
        ("cityscapes/gtFine", "cityscapes/annotations_detectron2"),
        3,
        8,
    ),
    "coco_stuff27": (make_coco_stuff, "coco_stuff", ("coco/stuffthingmaps", "coco/annotations_detectron2"), 3, 6),
}


def run(tmp_path: Path, dataset: str, method: str, *arguments: str) -> dict | None:
    """``train_net.py`` with the configs of a data set and a method, a tiny CLIP and tiny images."""
    flags = [argument for argument in arguments if argument.startswith("--")]
    keys = [argument for argument in arguments if not argument.startswith("--")]
    tiny = {
        "MODEL.CLIP.NAME": register_tiny_model(tmp_path),
        "MODEL.CLIP.PRETRAINED": "random",
        "MODEL.CLIP.TEMPLATES": "photo",
        "MODEL.BIAS_HEAD.PROMPT_LENGTH": "4",
        "MODEL.DEVICE": "cpu",
        "HYPOTHESIS.WINDOW_RATIO": "0.5",
        "INPUT.MIN_SIZE_TRAIN": "(24,)",
        "INPUT.MIN_SIZE_TEST": "24",
        "INPUT.CROP.SIZE": "[24, 24]",
        "SOLVER.IMS_PER_BATCH": "2",
        "SOLVER.MAX_ITER": "3",
        "DATALOADER.NUM_WORKERS": "0",
        "OUTPUT_DIR": str(tmp_path / "out"),
    }
    pairs = [part for pair in tiny.items() for part in pair]
    files = config_arguments(dataset, method)
    return program.main(program.argument_parser().parse_args([*files, *flags, *pairs, *keys]))


def miou_by_hand(labels: list[np.ndarray], predictions: list[np.ndarray], classes: int) -> tuple[float, int]:
    """Mean over the classes that occur of |label and prediction| / |label or prediction| in labelled pixels, in per
    cent, and how many occur."""
    ious = []
    for index in range(classes):
        intersection = union = occurs = 0
        for label, prediction in zip(labels, predictions, strict=True):
            seen = label != 255
            occurs += (label == index).sum()
            intersection += ((label == index) & (prediction == index)).sum()
            union += (((label == index) | (prediction == index)) & seen).sum()
        if occurs:
            ious.append(intersection / union)
    return 100 * float(np.mean(ious)), len(ious)


@pytest.fixture
def predictions(monkeypatch) -> list[np.ndarray]:
    """Label maps that the evaluator gets, in the order of the data set."""
    seen: list[np.ndarray] = []
    process = trainer.LabelMapEvaluator.process

    def recording(self, inputs, outputs):
        seen.extend(output["sem_seg"].numpy() for output in outputs)
        process(self, inputs, outputs)

    monkeypatch.setattr(trainer.LabelMapEvaluator, "process", recording)
    return seen


@pytest.mark.parametrize("name", RUNS)
def test_from_the_archive_to_a_number(name, tmp_path, datasets_root, predictions):
    make, program, label_paths, train_images, occurring = RUNS[name]
    cases = make(datasets_root)
    load_program(program).main(["--workers", "1"])
    labels = [case.expected_label() for case in cases]
    if name == "coco_stuff27":
        labels = [expected_27(label) for label in labels]

    # Training finds no label, neither as shipped nor prepared.
    for path in label_paths:
        (datasets_root / path).rename(tmp_path / Path(path).name)
    run(tmp_path, name, "reclippp_rectify", "DATASETS.TEST", "()")
    assert (tmp_path / "out" / "model_final.pth").is_file()
    assert f"{train_images} training images" in (tmp_path / "out" / "log.txt").read_text()
    for path in label_paths:
        (tmp_path / Path(path).name).rename(datasets_root / path)

    for config, flags in (("reclippp_rectify", ["--eval-only", "--resume"]), ("maskclip", ["--eval-only"])):
        predictions.clear()
        result = run(tmp_path, name, config, *flags)["sem_seg"]
        assert [prediction.shape for prediction in predictions] == [case.size for case in cases]
        miou, count = miou_by_hand(labels, predictions, len([key for key in result if key.startswith("IoU-")]))
        assert count == occurring
        assert result["mIoU"] == pytest.approx(miou)


def test_missing_data_set(tmp_path, datasets_root, capfd):
    with pytest.raises(SystemExit):
        run(tmp_path, "voc20", "maskclip", "--eval-only")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert f"{datasets_root}/VOC2012/JPEGImages does not exist" in lines[0] and "prepare_voc20.py" in lines[0]
