"""Accuracy as a regression test: the shipped world, CLIP and configs, on the development split."""

import pytest

from reclip_d2.engine import program
from tests.helpers import config_arguments


@pytest.fixture(scope="module")
def miou(tmp_path_factory):
    """Run a config (seed 0, evaluated on embedded_dev) and give its mIoU in percent."""
    root = tmp_path_factory.mktemp("accuracy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root / "datasets"))
        patch.setenv("RECLIP_CACHE", str(root / "cache"))

        def run(config: str, train: bool) -> float:
            args = program.argument_parser().parse_args(
                [*config_arguments("embedded", config), "SEED", "0"]
                + ["DATASETS.TEST", "('embedded_dev',)", "OUTPUT_DIR", str(root / config)]
            )
            if train:
                program.main(args)
                args.opts += ["MODEL.WEIGHTS", str(root / config / "model_final.pth")]
            args.eval_only = True
            return float(program.main(args)["sem_seg"]["mIoU"])

        yield run


@pytest.mark.slow
def test_rectification_beats_maskclip_and_the_extensions_beat_both(miou):
    maskclip = miou("maskclip", train=False)
    published = miou("reclippp_rectify", train=True)
    extended = miou("reclippp_ext", train=True)
    assert 50 < maskclip < 60
    assert published > maskclip + 3
    assert extended > maskclip + 12
    assert extended > published
