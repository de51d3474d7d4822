"""A minimal source archive that the patches apply to."""

import io
import tarfile

# The least that every patch finds its text in.
SOURCES = {
    "detectron2/__init__.py": '__version__ = "0.5"\n',
    "detectron2/data/transforms/transform.py": "def extent(interp=Image.LINEAR):\n    return Image.NEAREST\n",
    "detectron2/evaluation/sem_seg_evaluation.py": (
        "a = np.zeros(3, dtype=np.int)\nb = a.astype(np.float)\nc = np.bool_(1), np.int64(2), np.floor(b)\n"
    ),
    "detectron2/export/__init__.py": "from .api import *\nfrom .flatten import TracingAdapter\n",
    "detectron2/layers/nms.py": (
        "def nms_rotated(boxes, scores, iou_threshold):\n"
        "    return torch.ops.detectron2.nms_rotated(boxes, scores, iou_threshold)\n"
    ),
    "detectron2/layers/rotated_boxes.py": "from detectron2 import _C\n",
    "detectron2/model_zoo/model_zoo.py": (
        "import os\nimport pkg_resources\n\n\n"
        "def get_config_file(config_path):\n"
        "    cfg_file = pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )\n"
        "    return cfg_file\n"
    ),
    "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
    "projects/DeepLab/deeplab/__init__.py": "from .loss import x\n",
    "projects/DeepLab/train_net.py": "raise SystemExit\n",
    "LICENSE": "Apache License\n",
    "setup.py": "raise SystemExit\n",
}


def make_sdist(sources: dict[str, str], root: str = "detectron2_cdo-0.5") -> bytes:
    """The content of a source archive of these files."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, text in sources.items():
            member = tarfile.TarInfo(f"{root}/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return content.getvalue()


def package_files(sources: dict[str, str]) -> dict[str, bytes]:
    return {name: text.encode() for name, text in sources.items() if name.startswith("detectron2/")}
