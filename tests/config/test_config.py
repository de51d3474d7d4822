"""The configuration: every key is explained and read, and mistakes are one line."""

import inspect
import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from reclip_d2.config import KEYS, check_config, keys, load_config, read_yaml
from reclip_d2.config.checks import value_at
from reclip_d2.config.keys import PATH_KEYS
from reclip_d2.errors import ReclipError
from tests.helpers import config_files

ROOT = Path(__file__).parents[2]
DATASETS = sorted(path.stem for path in (ROOT / "configs" / "datasets").glob("[!B]*.yaml"))
METHODS = sorted(path.stem for path in (ROOT / "configs" / "methods").glob("[!B]*.yaml"))


def assigned_keys() -> list[tuple[str, int]]:
    """Keys of the table, with the line of its source."""
    lines = inspect.getsource(keys).splitlines()
    return [
        (match[1], number) for number, line in enumerate(lines) if (match := re.match(r'    "([A-Z_.0-9]+)": ', line))
    ]


def own_keys() -> list[str]:
    """Keys that Detectron2 does not have."""
    theirs = get_cfg()

    def known(key: str) -> bool:
        node = theirs
        for part in key.split("."):
            if part not in node:
                return False
            node = node[part]
        return True

    return [key for key, _ in assigned_keys() if not known(key)]


def sources() -> str:
    files = [*(ROOT / "reclip_d2").rglob("*.py"), ROOT / "train_net.py"]
    return "\n".join(path.read_text() for path in files if path.parent.name != "config")


def is_read(key: str, text: str) -> bool:
    """Whether ``cfg.<key>`` occurs, or its end below a node that was given a name (``window = cfg.TEST...``), or the
    key as an option of a dense attention, or as that of a rule of class pruning."""
    if re.search(rf'cfg\.{re.escape(key)}\b|("\w+":| key =) "{re.escape(key)}"', text):
        return True
    node, _, leaf = key.rpartition(".")
    names = re.findall(rf"(\w+)(?:\s*:\s*\w+)? = (?:self\.)?cfg\.{re.escape(node)}\b(?!\.)", text)
    return any(re.search(rf"\b{name}\.{leaf}\b", text) for name in names)


def test_the_scan_finds_the_keys():
    own = own_keys()
    assert {key for key, _ in assigned_keys()} == set(KEYS) and len(own) > 80
    assert {"MODEL.CLIP.NAME", "MODEL.BIAS_HEAD.RECTIFICATION", "HYPOTHESIS.THRESHOLD", "SOLVER.POLY_POWER"} <= set(own)
    assert "SOLVER.BASE_LR" not in own


@pytest.mark.parametrize("key", own_keys())
def test_every_key_is_read_somewhere(key):
    assert is_read(key, sources()), f"{key} is read nowhere"


def test_a_key_that_nobody_reads_would_be_found():
    assert not is_read("MODEL.CLIP.NOTHING", sources())
    assert not is_read("TEST.SLIDING_WINDOW.NOTHING", sources())


def test_every_key_has_a_comment():
    """The line above it, or the line above its group of consecutive keys."""
    lines = inspect.getsource(keys).splitlines()
    own = set(own_keys())
    for key, number in assigned_keys():
        if key not in own:
            continue
        above = number - 1
        while not lines[above].lstrip().startswith("#") and lines[above].strip():
            above -= 1
        comment = lines[above].strip()
        assert comment.startswith("#") and not comment.startswith("# ----"), f"{key} has no comment of its own"


