"""Registered data sets: metadata, records, and Detectron2's evaluator on the output of the preparation programs."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import reclip_d2.data.datasets  # noqa: F401  (registers the data sets)
from reclip_d2.backbones.query import check_class_names
from reclip_d2.config import add_reclip_config
from reclip_d2.data.classes import class_names_of
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.data.datasets.ade150 import ADE150
from reclip_d2.data.datasets.cityscapes19 import CLASSES
from reclip_d2.data.datasets.coco_stuff import LEAF_NAMES, MAPPING_27, MAPPING_171, MID_LEVEL
from reclip_d2.data.datasets.context59 import CATEGORIES
from reclip_d2.data.datasets.embedded import embedded_root
from reclip_d2.data.datasets.registration import datasets_root as root_of_all
from reclip_d2.data.datasets.registration import pascal_colors, read_image_list
from reclip_d2.data.datasets.voc20 import VOC20
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.label_files import DatasetLabels
from reclip_d2.evaluation.label_maps import LabelMapEvaluator
from reclip_d2.hypothesis.training_records import unlabelled_records
from reclip_d2.toy.worlds import EMBEDDED
from tests.datasets_prep.miniatures import (
    VOC20_TRAIN,
    Case,
    expected_27,
    load_program,
    make_ade150,
    make_cityscapes19,
    make_coco_stuff,
    make_context59,
    make_voc20,
    quadrants,
    write_image,
    write_list,
    write_png,
)
from tests.helpers import tiny_tokenizer

CLASS_COUNTS = {
    "voc20": 20,
    "context59": 59,
    "ade150": 150,
    "cityscapes19": 19,
    "coco_stuff27": 27,
    "coco_stuff171": 171,
}
MAKERS = {
    "voc20": make_voc20,
    "context59": make_context59,
    "ade150": make_ade150,
    "cityscapes19": make_cityscapes19,
    "coco_stuff27": make_coco_stuff,
    "coco_stuff171": make_coco_stuff,
}
# Id of the first and of a nested image, by the rule: path below the folder of images without the extension.
FIRST_IDS = {
    "voc20": "2007_000033",
    "context59": "2008_000002",
    "ade150": "ADE_val_00000001",
    "cityscapes19": "frankfurt/frankfurt_000000_000294_leftImg8bit",
    "coco_stuff27": "000000000139",
    "coco_stuff171": "000000000139",
}


def program_of(name: str) -> str:
    return "coco_stuff" if name.startswith("coco_stuff") else name


def splits_of(name: str) -> list[str]:
    return ["train", "trainaug", "val"] if name == "voc20" else ["train", "val"]


@pytest.fixture(params=CLASS_COUNTS)
def prepared(request, datasets_root):
    """(name, expected labels by file name) of a data set that is made and prepared."""
    cases = MAKERS[request.param](datasets_root)
    load_program(program_of(request.param)).main(["--workers", "1"])
    labels = [case.expected_label() for case in cases]
    if request.param == "coco_stuff27":
        labels = [expected_27(label) for label in labels]
    return request.param, labels


def evaluate(name: str, predictions: list[np.ndarray]) -> dict[str, float]:
    evaluator = LabelMapEvaluator(name, distributed=False)
    evaluator.reset()
    for record, prediction in zip(DatasetCatalog.get(name), predictions, strict=True):
        evaluator.process([record], [{"sem_seg": torch.from_numpy(np.ascontiguousarray(prediction)).long()}])
    return evaluator.evaluate()["sem_seg"]


# ---- metadata -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASS_COUNTS)
def test_metadata(name):
    for split in splits_of(name):
        metadata = MetadataCatalog.get(f"{name}_{split}")
        assert len(metadata.stuff_classes) == CLASS_COUNTS[name]
        assert len({tuple(color) for color in metadata.stuff_colors}) == CLASS_COUNTS[name]
        assert metadata.ignore_label == 255
        assert metadata.evaluator_type == "sem_seg"
        assert metadata.reclip_protocol.startswith(f"{name}: {CLASS_COUNTS[name]} ")
        assert "ignored" in metadata.reclip_protocol and "mIoU over" in metadata.reclip_protocol
        assert "\n" not in metadata.reclip_protocol
        names = class_names_of(f"{name}_{split}")
        check_class_names(names, tiny_tokenizer().encode)
        assert [first for first, *_ in names] == metadata.stuff_classes
        assert all(names == " ".join(names.split()) for entry in names for names in entry)


def test_synonyms_where_the_field_uses_them():
    assert class_names_of("ade150_val")[1] == ["building", "edifice"]
    assert class_names_of("coco_stuff27_val")[23] == ["sky", "clouds"]
    for name in ("voc20", "context59", "cityscapes19", "coco_stuff171"):
        assert not hasattr(MetadataCatalog.get(f"{name}_val"), "stuff_class_synonyms")


def test_pascal_colors():
    """The beginning of VOC's colour map as its development kit prints it."""
    assert pascal_colors(8)[:4] == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert pascal_colors(8)[7] == [64, 0, 0]
    assert pascal_colors(20)[-1] == [0, 64, 128]


