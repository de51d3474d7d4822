#!/usr/bin/env python
"""Train and evaluate ReCLIP++ and its baselines.

    data=configs/datasets/embedded.yaml methods=configs/methods
    python train_net.py --config-file $data --config-file $methods/reclippp_rectify.yaml
    python train_net.py --config-file $data --config-file $methods/maskclip.yaml --eval-only
    python -m reclip_d2.train_net ...      # the same, where the package is installed without its checkout

The program is ``reclip_d2.engine.program``, its trainer ``reclip_d2.engine.trainer``.
"""

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
from reclip_d2.engine.program import main, run_program

if __name__ == "__main__":
    run_program(main)
