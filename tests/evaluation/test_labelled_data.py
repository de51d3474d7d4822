"""Training data with labels: the mapper, the records, and which modules must not import them."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from PIL import Image

import reclip_d2.data.datasets.embedded as embedded
from reclip_d2.config import load_config
from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.labelled_data import LabelledDatasetMapper, labelled_records, probe_datasets
from tests.datasets_prep.miniatures import make_ade150
from tests.helpers import datasets

__all__ = ["datasets"]

ROOT = Path(__file__).parents[2]


def write_pair(folder: Path, labels: np.ndarray) -> dict:
    """An image (PNG, so that nothing is lost) whose red channel is its label, and the label."""
    image = np.stack([labels, labels // 2, 255 - labels], axis=-1).astype(np.uint8)
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(labels.astype(np.uint8)).save(folder / "label.png")
    return {"file_name": str(folder / "image.png"), "sem_seg_file_name": str(folder / "label.png"), "image_id": "a"}


def mapper(*augmentations, num_classes: int = 200, **options) -> LabelledDatasetMapper:
    return LabelledDatasetMapper(augmentations=list(augmentations), num_classes=num_classes, **options)


# ---- the mapper -------------------------------------------------------------------------------------------------


def test_labels_as_they_are(tmp_path):
    labels = np.array([[0, 1, 255], [199, 7, 0]])
    found = mapper()(write_pair(tmp_path, labels))
    assert set(found) == {"file_name", "image", "sem_seg"}
    assert found["sem_seg"].dtype == torch.int64 and found["image"].dtype == torch.uint8
    assert found["sem_seg"].tolist() == [[0, 1, -1], [199, 7, 0]]
    assert found["image"].shape == (3, 2, 3)


@pytest.mark.parametrize("classes", [200, 300])
def test_the_label_follows_the_image(tmp_path, classes):
    """Resized, cropped and flipped: the red channel still says the label, blocks' borders apart."""
    rng = np.random.default_rng(0)
    record = write_pair(tmp_path, np.kron(rng.integers(0, 20, (4, 5)) * 10, np.ones((12, 12), int)))
    augmentations = [T.ResizeShortestEdge(96, 400), T.RandomCrop("absolute", (60, 70)), T.RandomFlip(prob=0.5)]
    map_record = mapper(*augmentations, num_classes=classes)
    for seed in range(6):
        np.random.seed(seed)
        found = map_record(record)
        assert found["sem_seg"].shape == found["image"].shape[1:] == (60, 70)
        same = (found["image"][0].long() - found["sem_seg"]).abs() <= 1
        assert same.float().mean() > 0.75  # bilinear mixtures at the borders; else hardly any would agree
        assert set(found["sem_seg"].unique().tolist()) <= set(range(0, 200, 10))


def test_shrinking_takes_the_centres(tmp_path):
    """Every third pixel, its middle one: not the one on its left."""
    found = mapper(T.Resize((2, 2)))(write_pair(tmp_path, np.arange(36).reshape(6, 6)))
    assert found["sem_seg"].tolist() == [[7, 10], [25, 28]]


def test_another_ignore_label(tmp_path):
    found = mapper(num_classes=10, ignore_label=0)(write_pair(tmp_path, np.array([[0, 3], [9, 0]])))
    assert found["sem_seg"].tolist() == [[-1, 3], [9, -1]]


def test_a_label_out_of_range(tmp_path):
    with pytest.raises(ReclipError, match=r"label.png has id 12, but the classes are 0 to 9 and 255 is ignored"):
        mapper(num_classes=10)(write_pair(tmp_path, np.array([[0, 12]])))


def test_a_missing_label(tmp_path):
    record = write_pair(tmp_path, np.array([[0, 1]]))
    (tmp_path / "label.png").unlink()
    with pytest.raises(ReclipError, match=r"label.png does not exist"):
        mapper()(record)


def test_augmentations_are_those_of_the_config():
    cfg = load_config("", ["INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.CROP.ENABLED", "True", "INPUT.COLOR_JITTER", "0.2"])
    names = [type(a).__name__ for a in LabelledDatasetMapper(cfg, 3, 255).augmentations.augs]
    assert names == ["ResizeShortestEdge", "RandomCrop", "ColorJitter", "RandomFlip"]


# ---- the records ------------------------------------------------------------------------------------------------


def test_records(datasets, tmp_path):
    record = write_pair(tmp_path, np.array([[0, 1]]))
    datasets("reclip_test_a", [record], ["x", "y"])
    datasets("reclip_test_b", [{**record, "image_id": "b"}], ["x", "y"])
    found = labelled_records(["reclip_test_a", "reclip_test_b"], [["x"], ["y"]])
    assert [r["image_id"] for r in found] == ["a", "b"] and all("sem_seg_file_name" in r for r in found)


