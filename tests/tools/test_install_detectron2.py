"""tools/install_detectron2.py: what it mends, what it refuses, what the wheel holds.

No test touches the network or the environment.
"""

import base64
import csv
import hashlib
import importlib.util
import io
import subprocess
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

# The least that every mend finds its text in.
SOURCES = {
    "detectron2/__init__.py": '__version__ = "0.5"\n',
    "detectron2/data/transforms/transform.py": "def extent(interp=Image.LINEAR):\n    return Image.NEAREST\n",
    "detectron2/evaluation/sem_seg_evaluation.py": (
        "a = np.zeros(3, dtype=np.int)\nb = a.astype(np.float)\nc = np.bool_(1), np.int64(2), np.floor(b)\n"
    ),
    "detectron2/export/__init__.py": "from .api import *\nfrom .flatten import TracingAdapter\n",
    "detectron2/layers/nms.py": (
        "def nms_rotated(boxes, scores, iou_threshold):\n"
        "    return torch.ops.detectron2.nms_rotated(boxes, scores, iou_threshold)\n"
    ),
    "detectron2/layers/rotated_boxes.py": "from detectron2 import _C\n",
    "detectron2/model_zoo/model_zoo.py": (
        "import os\nimport pkg_resources\n\n\n"
        "def get_config_file(config_path):\n"
        "    cfg_file = pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )\n"
        "    return cfg_file\n"
    ),
    "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
    "projects/DeepLab/deeplab/__init__.py": "from .loss import x\n",
    "projects/DeepLab/train_net.py": "raise SystemExit\n",
    "LICENSE": "Apache License\n",
    "setup.py": "raise SystemExit\n",
}


