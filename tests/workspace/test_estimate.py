"""Estimated durations, from first batches."""

import pytest
from PIL import Image

from reclip_d2.data.class_file import parse_classes
from reclip_d2.data.datasets.custom import register_images
from reclip_d2.data.image_folder import find_images
from reclip_d2.utils.progress import report_to
from reclip_d2.workspace import estimate as module
from reclip_d2.workspace.estimate import Work, estimate, report_estimate
from reclip_d2.workspace.options import DEFAULT_METHOD
from reclip_d2.workspace.run_folder import RunFolder
from reclip_d2.workspace.stage_config import stage_config
from tests.cli.conftest import picture

KEYS = ["MODEL.DEVICE", "cpu", "MODEL.CLIP.TEMPLATES", "photo", "DATASETS.CUSTOM.CLASSES", "c.txt"]
PUBLISHED = "reclippp_rectify"


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "photos" / "a.png"
    path.parent.mkdir()
    Image.fromarray(picture(0)).save(path)
    register_images([{"file_name": str(path), "image_id": "a.png"}], parse_classes("sky\nwood\nfire", "c.txt"))
    return str(path)


@pytest.fixture
def ticking(monkeypatch):
    """Every call that is timed takes a second, and is made."""
    calls = []
    monkeypatch.setattr(module, "_time", lambda step, device: (step(), calls.append(1), 1.0)[2])
    return calls


def test_from_a_feature_store(sample, ticking, capsys, tmp_path):
    """Its one image has two views; hypotheses from their features take no time worth counting."""
    keys = [*KEYS, "SOLVER.IMS_PER_BATCH", "10", "FEATURE_STORE.FOLDER", str(tmp_path / "features")]
    cfg = stage_config("rectified", "reclip-embedded", keys)
    work = Work(sample, sample, hypotheses=1, iterations=50, masks=4, tiles=0)
    with report_to(print):
        # CLIP's own masks and the trained model's.
        assert estimate(cfg, work) == {"features": 2, "rectification": 50, "masks": 2 * 4}
    assert "features: 1 image x 2 views take 54 KiB of disk until the run ends" in capsys.readouterr().out
    cfg.FEATURE_STORE.MAX_SIZE = 1e-9
    with report_to(print):  # each view is encoded in each iteration, and each image twice before
        assert estimate(cfg, work) == {"hypotheses": 2, "rectification": 50 * (1 + 10), "masks": 2 * 4}
    assert "features: not stored" in capsys.readouterr().out


def test_what_is_left_to_do_is_what_counts(sample, ticking):
    cfg = stage_config("rectified", "reclip-embedded", [*KEYS, "SOLVER.IMS_PER_BATCH", "10"], PUBLISHED)
    seconds = estimate(cfg, Work(sample, sample, hypotheses=7, iterations=50, masks=4, tiles=0))
    # 16 crops of 121 a second, and a second to read the image.
    assert seconds["hypotheses"] == pytest.approx(7 * (121 / 16 + 1))
    # One image and two take the same: a tenth of that is taken to grow with the batch.
    assert seconds["rectification"] == pytest.approx(50 * (0.9 + 0.1 * 10))
    assert seconds["masks"] == 2 * 4
    assert estimate(cfg, Work(sample, sample, 0, 0, masks=4, tiles=0)) == {"masks": 4}
    assert estimate(cfg, Work(sample, sample, 0, 0, masks=0, tiles=10)) == {"masks": pytest.approx(15)}


def test_maskclip(sample, ticking):
    cfg = stage_config("maskclip", "reclip-embedded", KEYS)
    assert estimate(cfg, Work(sample, sample, 0, 0, masks=3, tiles=0)) == {"masks": 3}


def test_real_times_are_positive(sample):
    for method, first in ((PUBLISHED, "hypotheses"), (DEFAULT_METHOD, "features")):
        cfg = stage_config("rectified", "reclip-embedded", [*KEYS, "SOLVER.IMS_PER_BATCH", "2"], method)
        seconds = estimate(cfg, Work(sample, sample, 1, 1, 1, 1))
        assert set(seconds) == {first, "rectification", "masks"} and min(seconds.values()) > 0


def test_nothing_to_do_says_nothing(sample, tmp_path, capsys):
    cfg = stage_config("maskclip", "reclip-embedded", KEYS)
    report_estimate(cfg, RunFolder(tmp_path / "out"), [], [], student=False)
    (tmp_path / "photos" / "a.png").write_bytes(b"")  # nothing to time it on
    report_estimate(cfg, RunFolder(tmp_path / "out"), find_images([tmp_path / "photos"]).images, [], student=False)
    assert capsys.readouterr().out == ""


def test_a_range_where_the_training_may_end_early():
    """The plateau's rule needs (2 x 4 + 3 - 1) x 10 iterations, and 100 to cool down: 200."""
    cfg = stage_config("rectified", "reclip-embedded", KEYS)
    work = Work("", "", 0, 1400, 0, 0)
    seconds = {"features": 60.0, "rectification": 1400.0}
    assert module._in_words(cfg, work, seconds, student=True) == (
        "about 4 min to 24 min in total (features 60 s, rectification up to 23 min), and the distillation"
    )
    cfg.SOLVER.PLATEAU.ENABLED = False
    assert module._in_words(cfg, work, seconds, student=False) == (
        "about 24 min in total (features 60 s, rectification 23 min)"
    )
