"""Every key has a rule, and rules accept only values that the key can use. The tests cover the whole table of rules."""

import ast
import functools
import inspect
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2 import modeling, solver
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build as data_build
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.evaluation import verify_results
from detectron2.solver import build as solver_build

from reclip_d2.backbones.query import TEMPLATE_SETS
from reclip_d2.config import RULES, check_config, load_config
from reclip_d2.config.checks import value_at
from reclip_d2.config.rules import Choice, Device, Fields, Flag, Items, Maybe, Number, Rule, Text, Whole, problem_of
from reclip_d2.errors import ReclipError

ROOT = Path(__file__).parents[2]
# Detectron2 reads them only where MODEL.LOAD_PROPOSALS is True, which its rule refuses.
UNREACHABLE = {"DATASETS.PROPOSAL_FILES_TEST", "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST"}


@functools.cache
def defaults() -> CfgNode:
    return load_config("")


def present() -> list[str]:
    """Keys of the table that the installed Detectron2 has."""
    return [key for key in RULES if isinstance(parent_of(defaults(), key), CfgNode)]


def parent_of(cfg: CfgNode, key: str) -> CfgNode | None:
    node: Any = cfg
    *nodes, leaf = key.split(".")
    for part in nodes:
        if part not in node:
            return None
        node = node[part]
    return node if leaf in node else None


# ---- bad and good values of each kind of rule, made without asking the rule ---------------------------------------

OTHER_TYPES = (None, "something else", "", [], {}, (1, 2, 3, 4, 5), [[]], b"bytes", 1j, {1}, object())


def bad_values(rule: Rule) -> Iterator[Any]:
    match rule:
        case Flag():
            yield from (*OTHER_TYPES, 0, 1, -1, math.nan, "True", [True])
        case Whole():
            yield from (*OTHER_TYPES, 1.5, float(rule.minimum), math.nan, math.inf, True, "3", [rule.minimum])
            yield from (-(10**30), 10**50, rule.maximum + 1)
            yield from (number for number in (rule.minimum - 1,) if number != rule.also)
            yield from ((rule.minimum + 1,) if rule.odd else ())
        case Number():
            yield from (*OTHER_TYPES, True, math.nan, -math.inf, "1", "nan", 10**400, -(10**400))
            yield from (() if rule.infinite else (math.inf,))
            yield from (() if rule.minimum == -math.inf else (rule.minimum - 1e-3,))
            yield from (() if rule.maximum == math.inf else (rule.maximum * 1.001 + 1,))
            yield from (() if rule.above == -math.inf else (rule.above, rule.above - 1))
            yield from (() if rule.below == math.inf else (rule.below, rule.below + 1))
        case Choice():
            yield from (value for value in OTHER_TYPES if value not in rule.values)
            yield from (math.nan, 3.25, 987654321, [rule.values[0]], f"{rule.values[0]} ")
            if isinstance(rule.values[0], int) and not isinstance(rule.values[0], bool):
                yield from (str(rule.values[0]), float(rule.values[0]), True)
        case Text():
            yield from (value for value in OTHER_TYPES if not isinstance(value, str))
            yield from (0, 1.5, True, math.nan, "a\0b", "a\nb", "\x1b[31m", "x" * 4097, ["a"])
            yield from (() if rule.empty else ("", " "))
            yield from (("s3://bucket/x", "http://host/x", "file:///x", "\udcff") if rule.folder else ())
        case Device():
            yield from (*OTHER_TYPES, 0, "mps", "meta", "xla", "gpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "cuda:1234")
        case Items():
            yield from (value for value in OTHER_TYPES if not isinstance(value, list | tuple))
            yield from (3, 1.5, True)
            inner = good_values(rule.item)[0]
            yield from ([inner] * count for count in (rule.minimum - 1,) if count >= 0)
            yield from ([inner] * (rule.maximum + 1),)
            length = max(rule.minimum, 1)
            yield from ([*[inner] * (length - 1), bad] for bad in bad_values(rule.item))
        case Fields():
            yield from (*OTHER_TYPES, [good_values(item)[0] for item in rule.items][:-1])
            for place in range(len(rule.items)):
                for bad in bad_values(rule.items[place]):
                    yield [bad if i == place else good_values(item)[0] for i, item in enumerate(rule.items)]
        case Maybe():
            yield from (value for value in bad_values(rule.rule) if value is not None)
        case _:
            raise AssertionError(f"no bad values are known for {type(rule)}")


def good_values(rule: Rule) -> list[Any]:
    """Values at the rule's limits."""
    match rule:
        case Flag():
            return [True, False]
        case Whole():
            return [rule.minimum, *([rule.maximum] if not rule.odd or rule.maximum % 2 else []), *_known(rule.also)]
        case Number():
            low = rule.minimum if rule.minimum > -math.inf else rule.above + 1e-9 if rule.above > -math.inf else -1e9
            high = rule.maximum if rule.maximum < math.inf else rule.below - 1e-9 if rule.below < math.inf else 1e9
            return [low, high, *_known(rule.also), *([math.inf] if rule.infinite else [])]
        case Choice():
            return list(rule.values)
        case Text():
            return ["x", "a folder/häuser.pth", "x" * 4096, *([""] if rule.empty else [])]
        case Device():
            return ["cpu", "cuda", "cuda:0", "cuda:15"]
        case Items():
            return [
                kind([item] * count)
                for kind in (list, tuple)
                for item in good_values(rule.item)
                for count in {rule.minimum, min(rule.maximum, 20)}
            ]
        case Fields():
            return [[good_values(item)[0] for item in rule.items]]
        case Maybe():
            return [None, *good_values(rule.rule)]
    raise AssertionError(f"no good values are known for {type(rule)}")


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]


