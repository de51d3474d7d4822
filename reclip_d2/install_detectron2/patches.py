"""Patches for Detectron2 0.5 to run on current Python, NumPy, Pillow, setuptools and PyTorch.

A patch changes the files of the wheel in place. It fails if the text to change is not there, since the archive is then
not the one it was written for.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from reclip_d2.errors import ReclipError

Files = dict[str, bytes]  # path inside the wheel -> content

STAND_IN = '''\
"""Stand-in for Detectron2's compiled operators, which this pure-Python build leaves out.

Importing it is harmless; calling an operator raises a RuntimeError that names the operator.
"""


def get_compiler_version():
    return "none (pure-Python build)"


def get_cuda_version():
    return "none (pure-Python build)"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("_"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise RuntimeError(
            f"detectron2._C.{name} is not available: this detectron2 was built without its C++ extension "
            "(rotated boxes, deformable convolution, fast COCO evaluation). Install Detectron2 from its "
            "upstream sources to use it; for COCO evaluation use_fast_impl=False is enough."
        )

    return missing
'''


def _replace(files: Files, path: str, old: str, new: str) -> None:
    """Replace every ``old`` in the file ``path``; ReclipError if the file or the text is missing."""
    if path not in files:
        raise ReclipError(f"cannot patch {path}: there is no such file")
    text = files[path].decode("utf-8")
    if old not in text:
        raise ReclipError(f"cannot patch {path}: it does not contain {old.splitlines()[0].strip()!r}")
    files[path] = text.replace(old, new).encode("utf-8")


def patch_numpy_aliases(files: Files) -> None:
    """NumPy 1.24 removed ``np.int``, ``np.float``, ``np.bool``, ``np.str`` and ``np.object``: use the builtins."""
    alias = re.compile(rb"\bnp\.(int|float|bool|str|object)\b")
    found = 0
    for path, content in files.items():
        if path.endswith(".py"):
            files[path], count = alias.subn(rb"\1", content)
            found += count
    if not found:
        raise ReclipError("cannot patch the NumPy aliases: none of np.int, np.float, np.bool, np.str, np.object found")


def patch_pillow_linear(files: Files) -> None:
    """Pillow 10 removed ``Image.LINEAR``, an alias of ``Image.BILINEAR``."""
    _replace(files, "detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR")


def patch_pkg_resources(files: Files) -> None:
    """setuptools 82 removed ``pkg_resources``: find the model zoo's configs with ``importlib.resources``."""
    path = "detectron2/model_zoo/model_zoo.py"
    _replace(files, path, "import pkg_resources\n", "from importlib import resources\n")
    _replace(
        files,
        path,
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'str(resources.files("detectron2.model_zoo").joinpath("configs", config_path))',
    )


def patch_caffe2_export(files: Files) -> None:
    """PyTorch 2.2 removed Caffe2: import its exporter only if it exists, as upstream main does.

    Without this neither ``detectron2.export`` nor ``detectron2.utils.analysis`` can be imported.
    """
    _replace(
        files,
        "detectron2/export/__init__.py",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ImportError:  # no caffe2 or no onnx\n    pass\n",
    )


def patch_extension(files: Files) -> None:
    """Add ``detectron2._C``, whose operators raise a clear error, in place of the compiled extension.

    ``detectron2.layers`` imports it. Only rotated NMS uses ``torch.ops``; it is redirected here.
    """
    path = "detectron2/_C.py"
    if path in files:
        raise ReclipError(f"cannot add {path}: it exists already")
    if not any(b"from detectron2 import _C\n" in content for content in files.values()):
        raise ReclipError(f"cannot add {path}: nothing imports it")
    _replace(
        files,
        "detectron2/layers/nms.py",
        "    return torch.ops.detectron2.nms_rotated(",
        "    from detectron2 import _C\n\n    return _C.nms_rotated(",
    )
    files[path] = STAND_IN.encode("utf-8")


PATCHES: tuple[Callable[[Files], None], ...] = (
    patch_numpy_aliases,
    patch_pillow_linear,
    patch_pkg_resources,
    patch_caffe2_export,
    patch_extension,
)


def patch_all(files: Files) -> list[str]:
    """Apply all patches, mark each changed file (as the licence requires), and return the changed paths."""
    before = dict(files)
    for patch in PATCHES:
        patch(files)
    changed = sorted(path for path in files if files[path] != before.get(path))
    for path in changed:
        files[path] = b"# Changed by reclip_d2.install_detectron2.\n" + files[path]
        try:
            compile(files[path], path, "exec", dont_inherit=True)
        except SyntaxError as error:
            raise ReclipError(f"cannot patch {path}: line {error.lineno} is no longer valid Python") from error
    return changed
