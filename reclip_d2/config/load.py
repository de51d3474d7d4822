"""Load a configuration file safely."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from reclip_d2.config.checks import check_config
from reclip_d2.config.keys import add_reclip_config
from reclip_d2.errors import ReclipError


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Detectron2's config with the project's keys, a YAML file (``_BASE_`` honoured) and ``KEY VALUE`` overrides.

    YAML is loaded safely: unlike ``CfgNode.merge_from_file`` no Python object is ever constructed.

    Args:
        config_file: path; "" for the defaults alone.

    Raises:
        ReclipError: missing file, bad YAML, unknown key, a value of the wrong kind.
    """
    cfg = get_cfg()
    add_reclip_config(cfg)
    if config_file:
        if not os.path.isfile(config_file):
            raise ReclipError(f"config file {config_file} does not exist: see configs/")
        try:
            loaded = CfgNode.load_yaml_with_base(config_file, allow_unsafe=False)
        except FileNotFoundError as error:
            raise ReclipError(f"config file {config_file}: its _BASE_ {error.filename} does not exist") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ReclipError(f"config file {config_file} is no plain YAML: {_one_line(error)}") from error
        except (TypeError, AttributeError) as error:  # empty, a list, or a single value
            raise ReclipError(f"config file {config_file} holds no keys: expected KEY: value lines") from error
        except RecursionError as error:
            raise ReclipError(f"config file {config_file}: its _BASE_ files name each other in a circle") from error
        if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
            raise ReclipError(f"config file {config_file} holds no keys: expected KEY: value lines")
        _merge(cfg.merge_from_other_cfg, CfgNode(loaded), config_file)
    if opts:
        if len(opts) % 2:
            raise ReclipError(f"overrides are pairs of KEY VALUE; {opts[-1]!r} has no partner")
        _merge(cfg.merge_from_list, list(opts), "command line")
    check_config(cfg)
    return cfg


def _one_line(error: Exception) -> str:
    """The error's message; of a long one the beginning and the end, where yacs names the key."""
    text = " ".join(str(error).split()).strip("'\"")
    return text if len(text) <= 200 else f"{text[:60]} ... {text[-120:]}"


def _merge(merge: Callable[[Any], None], values: object, source: str) -> None:
    try:
        merge(values)
    except (KeyError, AssertionError, TypeError, AttributeError) as error:
        raise ReclipError(f"{source}: {_one_line(error)} (see reclip_d2/config/keys.py for the keys)") from error
    except ValueError as error:
        raise ReclipError(f"{source}: {_one_line(error)}") from error
