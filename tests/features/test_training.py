"""Training on fixed views (``reclip_d2.features.training``): from the store as from views that are encoded again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from reclip_d2.config import load_config
from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.engine import program
from reclip_d2.errors import ReclipError
from reclip_d2.features.training import feature_source, fixed_views
from reclip_d2.hypothesis.crop_aware import CropHypothesis
from reclip_d2.modeling.view_batch import batch_views
from tests.helpers import (
    make_distillation,
    make_maskclip,
    make_reclip,
    make_rectified,
    random_image,
    tiny_config,
    watch_opened_files,
    write_scenes,
)

NAMES = ["red", "green", "blue", "grey"]
RECOMPUTED = ("FEATURE_STORE.MAX_SIZE", "1e-9")
CROPS = ("FEATURE_STORE.VIEWS", "3", "HYPOTHESIS.CROP_AWARE", "True")
WHOLE = ("FEATURE_STORE.VIEWS", "2", "FEATURE_STORE.KIND", "whole")
DISTILLATION = (
    "MODEL.META_ARCHITECTURE", "Distillation", "MODEL.TEACHER.META_ARCHITECTURE", "MaskCLIP",
    "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8",
)  # fmt: skip


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def scene(tmp_path, datasets, one_thread) -> Path:
    """A folder with a data set of two image shapes, and a config file."""
    records = write_scenes(tmp_path / "wide", 3, size=(36, 60)) + write_scenes(tmp_path / "tall", 3, size=(50, 33))
    for number, record in enumerate(records):
        record["image_id"] = str(number)
    datasets("reclip_test_train", records, NAMES)
    (tmp_path / "config.yaml").write_text(
        f"""{tiny_config(tmp_path)}
HYPOTHESIS: {{WINDOW_RATIO: 0.5, THRESHOLD: 0.2}}
DATASETS: {{TRAIN: [reclip_test_train], TEST: []}}
DATALOADER: {{NUM_WORKERS: 0}}
INPUT:
  MIN_SIZE_TRAIN: [32]
  MIN_SIZE_TEST: 32
  CROP: {{ENABLED: true, SIZE: [24, 32]}}
  COLOR_JITTER: 0.2
SEED: 0
SOLVER: {{IMS_PER_BATCH: 3, MAX_ITER: 4, CHECKPOINT_PERIOD: 2, BASE_LR: 0.05}}
"""
    )
    return tmp_path


def run(scene: Path, output: str, *arguments: str) -> dict[str, torch.Tensor]:
    """Train; returns the weights."""
    flags = [a for a in arguments if a.startswith("--")]
    keys = [a for a in arguments if not a.startswith("--")]
    config = ["--config-file", str(scene / "config.yaml")]
    args = program.argument_parser().parse_args([*config, *flags, "OUTPUT_DIR", str(scene / output), *keys])
    program.main(args)
    return torch.load(scene / output / "model_final.pth", weights_only=True)["model"]


def assert_same(first: dict, second: dict) -> None:
    assert set(first) == set(second)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("kind", [CROPS, WHOLE], ids=["crops", "whole"])
def test_rectification_from_the_store_is_that_of_the_same_views(scene, isolated_cache, kind):
    stored = run(scene, "stored", *kind)
    assert len(list((isolated_cache / "features").glob("reclip_test_train-*"))) == 1
    assert_same(stored, run(scene, "again", *kind, *RECOMPUTED))
    fresh = run(scene, "fresh")
    assert not torch.equal(stored["mask_decoder.conv.weight"], fresh["mask_decoder.conv.weight"])


@pytest.mark.parametrize("kind", [CROPS, WHOLE], ids=["crops", "whole"])
def test_distillation_from_the_store_is_that_of_the_same_views(scene, kind):
    assert_same(run(scene, "stored", *DISTILLATION, *kind), run(scene, "again", *DISTILLATION, *kind, *RECOMPUTED))


def test_resume_and_pictures(scene, monkeypatch):
    """A resumed run reads the same views; TensorBoard's pictures need pixels, which changes nothing else."""
    whole = run(scene, "whole", *CROPS, "VIS_PERIOD", "2")
    with monkeypatch.context() as patch:
        original = program.Trainer.run_step

        def stop(self):
            if self.iter == 3:
                raise ReclipError("stopped")
            original(self)

        patch.setattr(program.Trainer, "run_step", stop)
        with pytest.raises(SystemExit):
            run(scene, "parts", *CROPS)
    assert_same(run(scene, "parts", "--resume", *CROPS), whole)