@pytest.mark.parametrize("key", present())
def test_bad_values_of_a_key_are_refused_in_a_line_that_names_it(key):
    cfg = load_config("").clone()
    node, leaf = parent_of(cfg, key), key.rpartition(".")[2]
    count = 0
    for value in bad_values(RULES[key]):
        dict.__setitem__(node, leaf, value)
        with pytest.raises(ReclipError) as caught:
            check_config(cfg)
        message = str(caught.value)
        assert message.startswith(f"{key} is ") and "\n" not in message and len(message) < 600, value
        count += 1
    assert count > 8


@pytest.mark.parametrize("key", RULES)
def test_values_at_the_limits_are_taken(key):
    rule = RULES[key]
    values = good_values(rule)
    assert values
    for value in values:
        assert problem_of(rule, value) is None, value


def test_the_defaults_are_taken():
    for key in present():
        assert problem_of(RULES[key], value_at(defaults(), key)) is None, key
    check_config(defaults())


@pytest.mark.parametrize("key", present())
def test_a_bad_value_on_the_command_line_names_the_key(key):
    for value in ("{1: 2}", {"A": 1}, "b'x'"):
        if isinstance(RULES[key], Text) and isinstance(value, str) and value.startswith("{1"):
            continue
        with pytest.raises(ReclipError) as caught:
            load_config("", [key, value])
        assert str(caught.value).startswith(f"{key} is ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SEED", "4294967296"),
        ("SEED", "-2"),
        ("SEED", "None"),
        ("MODEL.DEVICE", "mps"),
        ("MODEL.DEVICE", "meta"),
        ("MODEL.DEVICE", "xla"),
        ("HYPOTHESIS.WINDOW_RATIO", ".001"),
        ("SOLVER.BASE_LR", "nan"),
        ("SOLVER.BASE_LR", "-1"),
        ("SOLVER.MAX_ITER", "0"),
        ("SOLVER.IMS_PER_BATCH", "0"),
        ("SOLVER.CHECKPOINT_PERIOD", "0"),
        ("SOLVER.LR_SCHEDULER_NAME", "Cosine"),
        ("SOLVER.WARMUP_METHOD", "cubic"),
        ("SOLVER.STEPS", "(30, 10)"),
        ("SOLVER.REFERENCE_WORLD_SIZE", "5"),
        ("SOLVER.ACCUMULATE_STEPS", "13"),
        ("DATALOADER.NUM_WORKERS", "-1"),
        ("MODEL.PIXEL_STD", "[0, 1, 1]"),
        ("MODEL.PIXEL_MEAN", "[1, 2]"),
        ("MODEL.STUDENT.PIXEL_STD", "[1.0, 'a', 1.0]"),
        ("INPUT.MIN_SIZE_TRAIN", "()"),
        ("INPUT.MAX_SIZE_TRAIN", "0"),
        ("INPUT.CROP.SIZE", "[0, 5]"),
        ("INPUT.CROP.SIZE", "[5.5, 5.5]"),
        ("INPUT.CROP.SIZE", "[5]"),
        ("INPUT.CROP.TYPE", "circle"),
        ("INPUT.TILES.SIZE", "1"),
        ("INPUT.TILES.OVERLAP", "0.99"),
        ("MODEL.MASK_DECODER.NORM", "XN"),
        ("MODEL.RESNETS.DEPTH", "20"),
        ("MODEL.CLIP.TEMPLATES", "none"),
        ("TEST.EXPECTED_RESULTS", "[['sem_seg', 'mIoU', 3]]"),
        ("OUTPUT_DIR", "s3://bucket/x"),
        ("OUTPUT_DIR", ""),
        ("MODEL.LOAD_PROPOSALS", "True"),
    ],
)
def test_values_that_once_ended_in_a_traceback_or_late(key, value):
    with pytest.raises(ReclipError) as caught:
        load_config("", [key, value])
    assert key in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", "[2, 2]"], "INPUT.CROP.SIZE"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "(5,)"], "INPUT.MIN_SIZE_TRAIN"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "(9, 5)"], "INPUT.MIN_SIZE_TRAIN"),
        (["SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0"], "SOLVER.NESTEROV"),
        (["SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE_STEPS", "5"], "SOLVER.ACCUMULATE_STEPS"),
        (["HYPOTHESIS.METHOD", "imported", "HYPOTHESIS.FILE", "x", "HYPOTHESIS.CLASSES_PER_IMAGE", "2"], "imported"),
    ],
)
def test_keys_that_contradict_each_other(pairs, expected):
    with pytest.raises(ReclipError, match=expected):
        load_config("", pairs)


