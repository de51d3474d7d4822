"""The papers' tables and figures as a suite of runs: what to run (``suite``), running it (``runner``), reporting it
(``report``). The program is ``tools/reproduce.py``; the suite itself is data, ``configs/ablations/paper.yaml``."""
