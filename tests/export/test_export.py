"""Exported files agree with the models, on sizes other than the trace's."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from reclip_d2.errors import ReclipError
from reclip_d2.export import ExportOptions, export, export_model, onnx_file
from reclip_d2.export.export import FORMATS
from tests.export.conftest import MODELS, build, logits_of
from tests.helpers import random_image

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")

# Multiples of the stride and others, the grids of the maps (4 x 5 of students, 4 x 4 of the CLIP), one patch high.
SIZES = [(32, 40), (32, 32), (45, 61), (7, 50)]


def run_onnx(path, image):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"image": image.numpy()})
    return torch.from_numpy(output)


def run_torchscript(path, image):
    with torch.no_grad():
        return torch.jit.load(str(path))(image)


RUN = {"onnx": run_onnx, "torchscript": run_torchscript}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", FORMATS)
def test_any_size(target, name, tmp_path):
    model = build(name)
    results = export_model(model, tmp_path / "file", ExportOptions(format=target))
    assert len(results) == 2 and all(0 <= result.difference < 1e-5 * result.span for result in results)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    for seed, size in enumerate(SIZES):
        image = random_image(seed, *size)[None]
        expected = logits_of(model, image)
        torch.testing.assert_close(RUN[target](tmp_path / "file", image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_channel_order_and_floating_point_pixels(target, image_format, tmp_path):
    model = build("student")
    model.image_format = image_format
    model.pixel_mean.copy_(torch.tensor([10.0, 90.0, 150.0]).view(3, 1, 1))
    export_model(model, tmp_path / "file", ExportOptions(format=target, input_type="float32"))
    image = random_image(0, 20, 30)[None] + 0.25
    expected = logits_of(model, image)
    torch.testing.assert_close(RUN[target](tmp_path / "file", image), expected, rtol=1e-4, atol=1e-5)
    if target == "torchscript":  # takes both
        rounded = random_image(0, 20, 30)[None]
        assert torch.equal(
            RUN[target](tmp_path / "file", rounded), RUN[target](tmp_path / "file", rounded.to(torch.float32))
        )


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize(("ids", "dtype"), [(None, "uint8"), ((0, 255, 1, 255), "uint8"), ((3, 2, 1, 400), "int32")])
def test_labels(target, ids, dtype, tmp_path):
    model = build("student")
    options = ExportOptions(format=target, labels=True, label_ids=ids)
    results = export_model(model, tmp_path / "file", options)
    assert all(result.of_labels and result.equal == 1 for result in results)
    image = random_image(2, 37, 41)[None]
    labels = RUN[target](tmp_path / "file", image)
    assert labels.shape == (1, 37, 41) and labels.dtype == getattr(torch, dtype)
    best = logits_of(model, image).argmax(1).numpy()
    assert len(np.unique(best)) > 1
    np.testing.assert_array_equal(labels.numpy(), best if ids is None else np.array(ids)[best])


def cubic_resizes(path) -> int:
    """Bicubic resizes in an ONNX graph."""
    nodes = onnx.load(path).graph.node
    return sum(attribute.s == b"cubic" for node in nodes for attribute in node.attribute if attribute.name == "mode")


@pytest.mark.parametrize("size", [(32, 40), (45, 61)])
@pytest.mark.parametrize("name", ["student", "ReCLIP++", "ReCLIP", "MaskCLIP with all options"])
def test_one_size_needs_no_bicubic_resize(name, size, tmp_path):
    model = build(name)
    path = tmp_path / "file.onnx"
    export_model(model, path, ExportOptions(size=size))
    image = random_image(1, *size)[None]
    torch.testing.assert_close(run_onnx(path, image), logits_of(model, image), rtol=1e-4, atol=1e-5)
    graph = onnx.load(path).graph
    for value, shape in ((graph.input[0], [1, 3, *size]), (graph.output[0], [1, 4, *size])):
        assert [dimension.dim_value for dimension in value.type.tensor_type.shape.dim] == shape
    assert cubic_resizes(path) == 0
    with pytest.raises(InvalidArgument, match="dimensions"):
        run_onnx(path, random_image(1, 24, 24)[None])
    # The model has its own maps back.
    export_model(model, path, ExportOptions())
    assert cubic_resizes(path) > 0


def test_an_onnx_file(tmp_path):
    path = tmp_path / "file.onnx"
    export_model(build("ReCLIP++"), path, ExportOptions(), description='{"a": "ä"}')
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert {entry.key: entry.value for entry in model.metadata_props} == {"classes.json": '{"a": "ä"}'}
    names = [dimension.dim_param for dimension in model.graph.output[0].type.tensor_type.shape.dim]
    assert (model.graph.input[0].name, model.graph.output[0].name) == ("image", "logits")
    assert names == ["", "", "height", "width"]
    # CLIP's text tower, most of this model, is not in it.
    assert path.stat().st_size < 500_000 < 4 * 49408 * 32


def test_a_torchscript_file(tmp_path):
    path = tmp_path / "file.pt"
    export_model(build("ReCLIP++"), path, ExportOptions(format="torchscript"), description='{"a": "ä"}')
    files = {"classes.json": ""}
    loaded = torch.jit.load(str(path), _extra_files=files)
    assert files["classes.json"].decode() == '{"a": "ä"}'
    assert path.stat().st_size < 500_000
    # Nothing in it holds it to the device that it was made on, nor to private operators of this PyTorch.
    graph = str(loaded.inlined_graph)
    assert "aten::scaled_dot_product_attention" in graph and "_native" not in graph
    assert 'value="cpu"' not in graph and 'value="cuda' not in graph


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["student", "ReCLIP++"])
def test_a_torchscript_file_on_a_gpu(name, tmp_path):
    model = build(name)
    export_model(model, tmp_path / "file.pt", ExportOptions(format="torchscript"))
    image = random_image(1, 45, 61)[None]
    with torch.no_grad():
        logits = torch.jit.load(str(tmp_path / "file.pt"), map_location="cuda")(image.cuda())
    torch.testing.assert_close(logits.cpu(), logits_of(model, image), rtol=1e-2, atol=1e-2)


# ---- files that are not kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", FORMATS)
def test_a_file_that_holds_one_size_only_is_not_kept(target, tmp_path, monkeypatch):
    # A trace at the size of the bias map bakes "no resize" in.
    monkeypatch.setattr(export, "trace_size", lambda model: (32, 40))
    (tmp_path / "file").write_text("before")
    with pytest.raises(ReclipError, match="cannot be run on an image of 23 x 53, and was removed"):
        export_model(build("student"), tmp_path / "file", ExportOptions(format=target))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("labels", [False, True])
def test_a_file_of_other_values_is_not_kept(labels, tmp_path, monkeypatch):
    write = onnx_file.write

    def wrong(module, *arguments):
        module.pixel_mean += 40
        write(module, *arguments)

    monkeypatch.setattr(onnx_file, "write", wrong)
    model, seen = build("student"), []
    with pytest.raises(ReclipError, match=r"does not compute what the model does.*32 x 40"):
        export_model(model, tmp_path / "file", ExportOptions(labels=labels), report=seen.append)
    assert not any(tmp_path.iterdir())
    assert len(seen) == 2 and all(result.difference > 1e-3 * result.span for result in seen)
    # With enough tolerance it is.
    export_model(model, tmp_path / "file", ExportOptions(labels=labels, tolerance=10.0))
    assert (tmp_path / "file").exists()


def test_an_operator_that_onnx_lacks(tmp_path, monkeypatch):
    model = build("student")
    mask_logits = model.mask_logits
    monkeypatch.setattr(model, "mask_logits", lambda pixels: mask_logits(pixels) + torch.linalg.svdvals(pixels).sum())
    with pytest.raises(ReclipError, match="svdvals.*: use torchscript"):
        export_model(model, tmp_path / "file.onnx", ExportOptions())
    assert not any(tmp_path.iterdir())


def test_a_model_that_is_too_large_for_onnx(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("The serialized model is larger than the 2GiB limit imposed by the protobuf library.")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ReclipError, match="too large for an ONNX file"):
        export_model(build("student"), tmp_path / "file.onnx", ExportOptions())


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ReclipError, match="^onnx needs onnxruntime: pip install onnxruntime$"):
        ExportOptions().check()
    ExportOptions(format="torchscript").check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 5)}, "at least 1"),
        ({"tolerance": 0.0}, "above 0"),
        ({"tolerance": float("nan")}, "above 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ReclipError, match=message):
        ExportOptions(**options).check()