def load(name: str) -> types.ModuleType:
    """A program of tools/, as a module (its folder is no package)."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return load("install_detectron2")


@pytest.fixture
def mends(tool):
    return importlib.import_module("detectron2_mends")


def write_sdist(path: Path, sources: dict[str, str], root: str = "detectron2_cdo-0.5") -> Path:
    """A source archive of these files."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in sources.items():
            member = tarfile.TarInfo(f"{root}/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def package_files(sources: dict[str, str]) -> dict[str, bytes]:
    return {name: text.encode() for name, text in sources.items() if name.startswith("detectron2/")}


def run_file(files: dict[str, bytes], path: str) -> types.ModuleType:
    module = types.ModuleType(path)
    exec(compile(files[path], path, "exec"), module.__dict__)
    return module


def test_numpy_aliases_become_builtins_and_scalar_types_stay(mends):
    files = {"a.py": SOURCES["detectron2/evaluation/sem_seg_evaluation.py"].encode(), "a.txt": b"np.int"}
    mends.mend_numpy_aliases(files)
    assert files["a.py"].decode() == (
        "a = np.zeros(3, dtype=int)\nb = a.astype(float)\nc = np.bool_(1), np.int64(2), np.floor(b)\n"
    )
    assert files["a.txt"] == b"np.int"


def test_pillow_linear(mends):
    files = package_files(SOURCES)
    mends.mend_pillow_linear(files)
    text = files["detectron2/data/transforms/transform.py"].decode()
    assert text == "def extent(interp=Image.BILINEAR):\n    return Image.NEAREST\n"


def test_pkg_resources_gives_way_to_importlib(mends, tmp_path, monkeypatch):
    files = package_files(SOURCES)
    mends.mend_pkg_resources(files)
    path = "detectron2/model_zoo/model_zoo.py"
    assert b"pkg_resources" not in files[path]
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
    found = run_file(files, path).get_config_file("Misc/a.yaml")
    assert found == str(tmp_path / "detectron2.model_zoo" / "configs" / "Misc" / "a.yaml")


def test_caffe2_export_is_optional(mends):
    files = {"detectron2/export/__init__.py": b"from .api import *\nx = 1\n"}
    mends.mend_caffe2_export(files)
    # Outside a package the relative import is an ImportError, like the one without caffe2.
    assert run_file(files, "detectron2/export/__init__.py").x == 1


def test_stand_in_imports_and_its_operators_say_what_is_missing(mends):
    files = package_files(SOURCES)
    mends.mend_extension(files)
    extension = run_file(files, "detectron2/_C.py")
    assert extension.has_cuda() is False
    assert not hasattr(extension, "__path__")
    with pytest.raises(RuntimeError, match=r"detectron2\._C\.box_iou_rotated is not available"):
        extension.box_iou_rotated(1, 2)
    assert b"torch.ops" not in files["detectron2/layers/nms.py"]
    assert b"return _C.nms_rotated(boxes, scores, iou_threshold)" in files["detectron2/layers/nms.py"]


@pytest.mark.parametrize(
    ("mend", "path"),
    [
        ("mend_pillow_linear", "detectron2/data/transforms/transform.py"),
        ("mend_pkg_resources", "detectron2/model_zoo/model_zoo.py"),
        ("mend_caffe2_export", "detectron2/export/__init__.py"),
        ("mend_extension", "detectron2/layers/nms.py"),
    ],
)
def test_a_mend_fails_where_it_finds_nothing_to_mend(mends, mend, path):
    files = package_files(SOURCES)
    files[path] = b"nothing = 1\n"
    with pytest.raises(mends.InstallError, match=f"cannot mend {path}: it does not contain"):
        getattr(mends, mend)(files)
    del files[path]
    with pytest.raises(mends.InstallError, match=f"cannot mend {path}: there is no such file"):
        getattr(mends, mend)(files)


def test_mends_of_the_whole_tree_fail_where_they_find_nothing(mends):
    with pytest.raises(mends.InstallError, match="cannot mend the NumPy aliases"):
        mends.mend_numpy_aliases({"a.py": b"np.int64(1)\n"})
    with pytest.raises(mends.InstallError, match="nothing imports it"):
        mends.mend_extension({"detectron2/layers/nms.py": b"pass\n"})
    with pytest.raises(mends.InstallError, match="there is one already"):
        mends.mend_extension({"detectron2/_C.py": b""})


def test_mend_all_marks_what_it_changed_and_nothing_else(mends):
    files = package_files(SOURCES)
    before = dict(files)
    changed = mends.mend_all(files)
    assert changed == [
        "detectron2/_C.py",
        "detectron2/data/transforms/transform.py",
        "detectron2/evaluation/sem_seg_evaluation.py",
        "detectron2/export/__init__.py",
        "detectron2/layers/nms.py",
        "detectron2/model_zoo/model_zoo.py",
    ]
    marked = [path for path, content in files.items() if content.startswith(b"# Changed by tools/")]
    assert sorted(marked) == changed
    assert all(files[path] == before[path] for path in before if path not in changed)


def test_mend_all_refuses_to_pack_broken_python(mends, monkeypatch):
    def break_it(files):
        files["detectron2/__init__.py"] = b"def (:\n"

    monkeypatch.setattr(mends, "MENDS", (break_it,))
    with pytest.raises(mends.InstallError, match=r"detectron2/__init__\.py: line 2 is no longer valid Python"):
        mends.mend_all(package_files(SOURCES))


def test_a_wrong_hash_is_refused(tool, tmp_path):
    archive = tmp_path / "detectron2_cdo-0.5.tar.gz"
    archive.write_bytes(b"abc")
    # SHA-256 of "abc", from FIPS 180-2.
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    tool.check_sha256(archive, known)
    with pytest.raises(tool.InstallError, match=f"not the expected archive: SHA-256 {known}"):
        tool.check_sha256(archive)


def test_sdist_is_mapped_to_the_wheels_layout(tool, tmp_path):
    files = tool.read_sdist(write_sdist(tmp_path / "a.tar.gz", SOURCES))
    assert files["detectron2/model_zoo/configs/Base.yaml"] == b"VERSION: 2\n"
    assert files["detectron2/projects/deeplab/__init__.py"] == b"from .loss import x\n"
    assert files["detectron2-0.5.dist-info/licenses/LICENSE"] == b"Apache License\n"
    assert not [path for path in files if "setup.py" in path or "train_net.py" in path]


@pytest.mark.parametrize("bad", ["detectron2/../../evil.py", "detectron2/link"])
def test_sdist_with_links_or_parent_folders_is_refused(tool, tmp_path, bad):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo(f"detectron2_cdo-0.5/{bad}")
        if bad.endswith("link"):
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member, io.BytesIO())
    with pytest.raises(tool.InstallError, match="not a plain file"):
        tool.read_sdist(archive)


def test_sdist_that_is_cut_short_or_of_something_else_is_refused(tool, tmp_path):
    whole = write_sdist(tmp_path / "a.tar.gz", SOURCES)
    whole.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(tool.InstallError, match=r"a\.tar\.gz cannot be read"):
        tool.read_sdist(whole)
    with pytest.raises(tool.InstallError, match=r"holds no __init__\.py"):
        tool.read_sdist(write_sdist(tmp_path / "b.tar.gz", {"LICENSE": "x"}))


def test_wheel_holds_files_metadata_and_a_true_record(tool, mends, tmp_path):
    files = tool.read_sdist(write_sdist(tmp_path / "a.tar.gz", SOURCES))
    mends.mend_all(files)
    wheel = tool.write_wheel(files, tmp_path / "wheels")
    assert wheel.name == "detectron2-0.5-py3-none-any.whl"
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]  # no temporary files left
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    info = "detectron2-0.5.dist-info"
    metadata = content[f"{info}/METADATA"].decode().splitlines()
    assert {"Name: detectron2", "Version: 0.5", "Requires-Dist: fvcore>=0.1.5,<0.1.6"} <= set(metadata)
    assert b"Tag: py3-none-any" in content[f"{info}/WHEEL"]
    assert files.items() <= content.items()

    rows = {row[0]: row[1:] for row in csv.reader(content[f"{info}/RECORD"].decode().splitlines())}
    assert rows.pop(f"{info}/RECORD") == ["", ""]
    assert rows.keys() == content.keys() - {f"{info}/RECORD"}
    for name, (digest, size) in rows.items():
        sha256 = base64.urlsafe_b64encode(hashlib.sha256(content[name]).digest()).decode().rstrip("=")
        assert (digest, size) == (f"sha256={sha256}", str(len(content[name])))
    # Metadata comes after all code: a copy cut short is recognised by its absence.
    names = list(content)
    assert names.index(f"{info}/METADATA") > max(i for i, n in enumerate(names) if n.endswith(".py"))


