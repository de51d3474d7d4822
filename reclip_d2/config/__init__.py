"""Configuration: the keys (``keys``), the rules for their values (``checks``), and loading (``load``)."""

from reclip_d2.config.checks import check_config
from reclip_d2.config.keys import CHOICES, add_reclip_config
from reclip_d2.config.load import load_config

__all__ = ["CHOICES", "add_reclip_config", "check_config", "load_config"]
