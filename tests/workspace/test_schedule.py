"""How long a training is."""

from reclip_d2.workspace.schedule import suggested_iterations
from reclip_d2.workspace.stage_config import stage_config


def test_suggested_iterations():
    """200 epochs in batches of 12, not under 200 iterations and not over the config's 4,000."""
    cfg = stage_config("rectified", "ViT-B-16-quickgelu", [])
    assert [suggested_iterations(images, cfg) for images in (1, 12, 100, 239, 240, 10_000)] == [
        200, 200, 1667, 3984, 4000, 4000,
    ]  # fmt: skip
    short = stage_config("rectified", "ViT-B-16-quickgelu", ["SOLVER.MAX_ITER", "30"])
    assert suggested_iterations(12, short) == 30
