#!/usr/bin/env python
"""Make a bank of features from the unlabelled images of DATASETS.TRAIN, for ``TEST.REFINE bank``.

    data=configs/datasets/embedded.yaml methods=configs/methods
    python tools/build_bank.py --output output/bank.safetensors --config-file $data --config-file $methods/maskclip.yaml
    python train_net.py --eval-only --config-file $data --config-file $methods/maskclip.yaml \
        TEST.REFINE "['bank']" TEST.BANK.FILE output/bank.safetensors

A trained model makes a better one: add MODEL.WEIGHTS. ``reclip segment --bank`` does the same for your own folder.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
import logging
from pathlib import Path

import torch

from reclip_d2.config.files import add_config_file_argument
from reclip_d2.engine import program
from reclip_d2.engine.trainer import build_evaluation_model
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.hypothesis.training_records import unlabelled_records
from reclip_d2.inference import ImagePredictor
from reclip_d2.inference.bank import build_bank


def argument_parser() -> argparse.ArgumentParser:
    """Arguments of the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_file_argument(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="the bank, a .safetensors file; must not exist")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


@exit_on_error
def main(args: argparse.Namespace) -> None:
    """Make the bank."""
    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise ReclipError(f"--output {output}: name a .safetensors file")
    if output.exists():
        raise ReclipError(f"--output {output} exists: remove it, or name another")
    cfg = program.run_config(argparse.Namespace(config_file=args.config_file, opts=[*args.opts, "TEST.REFINE", "[]"]))
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    logging.getLogger("reclip_d2").setLevel(logging.WARNING)
    records = unlabelled_records(cfg.DATASETS.TRAIN)
    predictor = ImagePredictor.from_config(build_evaluation_model(cfg, resume=False), cfg)
    bank = build_bank(cfg, predictor, records)
    bank.save(output)
    counts = ", ".join(
        f"{names[0]} {count}" for names, count in zip(predictor.model.class_names, bank.counts.tolist(), strict=True)
    )
    print(f"{output}: {len(bank.entries):,} regions of {len(records):,} images ({counts})")


if __name__ == "__main__":
    main(argument_parser().parse_args())
