"""Files for GitHub, Docker and cibuildwheel: they call the project's own check, and name what is there."""

import re
from pathlib import Path

import pytest
import yaml

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later")
ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_yaml_with_few_rights(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"} and workflow["jobs"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@v[\d.]+", step.get("uses", "a/b@v1"))


def test_the_check_of_ci_is_the_projects():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert any(step.get("run") == "bash .ci/run" for step in jobs["check"]["steps"])
    assert (ROOT / ".ci" / "run").is_file()


def test_the_image_copies_what_the_build_needs():
    """What .dockerignore leaves out is not part of a wheel."""
    ignored = {line.strip("/") for line in (ROOT / ".dockerignore").read_text().split()}
    assert not ignored & {"csrc", "configs", "reclip_d2", "setup.py", "pyproject.toml", "requirements.txt", "README.md"}
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r"(?m)^FROM \S+ AS (\S+)", dockerfile)) >= {"cpu", "cuda"}
    assert dockerfile.count("RUN tools/install_pinned.sh python\n") == 2 and dockerfile.count("USER 1000:1000") == 2


def test_wheels_keep_pytorchs_libraries_outside():
    keys = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert "--exclude 'libtorch*'" in keys["repair-wheel-command"]
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert lowest == ">=3.10" and keys["build"].startswith("cp3{10,")