# ---- tables ---------------------------------------------------------------------------------------------------


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_tables_are_those_in_public_use():
    """Digests of the tables as public code writes them: order, ids and colours, names up to their spelling."""
    assert digest(" ".join(name.replace(" ", "") for name in VOC20.class_names)) == "3cc771a8dd84a19f"
    # MMSegmentation: ids that its converter of PASCAL Context sorts, and names.
    assert digest(" ".join(str(category) for category, _ in CATEGORIES)) == "3a8526c80890fe20"
    assert digest(" ".join(name.replace(" ", "") for _, name in CATEGORIES)) == "a6b058b96d46051a"
    # ADE20K's objectInfo150.csv: first names.
    assert digest(",".join(ADE150.class_names)) == "ef7fb71fc40a78c8"
    # Cityscapes' labels.py: ids and colours of the train ids.
    assert digest(repr([(label_id, color) for label_id, _, color in CLASSES])) == "5bed592213940e02"
    # STEGO's and PiCIE's mid-level class of each leaf of COCO-Stuff.
    of_leaf = {leaf: index for index, leaves in enumerate(MID_LEVEL.values()) for leaf in leaves}
    assert digest(bytes(of_leaf[leaf] for leaf in range(182)).decode()) == "5b6c6ce82fb97a8c"
    # COCO-Stuff's labels.txt: letters of each leaf ("wall-brick" is our "brick wall"), but for "structural-other", our
    # "structure", and for the four that are empty here.
    letters = ["".join(sorted(name.replace(" ", ""))) for name in LEAF_NAMES if name not in ("", "structure")]
    assert digest(" ".join(letters)) == "ce933a84a5a400fe"


def test_context_categories():
    """59 ids that grow, names in alphabetical order up to the spelling: both as in the 60-class labels."""
    ids = [category for category, _ in CATEGORIES]
    names = [name.replace(" ", "") for _, name in CATEGORIES]
    assert len(ids) == 59 and ids == sorted(set(ids)) and names == sorted(names)


def test_coco_hierarchy():
    leaves = [leaf for leaves in MID_LEVEL.values() for leaf in leaves]
    assert sorted(leaves) == list(range(182))
    assert list(MID_LEVEL)[11] == "vehicle" and list(MID_LEVEL)[12] == "ceiling"  # 12 of things, then stuff
    assert all(leaf <= 90 for name in list(MID_LEVEL)[:12] for leaf in MID_LEVEL[name])
    # Ids that COCO's annotations never use, and so has no label of the 171.
    unused = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    assert set(range(182)) - set(MAPPING_171) == set(range(182)) - set(MAPPING_27) == unused
    assert [MAPPING_171[leaf] for leaf in (0, 10, 12, 89, 91, 181)] == [0, 10, 11, 79, 80, 170]
    assert len(LEAF_NAMES) == 182


# ---- records --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASS_COUNTS)
def test_missing_folder(name, datasets_root):
    for split in splits_of(name):
        with pytest.raises(ReclipError) as caught:
            DatasetCatalog.get(f"{name}_{split}")
        message = str(caught.value)
        assert "\n" not in message
        assert f"folder {datasets_root}" in message and "does not exist" in message
        assert f"run python datasets/prepare_{program_of(name)}.py" in message


@pytest.mark.parametrize("name", [name for name in CLASS_COUNTS if name != "context59"])
def test_labels_that_are_not_prepared(name, datasets_root):
    MAKERS[name](datasets_root)
    assert DatasetCatalog.get(f"{name}_train")
    with pytest.raises(ReclipError, match=r"annotations_detectron2.* does not exist: run python datasets/prepare_"):
        DatasetCatalog.get(f"{name}_val")


def test_lists_that_are_not_prepared(datasets_root):
    make_voc20(datasets_root)
    with pytest.raises(ReclipError, match=r"trainaug.txt does not exist.*prepare_voc20.py --sbd FOLDER"):
        DatasetCatalog.get("voc20_trainaug")
    make_context59(datasets_root)
    with pytest.raises(ReclipError, match=r"train.txt does not exist.*prepare_context59.py"):
        DatasetCatalog.get("context59_train")


