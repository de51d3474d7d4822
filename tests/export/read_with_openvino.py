"""Run exported files with OpenVINO: a program for an environment with NumPy and openvino, for ``test_openvino.py``.

python tests/export/read_with_openvino.py FILE.onnx INPUTS.npz OUTPUTS.npz
"""

import sys

import numpy as np
import openvino

if __name__ == "__main__":
    file, inputs, outputs = sys.argv[1:]
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(file, "CPU", settings)
    images = np.load(inputs)
    np.savez(outputs, **{name: model({"image": images[name]})[0] for name in images.files})
