"""The page of ``reclip app``.

::

    page.py (layout) -> handlers.py (events)  -> session.py (segment, learn, bias) -> models.py (networks)
    server.py (start, stop)                                                       -> workspace/child.py (learn)
    guard.py (who may ask, and how much)        -> pictures.py (overlays, legend, heat maps)
                                                -> tasks.py (visitors, turns, Stop), limits.py, private_folder.py

Only ``page.py``, ``handlers.py`` and ``server.py`` import gradio.
"""
