"""``python -m reclip_d2.train_net``: ``train_net.py`` where the package is installed without its checkout."""

import reclip_d2  # noqa: F401  isort: skip  (before the libraries whose messages it filters)
from reclip_d2.engine.program import main, run_program

if __name__ == "__main__":
    run_program(main)
