"""``python -m reclip_d2.train_net``: ``train_net.py`` for an installed package without the repository."""

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
from reclip_d2.engine.program import main, run_program

if __name__ == "__main__":
    run_program(main)
