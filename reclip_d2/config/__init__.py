"""Configuration: keys with their rules (``keys``, ``detectron2_keys``), checks (``checks``), loading (``load``)."""

from reclip_d2.config.checks import check_config
from reclip_d2.config.keys import KEYS, RULES, add_reclip_config
from reclip_d2.config.load import load_config
from reclip_d2.config.yaml_file import read_yaml

__all__ = ["KEYS", "RULES", "add_reclip_config", "check_config", "load_config", "read_yaml"]
