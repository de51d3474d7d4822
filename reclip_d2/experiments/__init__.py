"""The papers' tables and figures as a suite of runs, started by ``tools/reproduce.py``.

In reading order:

- ``suite``: experiments, tables and claims, read from a YAML file (``configs/ablations/paper.yaml``);
- ``plan``: the config of each run, its folder, finished and pending runs;
- ``runner``: do the pending runs, each after those it depends on; ``process`` calls each in a separate process;
- ``execute``: one run, trained and evaluated in this process;
- ``measurements``: scores by seed, paired differences with confidence intervals, verdicts on the claims;
- ``report``: the Markdown page (its text is ``report.md.jinja``), with the pictures of ``charts``.
"""
