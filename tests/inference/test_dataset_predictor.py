"""The predictor in Detectron2's evaluation loop: modes, wrappers, records, and its mapper."""

import numpy as np
import pytest
import torch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from PIL import Image

from reclip_d2.config import load_config
from reclip_d2.data.dataset_mapper import build_test_mapper
from reclip_d2.data.tiling import SlidingWindow
from reclip_d2.errors import ReclipError
from reclip_d2.inference import DatasetPredictor, ImagePredictor
from reclip_d2.inference.dataset_predictor import predicting_model
from tests.helpers import make_distillation, make_maskclip, make_rectified, random_image

KEYS = ("INPUT.MIN_SIZE_TEST", "32", "INPUT.TILES.FROM_SIDE", "64", "INPUT.TILES.SIZE", "40")


class Collect(DatasetEvaluator):
    def reset(self):
        self.outputs = []

    def process(self, inputs, outputs):
        self.outputs += [output["sem_seg"] for output in outputs]

    def evaluate(self):
        return {"outputs": self.outputs}


@pytest.mark.parametrize("size", [(50, 60), (80, 52)], ids=["whole", "tiles"])
def test_a_loader_gives_what_an_image_gives(size, tmp_path):
    """Through the test mapper, Detectron2's loop, and the predictor: the same labels as for the image alone."""
    image = random_image(1, *size).permute(1, 2, 0).numpy()
    Image.fromarray(image).save(tmp_path / "a.png")
    cfg, model = load_config("", KEYS), make_rectified().eval()
    mapped = build_test_mapper(cfg)({"file_name": str(tmp_path / "a.png")})
    assert tuple(mapped["image"].shape[1:]) == ((32, 38) if size == (50, 60) else size)
    predictor = DatasetPredictor.from_config(model, cfg)
    (labels,) = inference_on_dataset(predictor, [[mapped]], Collect())["outputs"]
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal(labels.numpy(), ImagePredictor.from_config(model, cfg).labels(image))
    cfg.TEST.LABEL_MAPS = False
    (logits,) = inference_on_dataset(DatasetPredictor.from_config(model, cfg), [[mapped]], Collect())["outputs"]
    assert logits.shape == (4, *size)
    assert (logits.argmax(0) == labels).float().mean() > 0.999  # rounding at ties apart


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_leaves_the_model_in_its_mode(training):
    model = make_distillation().train(training)
    seen = []
    inner = model.student.mask_logits
    model.student.mask_logits = lambda *inputs: seen.append(model.student.training) or inner(*inputs)
    inference_on_dataset(
        DatasetPredictor.from_config(model, load_config("", KEYS)), [[{"image": random_image(0)}]], Collect()
    )
    assert seen == [False]
    assert model.training == training and model.student.training == training


def test_whose_predictions():
    model = make_distillation()
    assert predicting_model(model) is model.student
    plain = make_maskclip()
    assert predicting_model(plain) is plain


def test_a_batch_is_predicted_one_by_one():
    model = make_maskclip()
    cfg = load_config("", [*KEYS, "TEST.SLIDING_WINDOW.ENABLED", "True"])
    predictor = DatasetPredictor.from_config(model, cfg)
    assert isinstance(predictor.predictor.sliding_window, SlidingWindow)
    records = [{"image": random_image(i, 30 + i, 40), "height": 50, "width": 41} for i in range(2)]
    together = predictor(records)
    for record, output in zip(records, together, strict=True):
        assert output["sem_seg"].shape == (50, 41)
        assert torch.equal(output["sem_seg"], predictor([record])[0]["sem_seg"])


def test_a_record_of_another_size_than_its_image():
    record = {"file_name": "a.png", "image": random_image(0, 32, 40), "height": 90, "width": 100}
    with pytest.raises(ReclipError, match=r"image a\.png has 32 x 40 pixels, but its record says 90 x 100"):
        DatasetPredictor.from_config(make_maskclip(), load_config("", KEYS))([record])
