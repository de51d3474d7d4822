"""The evaluator on label maps against a confusion matrix by hand, and the checks of label files."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.evaluation import print_csv_format
from PIL import Image

from reclip_d2.data.index_images import Palette, pascal_color
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_files import read_label_file
from reclip_d2.evaluation.label_maps import LabelMapEvaluator

TRUTH = [np.array([[0, 0, 1, 255], [1, 1, 2, 255]], np.uint8), np.array([[2, 2, 0, 0], [2, 0, 0, 0]], np.uint8)]
PREDICTION = [np.array([[0, 1, 1, 0], [1, 1, 2, 3]]), np.array([[2, 0, 0, 0], [2, 0, 3, 0]])]


def iou_by_hand(num_classes: int) -> list[float]:
    """IoU of each class that occurs in the truth, pixel by pixel; NaN for the others."""
    values = []
    for k in range(num_classes):
        both = either = occurs = 0
        for truth, prediction in zip(TRUTH, PREDICTION, strict=True):
            for t, p in zip(truth.ravel(), prediction.ravel(), strict=True):
                if t == 255:
                    continue
                occurs += t == k
                both += t == k and p == k
                either += t == k or p == k
        values.append(100 * both / either if occurs else float("nan"))
    return values


@pytest.fixture
def records(tmp_path, datasets) -> list[dict]:
    records = []
    for index, truth in enumerate(TRUTH):
        label = tmp_path / f"{index}.png"
        Image.fromarray(truth).save(label)
        records.append({"file_name": f"{index}.jpg", "sem_seg_file_name": str(label)})
    datasets("reclip_test_labels", records, ["a", "b", "c", "d"])
    return records


def evaluate(records, outputs) -> dict:
    evaluator = LabelMapEvaluator("reclip_test_labels", distributed=False, output_dir=None)
    evaluator.reset()
    for record, output in zip(records, outputs, strict=True):
        evaluator.process([record], [{"sem_seg": output}])
    return evaluator.evaluate()["sem_seg"]


def test_numbers_by_hand_for_label_maps_and_logits_alike(records):
    maps = [torch.from_numpy(prediction) for prediction in PREDICTION]
    logits = [F.one_hot(labels, 4).permute(2, 0, 1).float() for labels in maps]
    by_hand = iou_by_hand(4)
    for outputs in (maps, logits):
        result = evaluate(records, outputs)
        ious = [result[f"IoU-{name}"] for name in "abcd"]
        np.testing.assert_allclose(ious, by_hand, rtol=1e-12)
        # Class d is predicted but not in the truth: it is not in the mean.
        assert result["mIoU"] == pytest.approx(np.nanmean(by_hand)) and np.isnan(by_hand).tolist() == [False] * 3 + [
            True
        ]
        assert result["pACC"] == pytest.approx(100 * 11 / 14)


def test_the_log_has_our_mean_alone(records, caplog):
    """Detectron2 0.5 counts class d, which is only predicted, and would log a lower mean next to ours."""
    with caplog.at_level(logging.DEBUG):
        result = evaluate(records, [torch.from_numpy(prediction) for prediction in PREDICTION])
        print_csv_format({"sem_seg": result})
    lines = [record.getMessage() for record in caplog.records]
    assert sum("mIoU" in line for line in lines) == 1 and any(f"{result['mIoU']:.4f}," in line for line in lines)
    by_class = ", ".join(f"{name} {value:.2f}" for name, value in zip("abcd", iou_by_hand(4), strict=True))
    assert f"reclip_test_labels: IoU per class: {by_class}" in lines
    detectron2_0_5 = np.nansum(iou_by_hand(4)) / 4
    assert not any(f"{detectron2_0_5:.2f}" in line for line in lines)


def test_perfect_prediction(records):
    result = evaluate(records, [torch.from_numpy(np.where(t == 255, 0, t).astype(np.int64)) for t in TRUTH])
    assert result["mIoU"] == pytest.approx(100) and np.isnan(result["IoU-d"])


def test_several_images_in_a_batch(records):
    evaluator = LabelMapEvaluator("reclip_test_labels", distributed=True, output_dir=None)
    evaluator.reset()
    evaluator.process(records, [{"sem_seg": torch.from_numpy(prediction)} for prediction in PREDICTION])
    assert evaluator.evaluate()["sem_seg"]["pACC"] == pytest.approx(100 * 11 / 14)


def test_a_label_of_another_size_is_refused(records):
    with pytest.raises(ReclipError, match="0.png has size 4x2, its image 5x3"):
        evaluate(records[:1], [torch.zeros(3, 5, dtype=torch.int64)])


def test_labels_without_a_class_are_refused(records):
    for record, truth in zip(records, TRUTH, strict=True):
        Image.fromarray(np.full_like(truth, 255)).save(record["sem_seg_file_name"])
    with pytest.raises(ReclipError, match="labels of reclip_test_labels contain no class, only ignored pixels"):
        evaluate(records, map(torch.from_numpy, PREDICTION))


ZERO_AND_IGNORED = np.array([[0, 255], [255, 0]], np.uint8)


def binary_records(tmp_path, datasets, **metadata) -> list[dict]:
    records = []
    for index in range(2):
        label = tmp_path / f"binary_{index}.png"
        Image.fromarray(ZERO_AND_IGNORED).save(label)
        records.append({"file_name": f"{index}.jpg", "sem_seg_file_name": str(label)})
    datasets("reclip_test_labels", records, ["ground", "object"], **metadata)
    return records


def test_binary_masks_are_refused(tmp_path, datasets):
    """Each file alone could be "class 0 and ignored"; a whole unprepared data set is not."""
    records = binary_records(tmp_path, datasets)
    with pytest.raises(ReclipError, match=r"only 0 and 255: the class ground and ignored pixels, or .* binary masks"):
        evaluate(records, [torch.zeros(2, 2, dtype=torch.int64)] * 2)


def test_a_prepared_subset_of_one_class(tmp_path, datasets, caplog):
    """Labels that a preparation program wrote are what they say: one class, and no word of binary masks."""
    records = binary_records(tmp_path, datasets, reclip_protocol="a data set of ours")
    result = evaluate(records, [torch.tensor([[0, 1], [1, 1]])] * 2)
    assert result["mIoU"] == result["IoU-ground"] == pytest.approx(50)
    assert "contain only 0 and 255: the class ground and ignored pixels; the mean IoU" in caplog.text
    assert "binary" not in caplog.text


def test_several_model_classes_of_one_label_id(tmp_path, datasets):
    """Background names: each is a class of the model, and all are one id of the labels."""
    label = tmp_path / "label.png"
    Image.fromarray(np.array([[0, 1, 2, 2, 2]], np.uint8)).save(label)
    records = [{"file_name": "a.jpg", "sem_seg_file_name": str(label)}]
    datasets(
        "reclip_test_labels", records, ["a", "b", "sky", "wall"],
        reclip_label_ids=[0, 1, 2, 2], reclip_label_classes=["a", "b", "background"],
    )  # fmt: skip
    result = evaluate(records, [torch.tensor([[0, 1, 2, 3, 0]])])
    assert [result[f"IoU-{name}"] for name in ("a", "b", "background")] == pytest.approx([50, 100, 200 / 3])
    assert result["mIoU"] == pytest.approx((50 + 100 + 200 / 3) / 3)


def test_a_label_by_its_colours(tmp_path, datasets):
    """The palette is in another order: b, ignored, a."""
    image = Image.new("P", (4, 1))
    image.putpalette([0, 0, 200, 0, 0, 0, 200, 0, 0])
    image.putdata([0, 1, 2, 2])
    image.save(tmp_path / "label.png")
    records = [{"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "label.png")}]
    palette = Palette({0: (200, 0, 0), 1: (0, 0, 200)}, own=True)
    datasets("reclip_test_labels", records, ["a", "b"], reclip_label_palette=palette)
    result = evaluate(records, [torch.tensor([[1, 0, 0, 1]])])
    assert result["IoU-a"] == pytest.approx(50) and result["IoU-b"] == pytest.approx(50)


def test_a_label_of_the_stored_pixels(tmp_path, datasets):
    """Turned as an image of EXIF orientation 6 is: a quarter turn clockwise."""
    Image.fromarray(np.array([[0, 1, 2]], np.uint8)).save(tmp_path / "label.png")
    records = [
        {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "label.png"), "sem_seg_orientation": 6},
    ]
    datasets("reclip_test_labels", records, ["a", "b", "c"])
    assert evaluate(records, [torch.tensor([[0], [1], [2]])])["mIoU"] == pytest.approx(100)


# ---- one file -------------------------------------------------------------------------------------------------


def message_of(path, size=(2, 3), num_classes=3, ignore_label=255) -> str:
    with pytest.raises(ReclipError) as caught:
        read_label_file(str(path), num_classes, ignore_label, size)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def save(path, array, **arguments) -> str:
    Image.fromarray(array).save(path, **arguments)
    return str(path)


def test_good_files(tmp_path):
    ids = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
    read_label_file(save(tmp_path / "l.png", ids), 3, 255, (2, 3))
    read_label_file(save(tmp_path / "i.png", ids.astype(np.uint16)), 3, 255, (2, 3))
    palette = Image.fromarray(ids, mode="P")
    palette.putpalette([value for k in range(256) for value in pascal_color(k)])
    palette.save(tmp_path / "p.png")
    read_label_file(str(tmp_path / "p.png"), 3, 255, (2, 3))


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.zeros((2, 3, 3), np.uint8), "RGB"),
        (np.zeros((2, 3, 4), np.uint8), "RGBA"),
        (np.zeros((2, 3), bool), "1"),
    ],
)
def test_not_an_index_image(tmp_path, array, kind):
    assert f"is a {kind} image" in message_of(save(tmp_path / "l.png", array))


@pytest.mark.parametrize(("wrong", "classes"), [(3, 3), (254, 3), (200, 150)])
def test_id_out_of_range(tmp_path, wrong, classes):
    path = save(tmp_path / "l.png", np.array([[0, 1, wrong], [255, 1, 0]], np.uint8))
    message = message_of(path, num_classes=classes)
    assert f"has id {wrong}" in message and f"0 to {classes - 1}" in message and "255 is ignored" in message


def test_255_is_an_id_like_others_where_another_label_is_ignored(tmp_path):
    path = save(tmp_path / "l.png", np.array([[0, 255, 0], [0, 0, 0]], np.uint8))
    assert "has id 255" in message_of(path, ignore_label=0)


def test_wrong_size_names_both(tmp_path):
    message = message_of(save(tmp_path / "l.png", np.zeros((3, 2), np.uint8)))
    assert "has size 2x3, its image 3x2" in message


@pytest.mark.parametrize("content", [b"", b"not a PNG"])
def test_unreadable(tmp_path, content):
    path = tmp_path / "l.png"
    path.write_bytes(content)
    assert "cannot be read" in message_of(path)
    assert "does not exist" in message_of(tmp_path / "none.png")


def test_cut_file(tmp_path):
    path = tmp_path / "l.png"
    save(path, np.random.default_rng(0).integers(0, 3, (64, 64), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:200])
    assert "cannot be read" in message_of(path, size=(64, 64))