def test_making_the_store_is_blind_to_labels(scene):
    def guard(path: str) -> None:
        if "annotations_detectron2" in path:
            raise AssertionError(f"training opens a label: {path}")

    with watch_opened_files(guard):
        run(scene, "out", *WHOLE)


def test_a_damaged_store_is_made_again(scene, isolated_cache):
    first = run(scene, "first", *WHOLE)
    (file,) = (isolated_cache / "features").glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert_same(run(scene, "second", *WHOLE), first)


# ---- samples --------------------------------------------------------------------------------------------------


def test_hypothesis_of_a_stored_crop_is_that_of_its_pixels(scene, isolated_cache):
    """Eq. (6) over the windows in the crop, by the mapper and by the stored placement."""
    cfg = load_config(str(scene / "config.yaml"), [*CROPS, "SEED", "0"])
    records = [
        {"file_name": str(path), "image_id": path.name, "hypothesis": [0]}
        for path in sorted((scene / "wide").rglob("*.jpg"))
    ]
    rng = np.random.default_rng(0)
    for record in records:
        record["crop_hypothesis"] = CropHypothesis(record["image_id"], rng.integers(0, 4, 9).tolist(), 0.2, 0.5)
    dataset = fixed_views(cfg, make_rectified(), records)
    seen = set()
    for draw in range(20):
        number = dataset.views.number(1, draw)
        sample, pixels = dataset[draw, 1], dataset.views.sample(number)
        assert torch.equal(sample["hypothesis"], pixels["hypothesis"])
        assert sample["view_size"] == tuple(pixels["image"].shape[-2:]) and "crop_hypothesis" not in sample
        seen.add(number)
    assert len(seen) == 3


def test_views_differ_from_the_test_only_by_rounding(scene):
    cfg = load_config(str(scene / "config.yaml"), [*WHOLE, "SEED", "0"])
    records = [{"file_name": str(path), "image_id": path.name} for path in sorted((scene / "tall").rglob("*.jpg"))]
    model = make_rectified()
    dataset = fixed_views(cfg, model, records)
    image = UnlabelledDatasetMapper(cfg, is_train=False)(records[0])
    images = model.preprocess_image([image])
    expected = model.backbone.dense(images.tensor, images.image_sizes)[0].permute(1, 2, 0)
    stored = dataset.store.read(0).features
    assert torch.equal(stored, expected.half())


@pytest.mark.parametrize("make", [make_rectified, make_reclip, make_maskclip])
@pytest.mark.parametrize("mode", ["replicate", "zeros"])
def test_a_batch_of_several_grids_is_segmented_view_by_view(make, mode):
    """Each view's mask logits are those of the view alone: its own bias map, and the decoder's own border."""
    if make is make_maskclip:
        model = make()
    else:
        model = make(decoder={"padding_mode": mode}).eval()
    samples = [{"image": random_image(k, *size)} for k, size in enumerate([(32, 40), (24, 48), (40, 32)])]
    encoded = [model.view_encoder(sample["image"]) for sample in samples]
    with torch.no_grad():
        batch = batch_views(*zip(*encoded, strict=True), torch.device("cpu"), model.padding_mode)
        together = model.segment_views(batch)
        for k, (features, size) in enumerate(encoded):
            alone = model.segment_views(batch_views([features], [size], torch.device("cpu")))
            h, w = features.shape[:2]
            torch.testing.assert_close(together[k, :, :h, :w], alone[0], rtol=1e-5, atol=1e-5)
            image = model.preprocess_image([samples[k]]).tensor
            torch.testing.assert_close(alone, model.segment(image)[1], rtol=1e-5, atol=1e-5)


def test_features_must_be_frozen():
    assert feature_source(make_distillation()).backbone is not None
    model = make_rectified()
    assert feature_source(model) is model
    model.backbone.requires_grad_(True)
    with pytest.raises(ReclipError, match="MODEL.CLIP.FINE_TUNE"):
        feature_source(model)


def test_key_smoothing_reads_more_than_features():
    model = make_maskclip(key_smoothing=0.5)
    batch = batch_views([torch.zeros(2, 2, 6)], [(16, 16)], torch.device("cpu"))
    with pytest.raises(ReclipError, match="KEY_SMOOTHING needs more than features"):
        model.segment_views(batch)
