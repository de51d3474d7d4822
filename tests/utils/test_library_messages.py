"""Only library messages that a user cannot act on are hidden."""

import ast
import logging
import warnings
from pathlib import Path

import pytest

from reclip_d2.utils.library_messages import silence_library_messages

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_warnings_of_torch_jit(category):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_library_messages()
        warnings.warn("`torch.jit.script` is deprecated. Please switch to `torch.compile`.", category, stacklevel=1)
        warnings.warn("`torch.jit.trace` is not supported in Python 3.14+ and may break.", category, stacklevel=1)
        warnings.warn("`torch.load` is deprecated", category, stacklevel=1)
        warnings.warn("`torch.jit.script` is deprecated", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == [
        "`torch.load` is deprecated",
        "`torch.jit.script` is deprecated",
    ]


def test_torchs_line_on_a_machine_without_a_gpu(caplog):
    silence_library_messages()
    logger = logging.getLogger("torch.utils.cpp_extension")
    with caplog.at_level(logging.WARNING, logger=logger.name):
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
        logger.warning("The detected CUDA version mismatches")
    assert [record.getMessage() for record in caplog.records] == ["The detected CUDA version mismatches"]


@pytest.mark.parametrize(
    "program", ["train_net.py", "demo/demo.py", *(f"tools/{path.name}" for path in ROOT.glob("tools/*.py"))]
)
def test_programs_import_the_package_before_the_libraries(program):
    """Whose messages it filters."""
    imported = []
    for node in ast.parse((ROOT / program).read_text()).body:
        if isinstance(node, ast.Import):
            imported += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.append(node.module.partition(".")[0])
    libraries = [imported.index(name) for name in ("detectron2", "fvcore") if name in imported]
    if libraries:
        assert imported.index("reclip_d2") < min(libraries)
