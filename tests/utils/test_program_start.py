"""Ctrl-C while a program imports its libraries: one line, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    "train_net.py",
    "demo/demo.py",
    "-m reclip_d2.train_net",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("datasets/prepare_*.py")),
    *sorted(
        f"tools/{path.name}"
        for path in ROOT.glob("tools/*.py")
        if path.name not in ("__init__.py", "docs_site.py", "kernel_report.py")  # these import nothing that takes time
    ),
]


@pytest.fixture(scope="module")
def interrupting_libraries(tmp_path_factory) -> Path:
    """A folder of libraries whose import is where Ctrl-C is pressed."""
    folder = tmp_path_factory.mktemp("libraries")
    for name in ("torch", "numpy", "detectron2"):
        (folder / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_during_the_imports(interrupting_libraries, program):
    done = subprocess.run(
        [sys.executable, *program.split()],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{interrupting_libraries}{os.pathsep}{ROOT}"},
        check=False,
        # Shells start background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "\ninterrupted\n")


def test_other_errors_have_their_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import reclip_d2.utils.program_start\n1 / 0"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr
