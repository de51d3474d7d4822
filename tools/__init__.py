"""Programs of the source tree, each run by its path; ``python -m tools.gpu_check`` by its name.

A package, not a folder alone: Detectron2's own wheel has a package ``tools``, which would be found before a folder.
"""
