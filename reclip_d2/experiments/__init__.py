"""The papers' tables and figures as a suite of runs, started by ``tools/reproduce.py``.

In reading order:

- ``suite``: experiments, tables and claims, and the data sets and CLIPs that they are run with; ``suite_file`` reads
  them from a YAML file (``configs/ablations/paper.yaml``), with ``suite_reader`` for its entries and ``factors`` for
  variants of several experiments;
- ``plan``: the config of each run, finished and pending runs; ``run_folder``: the folder of one;
- ``runner``: do the pending runs, each after those it depends on; ``process`` calls each in a separate process;
- ``execute``: one run, trained and evaluated in this process;
- ``measurements``: scores by seed, paired differences with confidence intervals, verdicts on the claims; ``across``:
  the same for all data sets and CLIPs together;
- ``report``: the Markdown page (its text is ``report.md.jinja``), with the pictures of ``charts``.
"""