def test_a_list_of_files_is_no_list_of_ids(tmp_path):
    """Lists of trainaug that come with some networks hold paths."""
    path = tmp_path / "trainaug.txt"
    path.write_text("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n")
    with pytest.raises(ReclipError, match=r"names the file /JPEGImages/2007_000032.jpg: write image ids.*2007_000032$"):
        read_image_list(path)
    path.write_text("2007_000032  1\n\n2007_000039 -1\n")
    assert read_image_list(path) == ["2007_000032", "2007_000039"]


def test_images_of_another_extension(datasets_root):
    make_ade150(datasets_root)
    folder = datasets_root / "ADEChallengeData2016/images/training"
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(".JPEG"))
    (folder / "README").write_text("x")
    (folder / ".hidden.txt").write_text("x")
    with pytest.raises(ReclipError, match=re.escape(f"{folder} has no .jpg files, only .JPEG, README: put ade150")):
        DatasetCatalog.get("ade150_train")


def test_half_prepared_labels(datasets_root):
    make_ade150(datasets_root)
    load_program("ade150").main(["--workers", "1"])
    (datasets_root / "ADEChallengeData2016/annotations_detectron2/validation/ADE_val_00000002.png").unlink()
    with pytest.raises(ReclipError, match=r"1 of 3 labels are missing, first .*ADE_val_00000002.png: run python"):
        DatasetCatalog.get("ade150_val")


def test_records(prepared):
    name, labels = prepared
    train = DatasetCatalog.get(f"{name}_train")
    assert train and all(set(record) == {"file_name", "image_id"} for record in train)
    assert unlabelled_records([f"{name}_train"]) == train
    val = DatasetCatalog.get(f"{name}_val")
    assert val[0]["image_id"] == FIRST_IDS[name]
    assert all(set(record) == {"file_name", "image_id", "sem_seg_file_name"} for record in val)
    for record, label in zip(val, labels, strict=True):
        assert record["file_name"].rsplit(".", 1)[0].endswith(record["image_id"])
        with Image.open(record["sem_seg_file_name"]) as image:
            np.testing.assert_array_equal(np.asarray(image), label)


def test_order_of_the_list(datasets_root):
    make_voc20(datasets_root)
    path = datasets_root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
    write_list(path, VOC20_TRAIN[::-1])
    assert [record["image_id"] for record in DatasetCatalog.get("voc20_train")] == VOC20_TRAIN[::-1]


def test_images_are_of_their_labels_size(prepared):
    """Grey and EXIF-rotated images among them; the mapper says the size that predictions are resized to."""
    name, labels = prepared
    cfg = get_cfg()
    add_reclip_config(cfg)
    cfg.INPUT.MIN_SIZE_TEST = 0
    mapper = UnlabelledDatasetMapper(cfg, is_train=False)
    for record, label in zip(DatasetCatalog.get(f"{name}_val"), labels, strict=True):
        mapped = mapper(record)
        assert (mapped["height"], mapped["width"]) == label.shape == tuple(mapped["image"].shape[1:])


# ---- evaluation -----------------------------------------------------------------------------------------------


def test_perfect_predictions(prepared):
    name, labels = prepared
    predictions = [np.where(label == 255, 0, label) for label in labels]  # what is ignored may be anything
    result = evaluate(f"{name}_val", predictions)
    assert result["mIoU"] == result["fwIoU"] == result["pACC"] == 100


