"""Config files: found from any working folder, and merged in order."""

import argparse
import json

import pytest

from reclip_d2.config import flatten, load_config
from reclip_d2.config.__main__ import main
from reclip_d2.config.files import add_config_file_argument, configs_folder, find_config_file
from reclip_d2.errors import ReclipError


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_packages_configs_are_found_from_an_empty_folder(empty_folder):
    name = "configs/methods/maskclip.yaml"
    assert find_config_file(name) == str(configs_folder() / "methods" / "maskclip.yaml")
    assert load_config(["configs/datasets/voc20.yaml", name]).MODEL.META_ARCHITECTURE == "MaskCLIP"


def test_a_file_of_the_working_folder_comes_first(empty_folder):
    own = empty_folder / "configs" / "methods" / "maskclip.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("SEED: 7\n")
    assert find_config_file("configs/methods/maskclip.yaml") == "configs/methods/maskclip.yaml"
    assert load_config("configs/methods/maskclip.yaml").SEED == 7


@pytest.mark.parametrize(
    "name", ["configs/none.yaml", "configs/../setup.py", "embedded/maskclip.yaml", "/configs/x", ""]
)
def test_other_names_stay_as_they_are(empty_folder, name):
    assert find_config_file(name) == name


def test_a_config_that_is_nowhere_is_named_as_it_was_given(empty_folder):
    with pytest.raises(ReclipError, match=r"^config file configs/none\.yaml"):
        load_config("configs/none.yaml")