def test_defaults_are_the_papers():
    cfg = load_config("")
    assert cfg.MODEL.CLIP.TEMPLATES == "imagenet_scene" and cfg.MODEL.BIAS_HEAD.PROMPT_LENGTH == 73
    assert pytest.approx(1 / 6) == cfg.HYPOTHESIS.WINDOW_RATIO
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.POLY_POWER) == (
        0.01,
        0.9,
        5e-4,
        0.9,
    )
    assert (cfg.MODEL.LOSS.CONTRASTIVE_WEIGHT, cfg.MODEL.LOSS.COVERAGE_WEIGHT, cfg.MODEL.LOSS.OUTSIDE_WEIGHT) == (
        1,
        0,
        0,
    )
    assert not cfg.HYPOTHESIS.CALIBRATED and cfg.MODEL.MASKCLIP.CALIBRATION == "none" and cfg.INPUT.COLOR_JITTER == 0
    # CLIP's statistics, in units of 255.
    assert [v / 255 for v in cfg.MODEL.PIXEL_MEAN] == pytest.approx([0.48145466, 0.4578275, 0.40821073], abs=1e-5)
    assert [v / 255 for v in cfg.MODEL.PIXEL_STD] == pytest.approx([0.26862954, 0.26130258, 0.27577711], abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_method_has_a_config_on_every_data_set(dataset, method):
    cfg = load_config(config_files(dataset, method))
    assert cfg.OUTPUT_DIR == f"output/{'custom' if dataset.startswith('custom') else dataset}/{method}"
    assert cfg.MODEL.BACKBONE.NAME == "DenseCLIP" and cfg.SEED == 0 and len(cfg.DATASETS.TRAIN) == 1
    architecture = "MaskCLIP" if method == "maskclip" else "RectifiedCLIP"
    if "plus" in method or "distill" in method:
        architecture = "Distillation"
        assert cfg.MODEL.RESNETS.DEPTH == (18 if "embedded" in dataset else 50 if dataset == "custom" else 101)
    assert cfg.MODEL.META_ARCHITECTURE == architecture
    teachers = {"reclip_distill": "reclip_rectify", "reclippp_distill": "reclippp_rectify"}
    teachers |= {"reclippp_ext_distill": "reclippp_ext", "reclippp_shares_distill": "reclippp_shares"}
    if method in teachers:
        folder = load_config(config_files(dataset, teachers[method])).OUTPUT_DIR
        assert cfg.MODEL.TEACHER.WEIGHTS == f"{folder}/model_final.pth"


def test_all_files_are_there():
    assert DATASETS == [
        "ade150", "cityscapes19", "coco_stuff27", "context59", "custom", "custom-reclip-embedded", "embedded",
        "embedded_longtail", "voc20",
    ]  # fmt: skip
    assert METHODS == [
        "maskclip", "maskclip_plus", "masks_distill", "reclip-as-released", "reclip_distill", "reclip_rectify",
        "reclippp-as-released", "reclippp_distill",
        "reclippp_ext", "reclippp_ext_distill", "reclippp_rectify", "reclippp_shares", "reclippp_shares_distill",
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "datasets").glob("*.yaml")), ids=lambda path: path.stem)
def test_sections_are_of_methods_that_exist(path):
    sections = read_yaml(path, "config file").get("_METHODS_", {})
    methods, protocols = (
        {read_yaml(file, "config file")["_METHOD_"] for file in (ROOT / "configs" / folder).glob("*.yaml")}
        for folder in ("methods", "protocols")
    )
    assert set(sections) <= methods | protocols and methods == {*METHODS, "student"}