def test_good_values_of_several_keys():
    pairs = {
        "INPUT.CROP.TYPE": "relative", "INPUT.CROP.SIZE": "[0.5, 1]", "SEED": "-1", "MODEL.DEVICE": "cuda:3",
        "SOLVER.BASE_LR": "1", "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "1e999", "MODEL.PIXEL_STD": "(1, 1, 1)",
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range", "INPUT.MIN_SIZE_TRAIN": "[5, 9]", "SOLVER.WEIGHT_DECAY_BIAS": "None",
    }  # fmt: skip
    cfg = load_config("", [part for pair in pairs.items() for part in pair])
    assert cfg.SOLVER.BASE_LR == 1.0 and isinstance(cfg.SOLVER.BASE_LR, float)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (5, 9) and cfg.MODEL.PIXEL_STD == [1, 1, 1]


def test_template_sets_are_the_choices():
    assert set(RULES["MODEL.CLIP.TEMPLATES"].values) == set(TEMPLATE_SETS)


# ---- every key that is read has a rule ----------------------------------------------------------------------------


def chain_of(node: ast.expr, names: dict[str, str]) -> str | None:
    """Full key of ``cfg.A.B``, or of ``x.B`` where ``x = cfg.A``; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute) and node.attr.isupper():
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Attribute) and node.attr == "cfg":
        root = ""
    elif isinstance(node, ast.Name) and node.id in names:
        root = names[node.id]
    else:
        return None
    return ".".join(filter(None, [root, *reversed(parts)]))


def keys_read(source: str) -> set[str]:
    """Full keys below a config that a source names."""
    found: set[str] = set()
    tree = ast.parse(source)
    scopes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] or [tree]
    for scope in scopes:
        names = {"cfg": ""}
        for _ in range(2):  # an alias of an alias
            for node in ast.walk(scope):
                if not isinstance(node, ast.Assign):
                    continue
                for target in node.targets:
                    paired = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                    pairs = zip(target.elts, node.value.elts, strict=False) if paired else [(target, node.value)]
                    for name, value in pairs:
                        if isinstance(name, ast.Name) and (chain := chain_of(value, names)):
                            names[name.id] = chain
        found |= {
            chain for node in ast.walk(scope) if isinstance(node, ast.Attribute) and (chain := chain_of(node, names))
        }
    return found


def leaves_of(chains: set[str]) -> set[str]:
    """Those that are keys of a config, not nodes of it."""
    cfg = defaults()
    return {
        chain
        for chain in chains
        if (parent := parent_of(cfg, chain)) is not None and not isinstance(parent[chain.rpartition(".")[2]], CfgNode)
    }


def test_every_key_that_the_project_reads_has_a_rule():
    files = [*(ROOT / "reclip_d2").rglob("*.py"), ROOT / "train_net.py"]
    files += [*(ROOT / "tools").glob("*.py"), *(ROOT / "demo").glob("*.py")]
    read = leaves_of(set().union(*(keys_read(path.read_text(encoding="utf-8")) for path in files)))
    assert len(read) > 100 and {"MODEL.RESNETS.DEPTH", "TEST.SLIDING_WINDOW.SIZE", "SOLVER.MAX_ITER"} <= read
    assert read - set(RULES) == set()


def test_every_key_that_detectron2_reads_for_us_has_a_rule():
    parts = [
        default_setup,
        DefaultTrainer,
        verify_results,
        data_build._test_loader_from_config,
        modeling.build_model,
        inspect.unwrap(modeling.build_resnet_backbone),
        solver_build.build_optimizer,
        solver_build.maybe_add_gradient_clipping,
        solver.build_lr_scheduler,
    ]
    sources = [textwrap.dedent(inspect.getsource(part)) for part in parts]
    read = leaves_of(set().union(*map(keys_read, sources)))
    assert {"SOLVER.CHECKPOINT_PERIOD", "TEST.PRECISE_BN.NUM_ITER", "SOLVER.GAMMA"} <= read
    assert read - set(RULES) - UNREACHABLE == set()


def test_the_scan_would_find_a_key_without_a_rule():
    source = (
        "def f(self, cfg):\n    a, b = cfg.MODEL, self.cfg.TEST\n    c = a.ROI_HEADS\n    return c.NAME + b.AUG.FLIP"
    )
    assert leaves_of(keys_read(source)) == {"MODEL.ROI_HEADS.NAME", "TEST.AUG.FLIP"}
    assert not {"MODEL.ROI_HEADS.NAME", "TEST.AUG.FLIP"} & set(RULES)


def test_rules_name_keys_that_exist():
    newer = {
        "FLOAT32_PRECISION", "SOLVER.BASE_LR_END", "SOLVER.NUM_DECAYS", "SOLVER.RESCALE_INTERVAL",
    }  # fmt: skip
    theirs = get_cfg()
    assert {key for key in RULES if key not in present()} <= newer
    assert parent_of(theirs, "SOLVER.BASE_LR") is not None
