"""A miniature of VOC from its archive's layout to a number, through ``train_net.py`` with the data set's own config."""

from pathlib import Path

import numpy as np
import pytest

import train_net
from tests.datasets_prep.miniatures import ROOT, Case, load_program, make_voc20, write_image, write_list, write_png
from tests.helpers import register_tiny_model
from tests.test_train_net import fresh_logging

__all__ = ["fresh_logging"]


def run(tmp_path, config: str, *arguments: str) -> dict | None:
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
    config_file = str(ROOT / "configs" / "voc20" / config)
    return train_net.main(train_net.argument_parser().parse_args(["--config-file", config_file, *flags, *pairs, *keys]))


def miou_by_hand(labels: list[np.ndarray], predictions: list[np.ndarray], classes: int) -> float:
    """Mean over the classes of |label and prediction| / |label or prediction| in labelled pixels, in per cent."""
    ious = []
    for index in range(classes):
        intersection = union = 0
        for label, prediction in zip(labels, predictions, strict=True):
            seen = label != 255
            intersection += ((label == index) & (prediction == index)).sum()
            union += (((label == index) | (prediction == index)) & seen).sum()
        ious.append(intersection / union)
    return 100 * float(np.mean(ious))


def add_all_classes(base: Path, cases: list[Case]) -> list[Case]:
    """Five further images of val, with four classes each: so all 20 occur, and the mean is over 20."""
    more = []
    for index in range(5):
        ids = [[4 * index + 1, 4 * index + 2], [4 * index + 3, 4 * index + 4]]
        more.append(Case(f"2008_{index:06d}", (21, 30 + index), ids, [[i - 1 for i in row] for row in ids]))
        write_image(base / "JPEGImages" / f"{more[-1].name}.jpg", more[-1])
        write_png(base / "SegmentationClass" / f"{more[-1].name}.png", more[-1].shipped_label(), palette=True)
    write_list(base / "ImageSets/Segmentation/val.txt", [case.name for case in [*cases, *more]])
    return [*cases, *more]


def test_from_the_archive_to_a_number(tmp_path, datasets_root, monkeypatch):
    cases = add_all_classes(datasets_root / "VOCdevkit/VOC2012", make_voc20(datasets_root))
    # No label is prepared yet, and those that the archive holds are gone: training asks for none.
    shipped = datasets_root / "VOCdevkit/VOC2012/SegmentationClass"
    shipped.rename(tmp_path / "labels")
    run(tmp_path, "reclippp_rectify.yaml", "DATASETS.TEST", "()")
    assert (tmp_path / "out" / "model_final.pth").is_file()
    (tmp_path / "labels").rename(shipped)
    load_program("voc20").main(["--workers", "1"])

    predictions = []
    process = train_net.LabelMapEvaluator.process

    def recording(self, inputs, outputs):
        predictions.extend(output["sem_seg"].numpy() for output in outputs)
        process(self, inputs, outputs)

    monkeypatch.setattr(train_net.LabelMapEvaluator, "process", recording)
    labels = [case.expected_label() for case in cases]
    for config, flags in (("reclippp_rectify.yaml", ["--eval-only", "--resume"]), ("maskclip.yaml", ["--eval-only"])):
        predictions.clear()
        result = run(tmp_path, config, *flags)["sem_seg"]
        assert [prediction.shape for prediction in predictions] == [case.size for case in cases]
        assert result["mIoU"] == pytest.approx(miou_by_hand(labels, predictions, 20))


def test_missing_data_set(tmp_path, datasets_root, capfd):
    with pytest.raises(SystemExit):
        run(tmp_path, "maskclip.yaml", "--eval-only")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert f"{datasets_root}/VOC2012/JPEGImages does not exist" in lines[0] and "prepare_voc20.py" in lines[0]
