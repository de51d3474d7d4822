"""INT8 students: what is quantised and how, agreement with the float32 model, files that are not kept."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from reclip_d2.errors import ReclipError
from reclip_d2.export import CalibrationImages, ExportOptions, Int8Agreement, Int8Options, export_model
from reclip_d2.export.int8 import METHODS
from reclip_d2.export.parity import Agreement, check_image
from tests.export.conftest import build, logits_of

STUDENTS = ["student", "student with a classifier", "student of ReCLIP"]


@pytest.fixture
def images(tmp_path_factory):
    """Six images of several sizes."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for seed, size in enumerate([(32, 40), (45, 61), (48, 48), (33, 80), (64, 32), (40, 40)]):
        paths.append(folder / f"{seed}.png")
        Image.fromarray(check_image(seed, size).permute(1, 2, 0).numpy()).save(paths[-1])
    return CalibrationImages(tuple(paths), len(paths))


def run(path, image):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def export(model, path, images, description="", **options):
    """Export to INT8; returns the agreement."""
    seen = []
    int8 = {key: options.pop(key) for key in list(options) if key in Int8Options.__dataclass_fields__}
    export_model(model, path, ExportOptions(int8=Int8Options(**int8), **options), description, seen.append, images)
    assert [type(item) for item in seen] == [Agreement, Agreement, Int8Agreement]
    return seen[-1]


def quantised_weights(path):
    """Dequantised weights of the convolutions with 8-bit weights, by node name, with their scales; and the names of the
    other convolutions."""
    graph = onnx.load(path).graph
    values = {parameter.name: numpy_helper.to_array(parameter) for parameter in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    found, others = {}, []
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        maker = makers.get(node.input[1])
        if maker is None or maker.op_type != "DequantizeLinear":
            others.append(node.name)
            continue
        weight, scale, zero = (values[name] for name in maker.input)
        assert weight.dtype == np.int8 and not zero.any() and scale.shape == (len(weight),)
        found[node.name] = (weight * scale[:, None, None, None], scale, weight)
        # Input and bias are quantised, too, or the convolution would be computed in float32.
        assert all(makers[node.input[position]].op_type == "DequantizeLinear" for position in (0, 2))
    return found, others


@pytest.mark.parametrize("name", STUDENTS)
def test_the_network_is_quantised_by_channel_and_the_rest_is_not(name, images, tmp_path):
    model = build(name)
    result = export(model, tmp_path / "file.onnx", images, min_agreement=0.9)  # random weights: many near ties
    assert result.images == 6 and 0.8 < result.worst <= result.equal <= 1
    assert 0 < result.mean_difference <= result.difference < 0.1 * result.span
    convolutions = {
        f"/mask_logits/{part}/{key.replace('.', '/')}": module
        for part in ("backbone", "feature_head")
        for key, module in getattr(model, part).named_modules()
        if isinstance(module, torch.nn.Conv2d)
    }
    found, others = quantised_weights(tmp_path / "file.onnx")
    assert len(found) == len(convolutions) and all("/inherited/" in node for node in others)
    assert bool(others) == (model.inherited.mask_decoder is not None or model.inherited.classifier is not None)
    # Those without a batch norm keep their weights, to half a step of their channel.
    for branch, module in enumerate(model.feature_head.branches):
        dequantised, scale, _ = found[f"/mask_logits/feature_head/branches.{branch}/Conv"]
        error = np.abs(dequantised - module.weight.detach().numpy()).max(axis=(1, 2, 3))
        assert (error <= 0.501 * scale).all()
    # Images of other sizes than those for calibration.
    image = check_image(9, (51, 37))[None]
    reference = logits_of(model, image)
    assert (run(tmp_path / "file.onnx", image) - reference).abs().max() < 0.15 * (reference.max() - reference.min())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_images_give_the_same_file(method, images, tmp_path, capfd):
    model, images = build("student"), CalibrationImages(images.paths[:2], 2)
    first, second = (export(model, tmp_path / name, images, "{}", method=method, force=True) for name in "ab")
    assert first == second and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    (entry,) = onnx.load(tmp_path / "a").metadata_props
    assert (entry.key, entry.value) == ("classes.json", "{}")
    assert capfd.readouterr() == ("", "")  # the library's reports are not the user's
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_labels_of_one_size_as_floating_point_pixels_and_seven_bits(images, tmp_path):
    model = build("student")
    fixed = CalibrationImages(images.paths[:1] * 2, 1)
    ids = (7, 255, 3, 255)
    options = {"labels": True, "label_ids": ids, "size": (32, 40), "input_type": "float32", "reduce_range": True}
    result = export(model, tmp_path / "file.onnx", fixed, force=True, **options)
    assert result.of_labels and "logit below the largest" in str(result)
    found, _ = quantised_weights(tmp_path / "file.onnx")
    assert max(np.abs(weight).max() for *_, weight in found.values()) in (63, 64)
    image = fixed[0][None]
    labels = run(tmp_path / "file.onnx", image.float())
    assert labels.shape == (1, 32, 40) and set(labels.unique().tolist()) <= set(ids)
    equal = labels == torch.tensor(ids)[logits_of(model, image).argmax(1)]
    assert result.equal == pytest.approx(equal.double().mean().item())


def test_a_file_below_the_bound_is_not_kept_unless_forced(images, tmp_path):
    model = build("student")
    with pytest.raises(ReclipError, match=r"INT8 file was removed .*labels equal .*the bound is 100 %.*--force"):
        export(model, tmp_path / "file.onnx", images, min_agreement=1.0)
    assert not any(tmp_path.iterdir())
    assert export(model, tmp_path / "file.onnx", images, min_agreement=1.0, force=True).equal < 1
    assert (tmp_path / "file.onnx").exists()


def test_a_damaged_image_leaves_no_file(images, tmp_path):
    images.paths[4].write_bytes(b"no image")
    with pytest.raises(ReclipError, match=r"4\.png cannot be read"):
        export(build("student"), tmp_path / "file.onnx", images)
    assert not any(tmp_path.iterdir())


def test_models_and_options_without_int8(images, tmp_path):
    with pytest.raises(ReclipError, match="--int8 is for students.*reclip segment --student"):
        export(build("ReCLIP++"), tmp_path / "file.onnx", images)
    for options, message in (
        (ExportOptions(format="torchscript", int8=Int8Options()), "--int8 is for --format onnx"),
        (ExportOptions(int8=Int8Options(method="none")), "choose one of minmax, percentile, entropy"),
        (ExportOptions(int8=Int8Options(min_agreement=98)), "--min-agreement 98: give a fraction"),
        (ExportOptions(int8=Int8Options(min_agreement=math.nan)), "--min-agreement nan"),
    ):
        with pytest.raises(ReclipError, match=message):
            options.check()


def test_agreement_of_several_images():
    results = [Agreement((1, 30), 0.5, 4.0, 0.9), Agreement((2, 5), 0.1, 6.0, 0.5)]
    total = Int8Agreement.of(results)
    assert total.images == 2 and total.of_labels is False
    assert (total.equal, total.worst) == (pytest.approx((0.9 * 30 + 0.5 * 10) / 40), 0.5)
    assert (total.difference, total.mean_difference, total.span) == (0.5, pytest.approx(0.3), 6.0)
    assert str(total).startswith("INT8 on 2 calibration images: labels equal 80.00 % (worst image 50.00 %), largest")
    assert math.isnan(Int8Agreement.of([*results, Agreement((1, 1), math.nan, 1.0, 0.0)]).difference)