def test_records_that_do_not_serve(datasets, tmp_path):
    record = write_pair(tmp_path, np.array([[0, 1]]))
    bare = {"file_name": record["file_name"], "image_id": "c"}
    datasets("reclip_test_a", [record, bare], ["x", "y"])
    datasets("reclip_test_none", [], ["x", "y"])
    for name in ("reclip_test_a", "reclip_test_none"):
        with pytest.raises(ReclipError, match=f"'{name}' has no labels to train a probe with.*LINEAR_PROBE.DATASETS"):
            labelled_records([name], [["x"], ["y"]])
    with pytest.raises(ReclipError, match="'reclip_test_a' has another class list than the model"):
        labelled_records(["reclip_test_a"], [["x"], ["z"]])
    with pytest.raises(ReclipError, match="'reclip_test_nothing' is not registered"):
        labelled_records(["reclip_test_nothing"], [["x"]])


def test_which_data_sets():
    cfg = load_config("", ["DATASETS.TRAIN", "('voc20_train',)"])
    assert probe_datasets(cfg) == ("voc20_train_labelled",)
    cfg.LINEAR_PROBE.DATASETS = ("embedded_dev",)
    assert probe_datasets(cfg) == ("embedded_dev",)


@pytest.mark.parametrize("name", ["voc20", "context59", "ade150", "cityscapes19", "coco_stuff27", "coco_stuff171"])
def test_labelled_twins_are_registered(name):
    metadata = MetadataCatalog.get(f"{name}_train_labelled")
    assert metadata.stuff_classes == MetadataCatalog.get(f"{name}_train").stuff_classes
    assert metadata.ignore_label == 255


def test_labelled_twin_on_disk(datasets_root):
    make_ade150(datasets_root)
    with pytest.raises(
        ReclipError, match=r"training does not exist: run python datasets/prepare_ade150.py --splits train"
    ):
        DatasetCatalog.get("ade150_train_labelled")
    (folder := datasets_root / "ADEChallengeData2016/annotations_detectron2/training").mkdir(parents=True)
    bare = DatasetCatalog.get("ade150_train")
    for record in bare[1:]:
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(folder / f"{record['image_id']}.png")
    with pytest.raises(ReclipError, match=rf"1 of {len(bare)} labels are missing.*: run python .* --splits train"):
        DatasetCatalog.get("ade150_train_labelled")
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(folder / f"{bare[0]['image_id']}.png")
    bare, labelled = DatasetCatalog.get("ade150_train"), DatasetCatalog.get("ade150_train_labelled")
    assert all(set(record) == {"file_name", "image_id"} for record in bare)
    assert [record["file_name"] for record in labelled] == [record["file_name"] for record in bare]
    assert all(Path(record["sem_seg_file_name"]).is_file() for record in labelled)


def test_labelled_twin_of_the_embedded_data_set(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "ensure_dataset", lambda root, world: tmp_path)  # no need to draw the scenes
    bare, labelled = DatasetCatalog.get("embedded_train"), DatasetCatalog.get("embedded_train_labelled")
    assert not any("sem_seg_file_name" in record for record in bare)
    assert len(labelled) == len(bare) == 400
    assert labelled[0]["sem_seg_file_name"].endswith("annotations_detectron2/train/00000.png")
    metadata = MetadataCatalog.get("embedded_train_labelled")
    assert metadata.stuff_classes == MetadataCatalog.get("embedded_train").stuff_classes


# ---- kept apart -------------------------------------------------------------------------------------------------


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports anywhere, inside functions too; ``from a import b`` counts as ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def file_of(module: str) -> Path | None:
    base = ROOT / module.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def reachable(start: str) -> set[str]:
    """All modules of the project that importing ``start``, or calling anything of it, may load."""
    seen, waiting = set(), {start}
    while waiting:
        module = waiting.pop()
        parents = {module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)}
        seen.add(module)
        path = file_of(module)
        known = {name for name in (imports_of(path) if path else set()) | parents if file_of(name)}
        waiting |= known - seen
    return seen


def test_nothing_of_the_unsupervised_path_reaches_the_labelled_data():
    labelled = {f"reclip_d2.evaluation.{name}" for name in ("labelled_data", "labelled_views", "linear_probe")}
    assert all(file_of(name) for name in labelled)
    programs = ("train_net", "tools.make_hypotheses", "tools.demo")
    for start in (*programs, "reclip_d2.experiments.execute", "reclip_d2.cli.segment", "reclip_d2.app.session"):
        found = reachable(start)
        assert "reclip_d2.modeling.meta_arch.rectified_clip" in found
        assert start not in programs or "reclip_d2.hypothesis.training_records" in found
        assert not labelled & found, start
    assert labelled <= reachable("tools.linear_probe")  # the walk finds what there is to find
    # tools/reproduce.py trains with and without labels, each run in a process of its own: what all of them load.
    program = ast.parse((ROOT / "tools" / "reproduce.py").read_text())
    froms = [node for node in program.body if isinstance(node, ast.ImportFrom)]
    at_the_top = {f"{node.module}.{name.name}" for node in froms for name in node.names} | {n.module for n in froms}
    assert "reclip_d2.experiments.execute" in at_the_top and not labelled & at_the_top
    importers = {p for p in (ROOT / "reclip_d2").rglob("*.py") if labelled & imports_of(p)}
    assert importers <= {file_of(name) for name in labelled}
