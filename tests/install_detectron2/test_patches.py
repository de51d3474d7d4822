"""The patches of Detectron2 0.5."""

import types

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.install_detectron2 import patches
from tests.install_detectron2.sources import SOURCES, package_files


def run_file(files: dict[str, bytes], path: str) -> types.ModuleType:
    module = types.ModuleType(path)
    exec(compile(files[path], path, "exec"), module.__dict__)
    return module


def test_numpy_aliases_become_builtins_and_scalar_types_stay():
    files = {"a.py": SOURCES["detectron2/evaluation/sem_seg_evaluation.py"].encode(), "a.txt": b"np.int"}
    patches.patch_numpy_aliases(files)
    assert files["a.py"].decode() == (
        "a = np.zeros(3, dtype=int)\nb = a.astype(float)\nc = np.bool_(1), np.int64(2), np.floor(b)\n"
    )
    assert files["a.txt"] == b"np.int"


def test_pillow_linear():
    files = package_files(SOURCES)
    patches.patch_pillow_linear(files)
    text = files["detectron2/data/transforms/transform.py"].decode()
    assert text == "def extent(interp=Image.BILINEAR):\n    return Image.NEAREST\n"


def test_pkg_resources_gives_way_to_importlib(tmp_path, monkeypatch):
    files = package_files(SOURCES)
    patches.patch_pkg_resources(files)
    path = "detectron2/model_zoo/model_zoo.py"
    assert b"pkg_resources" not in files[path]
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
    found = run_file(files, path).get_config_file("Misc/a.yaml")
    assert found == str(tmp_path / "detectron2.model_zoo" / "configs" / "Misc" / "a.yaml")


def test_caffe2_export_is_optional():
    files = {"detectron2/export/__init__.py": b"from .api import *\nx = 1\n"}
    patches.patch_caffe2_export(files)
    # Outside a package the relative import is an ImportError, like the one without caffe2.
    assert run_file(files, "detectron2/export/__init__.py").x == 1


def test_stand_in_imports_and_its_operators_say_what_is_missing():
    files = package_files(SOURCES)
    patches.patch_extension(files)
    extension = run_file(files, "detectron2/_C.py")
    assert extension.has_cuda() is False
    assert not hasattr(extension, "__path__")
    with pytest.raises(RuntimeError, match=r"detectron2\._C\.box_iou_rotated is not available"):
        extension.box_iou_rotated(1, 2)
    assert b"torch.ops" not in files["detectron2/layers/nms.py"]
    assert b"return _C.nms_rotated(boxes, scores, iou_threshold)" in files["detectron2/layers/nms.py"]


@pytest.mark.parametrize(
    ("patch", "path"),
    [
        ("patch_pillow_linear", "detectron2/data/transforms/transform.py"),
        ("patch_pkg_resources", "detectron2/model_zoo/model_zoo.py"),
        ("patch_caffe2_export", "detectron2/export/__init__.py"),
        ("patch_extension", "detectron2/layers/nms.py"),
    ],
)
def test_a_patch_fails_where_it_finds_nothing_to_change(patch, path):
    files = package_files(SOURCES)
    files[path] = b"nothing = 1\n"
    with pytest.raises(ReclipError, match=f"cannot patch {path}: it does not contain"):
        getattr(patches, patch)(files)
    del files[path]
    with pytest.raises(ReclipError, match=f"cannot patch {path}: there is no such file"):
        getattr(patches, patch)(files)


def test_patches_of_the_whole_tree_fail_where_they_find_nothing():
    with pytest.raises(ReclipError, match="cannot patch the NumPy aliases"):
        patches.patch_numpy_aliases({"a.py": b"np.int64(1)\n"})
    with pytest.raises(ReclipError, match="nothing imports it"):
        patches.patch_extension({"detectron2/layers/nms.py": b"pass\n"})
    with pytest.raises(ReclipError, match="it exists already"):
        patches.patch_extension({"detectron2/_C.py": b""})


def test_patch_all_marks_what_it_changed_and_nothing_else():
    files = package_files(SOURCES)
    before = dict(files)
    changed = patches.patch_all(files)
    assert changed == [
        "detectron2/_C.py",
        "detectron2/data/transforms/transform.py",
        "detectron2/evaluation/sem_seg_evaluation.py",
        "detectron2/export/__init__.py",
        "detectron2/layers/nms.py",
        "detectron2/model_zoo/model_zoo.py",
    ]
    marked = [path for path, content in files.items() if content.startswith(b"# Changed by reclip_d2")]
    assert sorted(marked) == changed
    assert all(files[path] == before[path] for path in before if path not in changed)


def test_patch_all_refuses_to_pack_broken_python(monkeypatch):
    def break_it(files):
        files["detectron2/__init__.py"] = b"def (:\n"

    monkeypatch.setattr(patches, "PATCHES", (break_it,))
    with pytest.raises(ReclipError, match=r"detectron2/__init__\.py: line 2 is no longer valid Python"):
        patches.patch_all(package_files(SOURCES))
