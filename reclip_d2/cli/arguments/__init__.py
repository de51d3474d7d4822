"""Descriptions and arguments of the commands. Each module has ``DESCRIPTION`` and ``add_arguments(parser)``.

These modules do not import torch, NumPy or Detectron2, directly or indirectly, so that help and argument errors come
without delay. Choices and defaults of slow modules are repeated here; a test compares them.
"""