@pytest.mark.parametrize(
    ("dataset", "protocol", "side", "window"),
    [
        ("voc20", "sliding_224", 336, 224),
        ("cityscapes19", "sliding_224", 560, 224),
        ("ade150", "sliding_224", 336, 224),
        ("context59", "sliding_336", 336, 336),
        ("cityscapes19", "sliding_336", 448, 224),
        ("ade150", "sliding_336", 448, 336),
    ],
)
def test_protocols_of_training_free_methods(dataset, protocol, side, window):
    cfg = load_config([*config_files(dataset, "maskclip"), str(ROOT / "configs" / "protocols" / f"{protocol}.yaml")])
    assert (side, 2048) == (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    assert cfg.TEST.SLIDING_WINDOW.ENABLED and list(cfg.TEST.SLIDING_WINDOW.SIZE) == [window, window]
    assert list(cfg.TEST.SLIDING_WINDOW.STRIDE) == [112, 112] and cfg.MODEL.CLIP.TEMPLATES == "imagenet"
    assert cfg.MODEL.META_ARCHITECTURE == "MaskCLIP" and cfg.OUTPUT_DIR == f"output/{dataset}/maskclip"


# Data set, method: values of its merged config, by hand from the papers, their supplements and docs/results.md.
VALUES = {
    ("voc20", "reclippp_rectify"): {"HYPOTHESIS.THRESHOLD": 0.07, "SOLVER.MAX_ITER": 24400},
    ("voc20", "reclip_rectify"): {"HYPOTHESIS.THRESHOLD": 0.23, "SOLVER.MAX_ITER": 24400, "MODEL.GUMBEL.TAU": 0.001},
    ("voc20", "reclip_distill"): {"HYPOTHESIS.THRESHOLD": 0.23, "SOLVER.MAX_ITER": 12200, "MODEL.GUMBEL.TAU": 0.001},
    ("context59", "maskclip_plus"): {"SOLVER.MAX_ITER": 20825, "MODEL.STUDENT.HEAD": "query"},
    ("ade150", "reclippp_distill"): {"HYPOTHESIS.THRESHOLD": 0.0, "SOLVER.MAX_ITER": 50525, "SOLVER.IMS_PER_BATCH": 8},
    ("embedded", "maskclip"): {"HYPOTHESIS.THRESHOLD": 0.0, "MODEL.GUMBEL.TAU": 0.0, "DATALOADER.NUM_WORKERS": 1},
    ("embedded", "reclippp_rectify"): {
        "HYPOTHESIS.THRESHOLD": 0.02, "MODEL.GUMBEL.TAU": 2.0, "MODEL.LOSS.TAU": 1.0, "SOLVER.MAX_ITER": 200,
        "MODEL.BIAS_HEAD.PROMPT_LENGTH": 4, "SOLVER.CHECKPOINT_PERIOD": 100, "TEST.EVAL_PERIOD": 200,
        "SOLVER.OPTIMIZER": "SGD",
    },
    ("embedded", "reclip_rectify"): {
        "HYPOTHESIS.THRESHOLD": 0.4, "MODEL.GUMBEL.TAU": 0.03, "MODEL.LOSS.TAU": 2.0, "SOLVER.MAX_ITER": 200,
    },
    ("embedded", "reclippp_ext"): {
        "HYPOTHESIS.THRESHOLD": 0.05, "MODEL.GUMBEL.TAU": 1.0, "MODEL.LOSS.TAU": 0.3, "MODEL.LOSS.COVERAGE_WEIGHT": 5.0,
        "MODEL.CLIP.PRETRAINED": "openai",
    },
    ("embedded", "reclippp_ext_distill"): {
        "HYPOTHESIS.THRESHOLD": 0.05, "SOLVER.OPTIMIZER": "AdamW", "SOLVER.BASE_LR": 0.004, "SOLVER.MAX_ITER": 600,
        "TEST.EVAL_PERIOD": 600, "MODEL.STUDENT.WEIGHTS": "", "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    },
    ("embedded_longtail", "reclippp_rectify"): {
        "MODEL.CLIP.PRETRAINED": "embedded_longtail", "DATASETS.TRAIN": ("embedded_longtail_train",),
        "DATASETS.TEST": ("embedded_longtail_val",), "MODEL.GUMBEL.TAU": 2.0, "SOLVER.MAX_ITER": 200,
    },
    ("custom", "reclippp_rectify"): {"HYPOTHESIS.THRESHOLD": 0.02, "SOLVER.MAX_ITER": 4000, "DATASETS.TEST": ()},
    ("custom", "reclip_rectify"): {"HYPOTHESIS.METHOD": "image", "HYPOTHESIS.CLASSES_PER_IMAGE": 2.5},
    ("custom", "reclippp_distill"): {"MODEL.STUDENT.WEIGHTS": "torchvision://resnet50/IMAGENET1K_V1"},
    ("custom-reclip-embedded", "reclippp_rectify"): {
        "INPUT.MIN_SIZE_TEST": 96, "SOLVER.MAX_ITER": 200, "SOLVER.CHECKPOINT_PERIOD": 20, "TEST.EVAL_PERIOD": 0,
        "MODEL.GUMBEL.TAU": 2.0, "INPUT.CROP.ENABLED": True, "INPUT.CROP.SIZE": [96, 96],
    },
    ("custom-reclip-embedded", "reclippp_distill"): {
        "SOLVER.MAX_ITER": 600, "SOLVER.CHECKPOINT_PERIOD": 20, "MODEL.STUDENT.WEIGHTS": "", "TEST.EVAL_PERIOD": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize(("dataset", "method"), VALUES)
def test_values_of_a_method_on_a_data_set(dataset, method):
    cfg = load_config(config_files(dataset, method))
    assert {key: value_at(cfg, key) for key in VALUES[dataset, method]} == VALUES[dataset, method]


def test_overrides():
    cfg = load_config(
        "", ["MODEL.CLIP.NAME", "ViT-L-14", "SOLVER.BASE_LR", "0.5", "DATASETS.TRAIN", "('a', 'b')", "SEED", "3"]
    )
    assert (cfg.MODEL.CLIP.NAME, cfg.SOLVER.BASE_LR, cfg.DATASETS.TRAIN, cfg.SEED) == ("ViT-L-14", 0.5, ("a", "b"), 3)


def test_the_home_folder_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {key: "~/x" for key in PATH_KEYS}
    cfg = load_config("", [part for pair in paths.items() for part in pair])
    for key in PATH_KEYS:
        assert value_at(cfg, key) == f"{tmp_path}/x"
    assert load_config("", ["MODEL.WEIGHTS", "a~/b"]).MODEL.WEIGHTS == "a~/b"
    assert load_config("", ["OUTPUT_DIR", "~nobody_of_that_name/b"]).OUTPUT_DIR == "~nobody_of_that_name/b"


def test_overrides_beat_the_file_which_beats_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("SEED: 1\nMODEL:\n  CLIP:\n    NAME: base\n    TEMPLATES: photo\n")
    (tmp_path / "top.yaml").write_text("_BASE_: base.yaml\nSEED: 2\nMODEL:\n  CLIP:\n    NAME: top\n")
    cfg = load_config(str(tmp_path / "top.yaml"), ["SEED", "3"])
    assert (cfg.SEED, cfg.MODEL.CLIP.NAME, cfg.MODEL.CLIP.TEMPLATES) == (3, "top", "photo")


# ---- mistakes -------------------------------------------------------------------------------------------------


def message_of(config_file: str = "", opts: tuple = ()) -> str:
    with pytest.raises(ReclipError) as caught:
        load_config(config_file, opts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def file_message(tmp_path, content: str | bytes) -> str:
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = message_of(str(path))
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("FOO: 1", "FOO"),
        ("MODEL:\n  CLIP:\n    NAM: x", "MODEL.CLIP.NAM"),
        ("SEED: abc", "SEED"),
        ("MODEL:\n  CLIP: null", "MODEL.CLIP"),
        ("", "has no keys"),
        ("# nothing", "has no keys"),
        ("- a", "has no keys"),
        ("3", "has no keys"),
        ("hello", "has no keys"),
        ("1: 2", ""),
        ("MODEL: {1: 2}", ""),
        ("a: [1", "not plain YAML"),
        ("a:\n\t- b", "not plain YAML"),
        (b"\xff\xfe\x00", "UTF-16"),
        ("_BASE_: none.yaml", "none.yaml does not exist"),
        ("_BASE_: config.yaml", ""),
    ],
)
def test_mistakes_in_a_file(tmp_path, content, expected):
    assert expected in file_message(tmp_path, content)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_python_in_yaml_is_not_run(tmp_path, tag):
    marker = tmp_path / "marker"
    message = file_message(tmp_path, f'OUTPUT_DIR: {tag} ["{marker}"]')
    assert "not plain YAML" in message and not marker.exists()
    base = tmp_path / "base.yaml"
    base.write_text(f'OUTPUT_DIR: {tag} ["{marker}"]')
    file_message(tmp_path, "_BASE_: base.yaml")
    assert not marker.exists()


def test_missing_file(tmp_path):
    assert f"{tmp_path}/none.yaml does not exist" in message_of(f"{tmp_path}/none.yaml")
    assert "not a regular file" in message_of(str(tmp_path))


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["SEED"], "'SEED' has no value"),
        (["SEED", "1", "OUTPUT_DIR"], "'OUTPUT_DIR' has no value"),
        (["SEED", "1", "--eval-only"], "--eval-only comes after KEY VALUE pairs: put all options before"),
        (["SEED", "1", "--num-gpus", "2"], "--num-gpus comes after KEY VALUE pairs"),
        (["FOO", "1"], "FOO"),
        (["MODEL.CLIP.NAM", "x"], "MODEL.CLIP.NAM"),
        (["SEED", "abc"], "SEED"),
        (["MODEL.CLIP", "1"], "command line"),
        (["_BASE_", "x.yaml"], "_BASE_"),
        (["MODEL.CLIP.NAME.V.x", "1"], "command line"),
        (["", "1"], "command line"),
    ],
)
def test_mistakes_on_the_command_line(opts, expected):
    assert expected in message_of("", opts)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.MASK_DECODER.KERNEL_SIZE", "4"),
        ("MODEL.MASK_DECODER.KERNEL_SIZE", "-1"),
        ("MODEL.MASKCLIP.MEAN_FILTER", "2"),
        ("MODEL.MASKCLIP.MEAN_FILTER", "-3"),
        ("INPUT.FORMAT", "BGR"),
        ("INPUT.COLOR_JITTER", "1.0"),
        ("INPUT.COLOR_JITTER", "-0.1"),
        ("HYPOTHESIS.WINDOW_RATIO", "0.0"),
        ("HYPOTHESIS.WINDOW_RATIO", "1.5"),
        ("HYPOTHESIS.BATCH_SIZE", "-1"),
        ("MODEL.BIAS_HEAD.PROMPT_LENGTH", "-1"),
        ("MODEL.GUMBEL.TAU", "-0.1"),
        ("MODEL.LOSS.TAU", "-0.1"),
        ("TEST.SLIDING_WINDOW.STRIDE", "(0, 10)"),
        ("TEST.SLIDING_WINDOW.STRIDE", "(513, 512)"),
        ("TEST.SLIDING_WINDOW.SIZE", "(512,)"),
    ],
)
def test_a_value_out_of_range_names_its_key(key, value):
    assert key.rsplit(".", 1)[0] in message_of("", [key, value])


def test_good_values_pass():
    cfg = load_config(
        "", ["MODEL.MASKCLIP.MEAN_FILTER", "3", "HYPOTHESIS.WINDOW_RATIO", "1.0", "INPUT.COLOR_JITTER", "0.5"]
    )
    check_config(cfg)
