"""Configs of the package are found from any working folder."""

import pytest

from reclip_d2.config import load_config
from reclip_d2.config.files import configs_folder, find_config_file
from reclip_d2.errors import ReclipError


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_packages_configs_are_found_from_an_empty_folder(empty_folder):
    name = "configs/embedded/maskclip.yaml"
    assert find_config_file(name) == str(configs_folder() / "embedded" / "maskclip.yaml")
    assert load_config(name).MODEL.META_ARCHITECTURE == "MaskCLIP"


def test_a_file_of_the_working_folder_comes_first(empty_folder):
    own = empty_folder / "configs" / "embedded" / "maskclip.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("SEED: 7\n")
    assert find_config_file("configs/embedded/maskclip.yaml") == "configs/embedded/maskclip.yaml"
    assert load_config("configs/embedded/maskclip.yaml").SEED == 7


@pytest.mark.parametrize(
    "name", ["configs/none.yaml", "configs/../setup.py", "embedded/maskclip.yaml", "/configs/x", ""]
)
def test_other_names_stay_as_they_are(empty_folder, name):
    assert find_config_file(name) == name


def test_a_config_that_is_nowhere_is_named_as_it_was_given(empty_folder):
    with pytest.raises(ReclipError, match=r"^config file configs/none\.yaml"):
        load_config("configs/none.yaml")
