"""Install the real Detectron2, which PyPI does not have under its own name::

    python -m reclip_d2.install_detectron2                     # into the environment of this python
    python -m reclip_d2.install_detectron2 --wheel-dir wheels  # only build the wheel, for another machine
    python -m reclip_d2.install_detectron2 --sdist FILE        # from a downloaded archive

If ``detectron2`` can be imported already (upstream main, your own build), nothing is done. Otherwise release 0.5 is
taken from the source archive ``detectron2-cdo==0.5``, found on the package indexes that pip is configured for
(``pip_settings.py``, ``package_index.py``) and verified by its SHA-256. Its Python files are those of the upstream tag
v0.5, but its C++ sources are missing, so a plain ``pip install`` fails. The program leaves out the C++ extension,
replaces what current packages no longer provide (``patches.py``), packs a pure-Python wheel (``wheel.py``) and installs
it (``program.py``).

Not available without the extension: rotated boxes, Detectron2's deformable convolution, and the fast COCO evaluation.
They raise a clear error when used. Semantic segmentation needs none of them.

The program runs before the requirements of ``reclip_d2`` are installed, so it uses only the standard library and pip's
command line. It changes the environment only in the last step (``pip install``), so it can be interrupted and repeated.
"""
