"""training.json: which keys may change when a training resumes."""

import pytest

from reclip_d2.config import load_config
from reclip_d2.engine.training_settings import TrainingSettings
from reclip_d2.errors import ReclipError

WHOLE = ("FEATURE_STORE.VIEWS", 2, "FEATURE_STORE.KIND", "whole")
CROPS = ("FEATURE_STORE.VIEWS", 2, "FEATURE_STORE.KIND", "crops")


@pytest.mark.parametrize("key", ["INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"])
@pytest.mark.parametrize(
    ("keys", "matters"),
    [
        ((), False),
        (CROPS, False),
        (WHOLE, True),
        (("FEATURE_STORE.VIEWS", 0, "FEATURE_STORE.KIND", "whole"), False),
        (("HYPOTHESIS.METHOD", "dense"), True),
        (("HYPOTHESIS.METHOD", "one_pass"), True),
    ],
)
def test_the_test_resolution_may_change_unless_training_reads_images_at_it(tmp_path, key, keys, matters):
    def settings(side: int) -> TrainingSettings:
        return TrainingSettings(load_config("", [*keys, key, side, "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]))

    settings(640).write(["a"])
    settings(640).check()
    if matters:
        with pytest.raises(ReclipError, match=f"was trained with {key} 640 instead of 672: resume with the same"):
            settings(672).check()
    else:
        settings(672).check()
