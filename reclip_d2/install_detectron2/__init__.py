"""Install the real Detectron2 where PyPI has no release of it under its own name::

    python -m reclip_d2.install_detectron2                     # into the environment of this python
    python -m reclip_d2.install_detectron2 --wheel-dir wheels  # only build the wheel, to carry it elsewhere
    python -m reclip_d2.install_detectron2 --sdist FILE        # with an archive that was fetched by other means

A ``detectron2`` that can be imported already (upstream main, a build of your own) is left alone. Otherwise release 0.5
is taken from the source archive ``detectron2-cdo==0.5``, found through the package indexes that pip is configured for
(``pip_settings.py``, ``package_index.py``) and checked by its SHA-256. Its Python files are those of the upstream tag
v0.5; its C++ sources are missing, so that a plain ``pip install`` of it fails. The C++ extension is left out, what
current packages no longer offer is replaced (``patches.py``), and the result is packed as a pure-Python wheel
(``wheel.py``) and installed (``program.py``).

What is lost without the extension: rotated boxes, Detectron2's deformable convolution, and the fast COCO evaluation.
They raise an error that says so when they are used. Semantic segmentation needs none of them.

It runs before the packages that ``reclip_d2`` needs are there: nothing but the standard library and pip's command line
is used. The environment is not touched before the last step (``pip install``), so it may be interrupted and repeated.
"""