OLD_NAMES = {
    "configs/voc20/reclippp_rectify.yaml": ("datasets/voc20", "methods/reclippp_rectify"),
    "/somewhere/configs/ade150/maskclip_plus.yaml": ("datasets/ade150", "methods/maskclip_plus"),
    "../configs/embedded/reclippp_ext_distill.yaml": ("datasets/embedded", "methods/reclippp_ext_distill"),
    "configs/custom/reclip-embedded/maskclip.yaml": ("datasets/custom-reclip-embedded", "methods/maskclip"),
    "configs/custom/reclip-embedded/Base-input.yaml": ("datasets/custom-reclip-embedded",),
    "configs/context59/Base-student.yaml": ("datasets/context59", "methods/Base-student"),
    "configs/coco_stuff27/Base-coco_stuff27.yaml": ("datasets/coco_stuff27",),
    "configs/Base-student.yaml": ("methods/Base-student",),
    "configs/Base-MaskCLIP-plus.yaml": ("methods/maskclip_plus",),
    "configs/Base-ReCLIP-CVPR24.yaml": ("methods/reclip_rectify",),
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_an_old_name_says_what_replaces_it(empty_folder, name, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config-file", name])
    new = " ".join(f"--config-file configs/{file}.yaml" for file in OLD_NAMES[name])
    assert capsys.readouterr().err == f"error: config file {name} no longer exists: give {new}\n"
    assert stop.value.code == 2


def test_an_old_name_as_a_base(empty_folder):
    (empty_folder / "mine.yaml").write_text("_BASE_: configs/voc20/Base-voc20.yaml\nSEED: 1\n")
    with pytest.raises(ReclipError, match=r"give --config-file configs/datasets/voc20\.yaml$"):
        load_config("mine.yaml")


def test_an_old_name_that_exists_is_taken(empty_folder):
    own = empty_folder / "configs" / "voc20" / "maskclip.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("SEED: 7\n")
    assert load_config("configs/voc20/maskclip.yaml").SEED == 7


# ---- several files ----------------------------------------------------------------------------------------------

DATASET = """
_DATASET_: photos
HYPOTHESIS: {THRESHOLD: 0.1}
SOLVER: {IMS_PER_BATCH: 4}
_METHODS_:
  rectify: {SOLVER: {MAX_ITER: 7}}
  conference: {HYPOTHESIS: {THRESHOLD: 0.3}}
  student: {SOLVER: {MAX_ITER: 9}}
"""
METHODS = {
    "rectify": "_METHOD_: rectify\nSOLVER: {BASE_LR: 0.5}\nOUTPUT_DIR: output/{_DATASET_}/rectify\n",
    "conference": "_METHOD_: conference\n_BASE_: rectify.yaml\nHYPOTHESIS: {METHOD: image, THRESHOLD: 0.2}\n"
    "OUTPUT_DIR: output/{_DATASET_}/conference\n",
    "student": "_METHOD_: student\nSOLVER: {MAX_ITER: 8}\n",
    "distill": "_METHOD_: distill\n_BASE_: [conference.yaml, student.yaml]\n"
    "MODEL: {TEACHER: {WEIGHTS: 'output/{_DATASET_}/conference/a.pth'}}\n",
}


@pytest.fixture
def files(empty_folder):
    (empty_folder / "photos.yaml").write_text(DATASET)
    for name, text in METHODS.items():
        (empty_folder / f"{name}.yaml").write_text(text)
    return empty_folder


def test_later_files_win_over_earlier_ones_and_overrides_over_both(files):
    (files / "a.yaml").write_text("SEED: 1\nSOLVER: {MAX_ITER: 2, BASE_LR: 0.25}\n")
    (files / "b.yaml").write_text("SEED: 3\nSOLVER: {MAX_ITER: 4}\n")
    cfg = load_config(["a.yaml", "b.yaml"], ["SOLVER.MAX_ITER", "5"])
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (3, 5, 0.25)
    assert load_config(["b.yaml", "a.yaml"]).SOLVER.MAX_ITER == 2
    assert load_config([]) == load_config("") == load_config([""])


@pytest.mark.parametrize(
    ("method", "threshold", "iterations"),
    [("rectify", 0.1, 7), ("conference", 0.3, 7), ("student", 0.1, 9), ("distill", 0.3, 9)],
)
def test_a_section_is_merged_after_its_method_also_where_that_is_a_base(files, method, threshold, iterations):
    cfg = load_config(["photos.yaml", f"{method}.yaml"])
    assert (cfg.HYPOTHESIS.THRESHOLD, cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (threshold, iterations, 4)


def test_one_file_can_name_both_as_its_bases(files):
    (files / "mine.yaml").write_text("_BASE_: [photos.yaml, distill.yaml]\nSEED: 5\n")
    cfg = load_config("mine.yaml")
    assert (cfg.SEED, cfg.HYPOTHESIS.THRESHOLD, cfg.SOLVER.MAX_ITER) == (5, 0.3, 9)


def test_sections_are_merged_over_those_of_the_base(files):
    (files / "more.yaml").write_text(
        "_BASE_: photos.yaml\n_DATASET_: more\n_METHODS_: {rectify: {SOLVER: {GAMMA: 0.5}, SEED: 6}}\n"
    )
    cfg = load_config(["more.yaml", "rectify.yaml"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.GAMMA, cfg.SEED, cfg.OUTPUT_DIR) == (7, 0.5, 6, "output/more/rectify")


def test_the_data_sets_name_in_values(files):
    cfg = load_config(["photos.yaml", "distill.yaml"])
    assert (cfg.OUTPUT_DIR, cfg.MODEL.TEACHER.WEIGHTS) == ("output/photos/conference", "output/photos/conference/a.pth")
    assert load_config("rectify.yaml", ["OUTPUT_DIR", "out"]).OUTPUT_DIR == "out"
    assert load_config("photos.yaml", ["OUTPUT_DIR", "{_DATASET_}"]).OUTPUT_DIR == "{_DATASET_}"  # of files alone


@pytest.mark.parametrize(
    ("names", "text", "words"),
    [
        (["rectify.yaml"], "", "rectify.yaml: OUTPUT_DIR is output/{_DATASET_}/rectify, but no file defines"),
        (["distill.yaml", "photos.yaml"], "", "photos.yaml has _METHODS_ for rectify: give it before rectify.yaml"),
        (
            ["new.yaml", "rectify.yaml"],
            "_METHODS_: {rectify: {NONE: 1}}",
            "new.yaml, _METHODS_ rectify: there is no key NONE",
        ),
        (["new.yaml"], "_METHODS_: [rectify]", "must be METHOD: lines"),
        (["new.yaml"], "_METHODS_: {rectify: 3}", "must be METHOD: lines"),
        (["new.yaml"], "_DATASET_: [1]", "_DATASET_ is [1]; it must be a name"),
        (["new.yaml"], "_METHOD_: ''", "_METHOD_ is ''; it must be a name"),
        (["photos.yaml", "new.yaml"], "NONE: 1", "config file new.yaml: there is no key NONE"),
        (["photos.yaml", "none.yaml"], "", "config file none.yaml does not exist"),
    ],
)
def test_mistakes(files, names, text, words):
    (files / "new.yaml").write_text(f"{text or 'SEED: 1'}\n")
    with pytest.raises(ReclipError) as caught:
        load_config(names)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["_METHODS_: {a: {SEED: 1}}", "_METHOD_: a", "_DATASET_: a"])
def test_a_models_own_config_has_none_of_these_keys(files, key):
    (files / "new.yaml").write_text(f"SEED: 1\n{key}\n")
    with pytest.raises(ReclipError, match=f"has {key.partition(':')[0]}"):
        load_config("new.yaml", bases=False)


def test_the_argument_is_repeated():
    parser = argparse.ArgumentParser()
    add_config_file_argument(parser)
    assert parser.parse_args([]).config_file == []
    assert parser.parse_args(["--config-file", "a", "--config-file", "b"]).config_file == ["a", "b"]


# ---- python -m reclip_d2.config ---------------------------------------------------------------------------------


def test_the_printed_config_names_where_each_value_comes_from(files, capsys):
    main(["--config-file", "photos.yaml", "--config-file", "conference.yaml", "SEED", "4", "SOLVER.BASE_LR", "1"])
    text = capsys.readouterr().out
    assert text.splitlines() == [
        "HYPOTHESIS:",
        "  METHOD: image  # conference.yaml",
        "  THRESHOLD: 0.3  # photos.yaml, _METHODS_ conference",
        "OUTPUT_DIR: output/photos/conference  # conference.yaml",
        "SEED: 4  # command line",
        "SOLVER:",
        "  BASE_LR: 1.0  # command line",
        "  IMS_PER_BATCH: 4  # photos.yaml",
        "  MAX_ITER: 7  # photos.yaml, _METHODS_ rectify",
    ]
    (files / "printed.yaml").write_text(text)
    expected = load_config(["photos.yaml", "conference.yaml"], ["SEED", "4", "SOLVER.BASE_LR", "1"])
    assert load_config("printed.yaml") == expected
    main(["--all", "--config-file", "printed.yaml"])
    (files / "all.yaml").write_text(capsys.readouterr().out)
    assert json.dumps(flatten(load_config("all.yaml"))) == json.dumps(flatten(expected))  # tuples become lists


def test_a_mistake_is_one_line(files, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config-file", "none.yaml"])
    assert stop.value.code == 1 and capsys.readouterr().err.count("\n") == 1
