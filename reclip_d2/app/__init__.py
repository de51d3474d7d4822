"""The page of ``reclip app``.

::

    page.py (layout) -> handlers.py (events)  -> session.py (segment, learn, bias) -> models.py (networks)
    server.py (start, stop)                                                       -> workspace/child.py (learn)
    guard.py (access, limits)                 -> pictures.py (overlays, legend, heat maps)
                                              -> tasks.py (visitors, turns, Stop), private_folder.py

``command.py`` is the command. Only ``page.py``, ``handlers.py`` and ``server.py`` import gradio.
"""
