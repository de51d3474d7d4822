"""OpenVINO, in a separate environment, computes what the model does from the same files as onnxruntime."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reclip_d2.export import CalibrationImages, ExportOptions, Int8Options, export_model
from reclip_d2.export.parity import check_image
from tests.environments import make_environment, run_program
from tests.export.conftest import build, logits_of

SIZES = [(32, 40), (45, 61), (7, 50)]


@pytest.mark.slow
def test_openvino_reads_our_files(tmp_path):
    model = build("student")
    images = {str(seed): check_image(seed, size)[None].numpy() for seed, size in enumerate(SIZES)}
    np.savez(tmp_path / "inputs.npz", **images)
    for name, image in images.items():
        Image.fromarray(image[0].transpose(1, 2, 0)).save(tmp_path / f"{name}.png")
    calibration = CalibrationImages(tuple(tmp_path / f"{name}.png" for name in images), len(images))
    python = make_environment(tmp_path / "environment", ("openvino",))
    program = Path(__file__).with_name("read_with_openvino.py")
    # 8 bits of random weights: onnxruntime's file is as far from the model (test_int8.py).
    for int8, tolerance in ((None, 1e-5), (Int8Options(force=True), 0.15)):
        file = tmp_path / "student.onnx"
        export_model(model, file, ExportOptions(int8=int8), calibration=calibration)
        run_program(python, program, file, tmp_path / "inputs.npz", tmp_path / "outputs.npz", folder=tmp_path)
        outputs = np.load(tmp_path / "outputs.npz")
        for name, image in images.items():
            expected = logits_of(model, torch.from_numpy(image)).numpy()
            assert np.abs(outputs[name] - expected).max() <= tolerance * np.ptp(expected)
            if int8 is None:
                assert np.mean(outputs[name].argmax(1) == expected.argmax(1)) > 0.999
