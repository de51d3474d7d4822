"""From an experiment to the config that it runs with, and what two such configs differ in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from reclip_d2.config import load_config
from reclip_d2.config.flat import flatten
from reclip_d2.errors import ReclipError
from reclip_d2.experiments.suite import Experiment, Suite

_CHECKPOINTS = ("MODEL.TEACHER.WEIGHTS", "LINEAR_PROBE.WEIGHTS")
MADE_WITH = "teacher"
"""Entry of a run's settings: fingerprint of the run whose checkpoint it uses."""


def value_of(cfg: CfgNode, key: str) -> Any:  # noqa: ANN401
    """Value of ``A.B.C``.

    Raises:
        ReclipError: there is no such key.
    """
    for part in key.split("."):
        if not isinstance(cfg, CfgNode) or part not in cfg:
            raise ReclipError(f"there is no config key {key}: see reclip_d2/config/keys.py")
        cfg = cfg[part]
    return cfg


def experiment_options(suite: Suite, experiment: Experiment) -> dict[str, Any]:
    """``{KEY: value}`` overrides of an experiment: the suite's, those taken from other configs, its own."""
    options = dict(suite.common)
    for name, keys in experiment.take.items():
        cfg = load_config(str(suite.config_file(name)))
        options.update({key: value_of(cfg, key) for key in keys})
    return {**options, **experiment.overrides}


def resolve(suite: Suite, experiment: Experiment, options: Sequence[Any] = ()) -> CfgNode:
    """Config of an experiment.

    Args:
        options: further ``KEY value`` pairs, which win.

    Raises:
        ReclipError: a config file or key is wrong; the message names the experiment.
    """
    own = [part for item in experiment_options(suite, experiment).items() for part in item]
    try:
        return load_config(str(suite.config_file(experiment.config)), [*own, *options])
    except ReclipError as error:
        raise ReclipError(f"experiment {experiment.key} of suite {suite.name}: {error}") from error


def settings_of(cfg: CfgNode, kind: str, teacher_fingerprint: str) -> dict[str, Any]:
    """All that a run's result depends on, flat and fit for JSON: config values by key, the kind, the teacher's run.

    Args:
        teacher_fingerprint: of the run whose checkpoint this one uses, in the place of the checkpoint's path; "" for
            none.
    """
    left_out = ("OUTPUT_DIR", *(_CHECKPOINTS if teacher_fingerprint else ()))
    flat = {key: value for key, value in flatten(cfg).items() if key not in left_out}
    return json.loads(json.dumps({**flat, "kind": kind, MADE_WITH: teacher_fingerprint}))


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Short hash of a run's settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the settings that a run was made with and those that it would be made with now.

    A key that the project has got since then is no difference at its default, nor is one that it has no more.
    """
    defaults: dict[str, Any] | None = None
    found = []
    for key, value in now.items():
        if key in before:
            then = before[key]
        else:
            defaults = defaults or json.loads(json.dumps(flatten(load_config(""))))
            then = defaults.get(key)
        if then != value:
            found.append(f"{key} is {value!r} now and was {then!r}")
    return found


def checkpoint_options(experiment: Experiment, checkpoint: Path | None) -> list[Any]:
    """``KEY value`` that names the teacher's checkpoint, if there is one."""
    if checkpoint is None:
        return []
    return ["LINEAR_PROBE.WEIGHTS" if experiment.kind == "probe" else "MODEL.TEACHER.WEIGHTS", str(checkpoint)]
