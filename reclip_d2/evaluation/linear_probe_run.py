"""A run of linear probing: its config, derived from the probed model's, and its results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from reclip_d2.errors import ReclipError
from reclip_d2.evaluation.labelled_data import probe_datasets
from reclip_d2.evaluation.linear_probe import SUPERVISION, LinearProbe
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from reclip_d2.utils.io import atomic_write

FOLDER, RESULTS = "linear_probe", "linear_probe.json"


def probe_overrides(cfg: CfgNode) -> list[str]:
    """``KEY VALUE`` overrides that make a model's config that of its probe.

    Raises:
        ReclipError: there is no checkpoint to probe.
    """
    keys = cfg.LINEAR_PROBE
    weights = keys.WEIGHTS
    if weights and not Path(weights).is_file():
        raise ReclipError(f"checkpoint {weights} does not exist: check LINEAR_PROBE.WEIGHTS")
    if not weights and cfg.MODEL.META_ARCHITECTURE != "MaskCLIP":
        trained = ReclipCheckpointer(None, cfg.OUTPUT_DIR)
        if not trained.has_checkpoint():
            raise ReclipError(
                f"{cfg.OUTPUT_DIR} holds no trained model to probe: run train_net.py, or give LINEAR_PROBE.WEIGHTS FILE"
            )
        weights = trained.get_checkpoint_file()
    overrides = {
        "LINEAR_PROBE.WEIGHTS": weights,
        "MODEL.WEIGHTS": "",
        "OUTPUT_DIR": str(Path(cfg.OUTPUT_DIR) / FOLDER),
        "SOLVER.MAX_ITER": keys.MAX_ITER,
        "SOLVER.IMS_PER_BATCH": keys.IMS_PER_BATCH,
        "SOLVER.BASE_LR": keys.BASE_LR,
        "SOLVER.WEIGHT_DECAY": keys.WEIGHT_DECAY,
        "SOLVER.OPTIMIZER": "SGD",
        "SOLVER.LR_SCHEDULER_NAME": "WarmupPolyLR",
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.AMP.ENABLED": False,  # the embeddings are those of the test
        "VIS_PERIOD": 0,
    }
    return [str(part) for item in overrides.items() for part in item]


def write_results(cfg: CfgNode, model: LinearProbe, results: dict[str, Any]) -> Path:
    """Write ``linear_probe.json``.

    Args:
        results: of ``Trainer.test``, by data set.
    """
    scores = {}
    for name, result in results.items():
        values = result["sem_seg"]
        scores[name] = {
            "protocol": MetadataCatalog.get(name).get("reclip_protocol", ""),
            "mIoU": float(values["mIoU"]),
            "IoU": {key[4:]: float(value) for key, value in values.items() if key.startswith("IoU-")},
        }
    report = {
        "supervision": SUPERVISION,
        "trained_on_labels_of": list(probe_datasets(cfg)),
        "probed": {
            "model": type(model.model).__name__,
            "weights": cfg.LINEAR_PROBE.WEIGHTS,
            "embedding_width": model.embedding_width,
            **model.identity(),
        },
        "settings": {
            "iterations": cfg.SOLVER.MAX_ITER,
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "base_lr": cfg.SOLVER.BASE_LR,
            "weight_decay": cfg.SOLVER.WEIGHT_DECAY,
            "batch_norm": cfg.LINEAR_PROBE.BATCH_NORM,
            "seed": cfg.SEED,
        },
        "results": scores,
    }
    path = Path(cfg.OUTPUT_DIR) / RESULTS
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    return path
