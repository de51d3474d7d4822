"""Descriptions and arguments of the commands, a module each: DESCRIPTION, and add_arguments(parser).

Nothing here imports torch, NumPy or Detectron2, or a module that does: help and a mistake in the arguments must not
wait for them. What the arguments offer by name is in ``names.py``; a test compares it with what the names stand for.
"""
