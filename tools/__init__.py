"""Programs of the source tree, run by path, except ``python -m tools.gpu_check``.

It is a package because Detectron2's wheel has a package ``tools``, which would be found before a plain folder.
"""
