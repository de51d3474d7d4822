"""Backbones that models share."""

from reclip_d2.config import load_config
from reclip_d2.modeling.build import build_clip_backbone, shared_backbones

DATASET = "configs/datasets/embedded.yaml"


def test_shared_backbones():
    """Models with equal keys share one; other keys, a trained tower and other blocks have another."""
    keys = ["MODEL.CLIP.NAME", "reclip-embedded", "MODEL.DEVICE", "cpu"]
    cfg = load_config(DATASET, keys)
    assert build_clip_backbone(cfg) is not build_clip_backbone(cfg)
    with shared_backbones():
        first = build_clip_backbone(cfg)
        assert build_clip_backbone(load_config(DATASET, [*keys, "SOLVER.MAX_ITER", "3"])) is first
        assert (
            build_clip_backbone(load_config(DATASET, [*keys, "MODEL.CLIP.VALUE_PATH_RESIDUAL", "False"])) is not first
        )
        trained = load_config(DATASET, [*keys, "MODEL.CLIP.FINE_TUNE", "True"])
        assert build_clip_backbone(trained) is not build_clip_backbone(trained)
    with shared_backbones():
        assert build_clip_backbone(cfg) is not first
