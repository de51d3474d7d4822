"""open_clip is imported without transformers, which its text towers get when they are needed."""

import importlib
import sys
import types

import pytest

from reclip_d2.utils import lazy_transformers

PACKAGES = ("open_clip", "transformers")
SOURCE = """
try:
    import transformers
except ImportError:
    transformers = None
"""


@pytest.fixture
def two_packages(tmp_path, monkeypatch):
    """An open_clip that imports a transformers if it can; neither has been imported. Both are forgotten afterwards."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(SOURCE if name == "open_clip" else "AutoModel = 'a class'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    lazy_transformers.install_finder()
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}
    for name in modules:
        del sys.modules[name]
    yield
    for name in PACKAGES:
        sys.modules.pop(name, None)
    sys.modules.update(modules)


def test_open_clip_does_not_import_transformers(two_packages):
    assert importlib.import_module("open_clip").transformers is None
    assert "transformers" not in sys.modules
    assert importlib.import_module("transformers").AutoModel == "a class"


def test_an_import_from_before_counts(two_packages):
    transformers = importlib.import_module("transformers")
    assert importlib.import_module("open_clip").transformers is transformers


def test_the_finder_is_installed_once(two_packages):
    before = list(sys.meta_path)
    lazy_transformers.install_finder()
    assert sys.meta_path == before


def test_text_towers_get_what_they_lack(monkeypatch):
    towers = types.SimpleNamespace(transformers=None)
    modules = {
        name: types.SimpleNamespace(**dict.fromkeys(names, name)) for name, names in lazy_transformers._NAMES.items()
    }
    monkeypatch.setattr(lazy_transformers.importlib, "import_module", {**modules, "open_clip.hf_model": towers}.get)
    lazy_transformers.use_transformers()
    assert towers.transformers is modules["transformers"]
    assert (towers.AutoConfig, towers.BaseModelOutput) == ("transformers", "transformers.modeling_outputs")
