#!/usr/bin/env python
"""Linear probing (Table I): train a linear classifier on a model's frozen pixel embeddings, WITH LABELS; evaluate it.

    data=configs/datasets/embedded.yaml methods=configs/methods
    python tools/linear_probe.py --config-file $data --config-file $methods/maskclip.yaml
    python tools/linear_probe.py --config-file $data --config-file $methods/reclippp_rectify.yaml   # after train_net.py

Probes the last checkpoint in the config's OUTPUT_DIR, or LINEAR_PROBE.WEIGHTS, without changing it. The classifier
learns from the labels of LINEAR_PROBE.DATASETS; everything else in this project trains without labels. The results are
written separately, to OUTPUT_DIR/linear_probe/linear_probe.json, and marked as supervised. --resume, --overwrite,
--eval-only, --num-gpus and KEY VALUE overrides are as for train_net.py; see LINEAR_PROBE in reclip_d2/config/keys.py.
"""

from __future__ import annotations

import reclip_d2.utils.program_start  # noqa: F401  isort: skip  (first: see there)
import argparse
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from reclip_d2.config import load_config
from reclip_d2.data.classes import class_names_from_config
from reclip_d2.data.dataset_mapper import build_train_augmentations
from reclip_d2.data.index_images import PLAIN
from reclip_d2.data.sampling import NumberedDataset, build_train_loader
from reclip_d2.engine.output_dir import forget_run
from reclip_d2.engine.program import run_program, setup
from reclip_d2.engine.trainer import Trainer, build_evaluation_model
from reclip_d2.errors import ReclipError, exit_on_error
from reclip_d2.evaluation.label_files import label_palette
from reclip_d2.evaluation.labelled_data import (
    LabelledDatasetMapper,
    labelled_records,
    probe_datasets,
)
from reclip_d2.evaluation.labelled_views import labelled_views
from reclip_d2.evaluation.linear_probe import LinearProbe, probe_overrides, write_results
from reclip_d2.modeling.checkpoint import ReclipCheckpointer


class ProbeTrainer(Trainer):
    """Trains the classifier of a :class:`LinearProbe`, with a data loader that reads labels."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> LinearProbe:
        probed = cfg.clone()
        probed.defrost()
        probed.MODEL.WEIGHTS = cfg.LINEAR_PROBE.WEIGHTS
        return LinearProbe(build_evaluation_model(probed, resume=False), batch_norm=cfg.LINEAR_PROBE.BATCH_NORM)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, start_iter: int = 0, model: nn.Module | None = None) -> DataLoader:
        class_names, datasets = class_names_from_config(cfg), probe_datasets(cfg)
        records = labelled_records(datasets, class_names)
        ignored = {MetadataCatalog.get(name).get("ignore_label", 255) for name in datasets}
        if len(ignored) > 1:
            raise ReclipError(f"{', '.join(datasets)} have different ignore labels: probe with one of them")
        palettes = [label_palette(MetadataCatalog.get(name)) for name in datasets]
        palette = palettes[0] if palettes.count(palettes[0]) == len(palettes) else PLAIN
        options = {"num_classes": len(class_names), "ignore_label": ignored.pop(), "palette": palette}
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        assert isinstance(model, LinearProbe)
        fresh = LabelledDatasetMapper(augmentations=build_train_augmentations(cfg), **options)
        return build_train_loader(
            labelled_views(cfg, model.model, records, **options) or NumberedDataset(records, fresh, seed),
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            seed=seed,
            start_iter=start_iter,
        )


@exit_on_error
def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train the classifier, evaluate it on ``DATASETS.TEST``, write the results and return them by data set."""
    overrides = probe_overrides(load_config(args.config_file, args.opts))
    folder = overrides[overrides.index("OUTPUT_DIR") + 1]
    exists = ReclipCheckpointer(None, folder).has_checkpoint()
    if exists and not (args.resume or args.overwrite or args.eval_only):
        raise ReclipError(f"{folder} contains a linear probe: add --resume, --overwrite, or another OUTPUT_DIR")
    if args.eval_only and not exists:
        raise ReclipError(f"{folder} contains no linear probe to evaluate: omit --eval-only")
    args.opts = [*args.opts, *overrides]
    cfg = setup(args)
    # Without the evaluation at the end, so that no supervised mIoU is in metrics.json.
    trainer = ProbeTrainer(cfg, evaluate=False)
    trainer.resume_or_load(resume=args.resume or args.eval_only)
    if args.overwrite and not (args.resume or args.eval_only):
        forget_run(cfg.OUTPUT_DIR)
    if not args.eval_only:
        trainer.train()
    model = trainer.checkpointer.model
    results = ProbeTrainer.test(cfg, model.eval())
    results = {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results
    if not comm.is_main_process():
        return None
    path = write_results(cfg, model, results)
    for name, result in results.items():
        print(f"linear probe, trained with labels: mIoU {result['sem_seg']['mIoU']:.1f} on {name} (all: {path})")
    return results


if __name__ == "__main__":
    run_program(main)
