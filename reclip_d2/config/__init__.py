"""Configuration: keys and their rules (``keys``, ``detectron2_keys``), checks across keys (``checks``), files
(``files``), and :func:`load_config` (``load``). ``python -m reclip_d2.config`` prints a config."""

from reclip_d2.config.checks import check_config
from reclip_d2.config.keys import KEYS, RULES, add_reclip_config
from reclip_d2.config.load import flatten, load_config
from reclip_d2.config.yaml_file import read_yaml

__all__ = ["KEYS", "RULES", "add_reclip_config", "check_config", "flatten", "load_config", "read_yaml"]
