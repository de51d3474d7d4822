"""The page of ``reclip app``.

::

    page.py (layout) -> handlers.py (events)  -> session.py (segment, learn, bias) -> models.py (networks)
    server.py (start, stop, what the page may load)                               -> learning.py (reclip segment)
                                                -> pictures.py (overlays, legend, heat maps)

Only ``page.py``, ``handlers.py`` and ``server.py`` import gradio.
"""