def test_wheel_is_the_same_byte_for_byte(tool, tmp_path):
    files = package_files(SOURCES)
    first = tool.write_wheel(files, tmp_path / "a").read_bytes()
    second = tool.write_wheel(dict(reversed(files.items())), tmp_path / "b").read_bytes()
    assert first == second


@pytest.fixture
def world(tool, tmp_path, monkeypatch):
    """The tool in an environment of our making: which detectron2 there is, which commands were run."""
    state = types.SimpleNamespace(origin=None, works=(True, "0.6 at /somewhere"), half=False, commands=[])
    find_spec = importlib.util.find_spec

    def fake_find_spec(name):
        if name != "detectron2":
            return find_spec(name)
        return None if state.origin is None else types.SimpleNamespace(origin=state.origin)

    def fake_run(command, **options):
        state.commands.append(command)
        if "download" in command:
            write_sdist(Path(command[command.index("--dest") + 1]) / "detectron2_cdo-0.5.tar.gz", SOURCES)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(tool.importlib.util, "find_spec", fake_find_spec)
    monkeypatch.setattr(tool, "importable", lambda: state.works)
    monkeypatch.setattr(tool, "is_half_installed", lambda origin: state.half)
    monkeypatch.setattr(tool.subprocess, "run", fake_run)
    monkeypatch.setattr(tool, "check_sha256", lambda path: None)
    return state


def test_an_importable_detectron2_is_left_alone(tool, world, capsys):
    world.origin = "/somewhere/detectron2/__init__.py"
    assert tool.main([]) == 0
    assert world.commands == []
    assert capsys.readouterr().out == "detectron2 0.6 at /somewhere is left alone\n"


def test_a_broken_detectron2_is_reported_and_not_touched(tool, world, capsys):
    world.origin = "/somewhere/detectron2/__init__.py"
    world.works = (False, "ImportError: undefined symbol")
    assert tool.main([]) == 1
    assert world.commands == []
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: detectron2 at /somewhere/detectron2 cannot be imported (ImportError")


def test_missing_detectron2_is_downloaded_by_hash_and_installed(tool, world):
    assert tool.main([]) == 0
    download, install = world.commands
    assert {"--require-hashes", "--no-deps"} <= set(download)
    assert install[-1].endswith("detectron2-0.5-py3-none-any.whl")
    assert "--force-reinstall" not in install


@pytest.mark.parametrize("force", [True, False])
def test_half_installed_or_forced_is_installed_again(tool, world, force):
    world.origin = "/somewhere/detectron2/__init__.py"
    world.half = not force
    assert tool.main(["--force"] if force else []) == 0
    assert [("--force-reinstall" in command) for command in world.commands] == [False, True, False]


def test_wheel_dir_builds_and_installs_nothing(tool, world, tmp_path):
    world.origin = "/somewhere/detectron2/__init__.py"
    assert tool.main(["--wheel-dir", str(tmp_path / "wheels")]) == 0
    assert (tmp_path / "wheels" / "detectron2-0.5-py3-none-any.whl").is_file()
    assert len(world.commands) == 1


def test_failed_download_is_one_line_with_pips_reason(tool, world, monkeypatch, capsys):
    output = "Collecting detectron2-cdo==0.5\nERROR: Could not find a version\nERROR: No matching distribution\n"
    failed = subprocess.CompletedProcess([], 1, stdout=output)
    monkeypatch.setattr(tool.subprocess, "run", lambda command, **options: failed)
    assert tool.main([]) == 1
    expected = "error: cannot download detectron2-cdo==0.5: No matching distribution\n"
    assert capsys.readouterr().err == expected


def test_half_installed_is_known_by_its_missing_metadata(tool, tmp_path, monkeypatch):
    origin = tmp_path / "detectron2" / "__init__.py"
    monkeypatch.setattr(tool.sysconfig, "get_path", lambda key: str(tmp_path))
    monkeypatch.setattr(tool.importlib.metadata, "files", lambda name: ["detectron2/__init__.py"])
    assert tool.is_half_installed(str(origin)) is False
    monkeypatch.setattr(tool.importlib.metadata, "files", lambda name: None)
    assert tool.is_half_installed(str(origin)) is True

    def missing(name):
        raise tool.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tool.importlib.metadata, "files", missing)
    assert tool.is_half_installed(str(origin)) is True
    assert tool.is_half_installed("/elsewhere/detectron2/__init__.py") is False  # a source checkout on the path