def test_confusion_matrix_of_each_data_set(prepared):
    """Right in the upper half of each image, the next class in the lower: counted pixel by pixel."""
    name, labels = prepared
    count = CLASS_COUNTS[name]
    confusion = np.zeros((count, count), np.int64)  # label by prediction
    predictions = []
    for label in labels:
        prediction = np.where(label == 255, 0, label).astype(np.int64)
        prediction[label.shape[0] // 2 :] = (prediction[label.shape[0] // 2 :] + 1) % count
        predictions.append(prediction)
        for truth, predicted in zip(label.flat, prediction.flat, strict=True):
            if truth != 255:
                confusion[truth, predicted] += 1
    result = evaluate(f"{name}_val", predictions)
    ious = {
        k: 100 * confusion[k, k] / (confusion[k].sum() + confusion[:, k].sum() - confusion[k, k])
        for k in range(count)
        if confusion[k].any()
    }
    assert 0 < np.mean(list(ious.values())) < 100 and len(set(ious.values())) > 1
    assert result["mIoU"] == pytest.approx(np.mean(list(ious.values())))
    names = MetadataCatalog.get(f"{name}_val").stuff_classes
    for k, iou in ious.items():
        assert result[f"IoU-{names[k]}"] == pytest.approx(iou)
    assert result["pACC"] == pytest.approx(100 * np.trace(confusion) / confusion.sum())


def test_all_classes_of_voc(datasets_root):
    """One image a class: perfect predictions score 100 in every class; with two classes exchanged, those score 0."""
    base, names = datasets_root / "VOC2012", [f"2007_{index:06d}" for index in range(20)]
    for index, name in enumerate(names):
        case = Case(name, (11 + index, 30 - index), [[index + 1, 0], [index + 1, 255]], [[0, 0], [0, 0]])
        write_image(base / "JPEGImages" / f"{name}.jpg", case)
        write_png(base / "SegmentationClass" / f"{name}.png", case.shipped_label(), palette=True)
    write_list(base / "ImageSets/Segmentation/val.txt", names)
    load_program("voc20").main(["--workers", "1"])
    predictions = [np.full((11 + index, 30 - index), index) for index in range(20)]
    result = evaluate("voc20_val", predictions)
    classes = MetadataCatalog.get("voc20_val").stuff_classes
    assert result["mIoU"] == 100 and all(result[f"IoU-{name}"] == 100 for name in classes)
    predictions[3][:], predictions[4][:] = 4, 3
    result = evaluate("voc20_val", predictions)
    assert result["IoU-boat"] == result["IoU-bottle"] == 0 and result["mIoU"] == pytest.approx(90)


def test_confusion_matrix_by_hand(datasets_root):
    """Two images of VOC, counted on paper: 0 aeroplane, 1 bicycle, 2 bird."""
    base = datasets_root / "VOC2012"
    case = Case("2007_000033", (4, 6), [[1, 2], [1, 0]], [[0, 0], [0, 0]])
    other = Case("2007_000042", (2, 4), [[3, 3], [255, 3]], [[0, 0], [0, 0]])
    for each in (case, other):
        write_image(base / "JPEGImages" / f"{each.name}.jpg", each)
        write_png(base / "SegmentationClass" / f"{each.name}.png", each.shipped_label(), palette=True)
    write_list(base / "ImageSets/Segmentation/val.txt", [case.name, other.name])
    load_program("voc20").main(["--workers", "1"])
    # First image: aeroplane in the left half (12 px), bicycle upper right (6 px), the rest is ignored. Predicted:
    # aeroplane in rows 0-1, bicycle in rows 2-3. Second: bird on 6 px, 2 px ignored. Predicted: bird everywhere.
    prediction = np.zeros((4, 6), int)
    prediction[2:] = 1
    result = evaluate("voc20_val", [prediction, np.full((2, 4), 2)])
    # aeroplane: 6 px right of 12 labelled and 12 predicted (6 right, 6 on bicycle): 6 / 18. bicycle: none. bird: all.
    assert result["IoU-aeroplane"] == pytest.approx(100 * 6 / 18)
    assert result["IoU-bicycle"] == 0
    assert result["IoU-bird"] == 100
    assert result["mIoU"] == pytest.approx(100 * (6 / 18 + 0 + 1) / 3)  # the other 17 do not occur
    assert result["pACC"] == pytest.approx(100 * (6 + 6) / 24)


# ---- where data sets lie ------------------------------------------------------------------------------------------


def test_the_root_of_all_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in (("~/x", tmp_path / "x"), ("~", tmp_path), ("/a/~", Path("/a/~")), ("", Path("datasets"))):
        monkeypatch.setenv("DETECTRON2_DATASETS", value)
        assert root_of_all() == expected and embedded_root(EMBEDDED) == expected / "embedded"
    monkeypatch.setenv("DETECTRON2_DATASETS", "~nobody-of-this-name/x")
    with pytest.raises(ReclipError, match="DETECTRON2_DATASETS is '~nobody-of-this-name/x', but there is no such user"):
        root_of_all()


def test_prepared_labels_by_their_colours(datasets_root):
    """Somebody copies SegmentationClass to where prepared labels belong: VOC's colours still name its classes."""
    make_voc20(datasets_root)
    labels = DatasetLabels("voc20_val")
    path = datasets_root / "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png"
    ids = labels.read({"sem_seg_file_name": str(path)}, (23, 31))
    np.testing.assert_array_equal(ids, quadrants([[255, 0], [19, 255]], (23, 31)))
