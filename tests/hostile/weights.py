"""Cases of checkpoints, CLIP's weights, and files that are converted."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.hostile import inputs
from tests.hostile.driver import Case
from tests.hostile.images_and_classes import FAST, PREDICT, TRAIN, changed
from tests.hostile.inputs import content, replace

FINAL = "model/run/rectified/model_final.pth"


def saved(value: object) -> bytes:
    """A file of ``torch.save``."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """The finished run's checkpoint, with a change."""

    def prepare(case: Path) -> None:
        checkpoint = torch.load(case / FINAL, weights_only=True)
        result = change(checkpoint)
        torch.save(checkpoint if result is None else result, case / FINAL)

    return prepare


def bytes_changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The finished run's checkpoint, with other bytes."""

    def prepare(case: Path) -> None:
        path = case / FINAL
        path.write_bytes(change(path.read_bytes()))

    return prepare


def _first(checkpoint: dict) -> tuple[dict, str]:
    """The model's weights, and the name of a matrix among them."""
    model = checkpoint["model"]
    return model, next(
        key for key, value in model.items() if getattr(value, "ndim", 0) >= 2 and value.is_floating_point()
    )


def put(make: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    """One of the checkpoint's tensors is another."""

    def change(checkpoint: dict) -> None:
        model, key = _first(checkpoint)
        model[key] = make(model[key])

    return edited(change)


def _flip_a_bit(data: bytes) -> bytes:
    """In the middle of the largest entry of the archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    place = entry.header_offset + 200 + entry.file_size // 2
    return data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :]


def _bomb(path: Path) -> None:
    """An archive whose entry would be 3 GB."""
    source = zipfile.ZipFile(io.BytesIO(saved({"model": {"x": torch.zeros(4)}})))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in source.infolist():
            with archive.open(info.filename, "w", force_zip64=True) as entry:
                if "/data/" in info.filename:
                    for _ in range(3000):
                        entry.write(b"\0" * (1 << 20))
                else:
                    entry.write(source.read(info.filename))


def _pickled_archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", inputs.PICKLE)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


_SAFETENSORS_LIE = b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "empty": replace(FINAL, content(b"")),
    "zeros": replace(FINAL, content(b"\0" * 5000)),
    "text": replace(FINAL, content("weights")),
    "html": replace(FINAL, content(inputs.HTML)),
    "lfs": replace(FINAL, content(inputs.LFS)),
    "image": replace(FINAL, content(inputs.encoded(inputs.rgb(), "PNG"))),
    "pickle": replace(FINAL, content(inputs.PICKLE)),
    "pickle-in-archive": replace(FINAL, content(_pickled_archive())),
    "payload": edited(lambda checkpoint: checkpoint["model"].update(x=inputs.Payload())),
    "fifo": replace(FINAL, inputs.fifo),
    "device": replace(FINAL, inputs.link("/dev/zero")),
    "loop": replace(FINAL, inputs.link("model_final.pth")),
    "folder": replace(FINAL, inputs.folder),
    "missing": lambda case: (case / FINAL).unlink(),
    "cut": bytes_changed(lambda data: data[: len(data) // 2]),
    "cut-little": bytes_changed(lambda data: data[:-100]),
    "bit": bytes_changed(_flip_a_bit),
    "head": bytes_changed(lambda data: b"XX" + data[2:]),
    "bomb": replace(FINAL, _bomb),
    "list": replace(FINAL, content(saved([1, 2, 3]))),
    "number": replace(FINAL, content(saved(5))),
    "nothing": replace(FINAL, content(saved({}))),
    "no-model": edited(lambda checkpoint: {k: v for k, v in checkpoint.items() if k != "model"}),
    "no-weights": edited(lambda checkpoint: checkpoint.update(model={})),
    "model-text": edited(lambda checkpoint: checkpoint.update(model="x")),
    "number-keys": edited(lambda checkpoint: checkpoint.update(model={5: torch.zeros(1)})),
    "nan": put(lambda tensor: tensor.fill_(float("nan"))),
    "inf": put(lambda tensor: tensor.index_fill(0, torch.tensor([0]), float("inf"))),
    "shape": put(lambda tensor: tensor[:1]),
    "integers": put(lambda tensor: tensor.to(torch.int64)),
    "complex": put(lambda tensor: tensor.to(torch.complex64)),
    "text-tensor": put(lambda tensor: "x"),
    "none": put(lambda tensor: None),
    "sparse": put(lambda tensor: tensor.to_sparse()),
    "meta": put(lambda tensor: tensor.to("meta")),
    "quantised": put(lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
    "expanded": put(lambda tensor: torch.zeros(1).expand(2**40)),
    "safetensors-lie": replace(FINAL, content(struct.pack("<Q", len(_SAFETENSORS_LIE)) + _SAFETENSORS_LIE)),
    "safetensors-head": replace(FINAL, content(struct.pack("<Q", 2**62) + b"{}")),
}
_TELLING = {"pickle", "payload", "bit", "nan", "lfs", "sparse"}


def cases() -> Iterator[Case]:
    """All of this module."""
    for kind, prepare in CHECKPOINTS.items():
        yield Case(f"predict-weights-{kind}", "reclip", PREDICT, prepare, model=True, telling=kind in _TELLING,
                   words="model_final|no finished model|model|weights")  # fmt: skip
    for kind in ("pickle", "payload", "bit", "nan", "bomb", "lfs", "fifo", "cut", "html", "no-model", "sparse"):
        train = (*TRAIN, "MODEL.WEIGHTS", FINAL)
        yield Case(f"evaluate-weights-{kind}", "train_net.py", ("--eval-only", *train, "DATASETS.TEST", "('custom',)"),
                   CHECKPOINTS[kind], model=True)  # fmt: skip
        export = ("export", "--model", "model", "--format", "torchscript", "--output", "out/x.pt")
        yield Case(f"export-weights-{kind}", "reclip", export, CHECKPOINTS[kind], model=True)
    clips = {
        "empty": content(b""), "zeros": content(b"\0" * 5000), "html": content(inputs.HTML), "lfs": content(inputs.LFS),
        "pickle": content(inputs.PICKLE), "archive": content(_pickled_archive()), "fifo": inputs.fifo, "bomb": _bomb,
        "device": inputs.link("/dev/zero"), "list": content(saved([1])), "other": content(saved({"x": torch.zeros(3)})),
        "text": content("x"), "folder": inputs.folder, "loop": inputs.link("clip.pt"),
        "lie": content(struct.pack("<Q", len(_SAFETENSORS_LIE)) + _SAFETENSORS_LIE),
    }  # fmt: skip
    for kind, write in clips.items():
        arguments = (*changed(FAST, "reclip-embedded", "ViT-B-32")[:-5], "--pretrained", "clip.pt")
        yield Case(f"segment-clip-{kind}", "reclip", arguments, replace("clip.pt", write), words="clip.pt",
                   telling=kind == "pickle")  # fmt: skip
        convert = ("clip.pt", "out/x.pth", "--class-names", "names.txt", "--clip", "reclip-embedded")
        yield Case(f"convert-{kind}", "tools/convert_public_checkpoint.py", convert, replace("clip.pt", write),
                   words="clip.pt|names.txt")  # fmt: skip
    for kind, value in {"missing": "nothing.pt", "folder": "precious", "tag": "no_such_tag", "url": "https://127.0.0.1:1/x.pt",
                        "hub": "hf-hub:a/b", "empty": ""}.items():  # fmt: skip
        arguments = (*changed(FAST, "reclip-embedded", "ViT-B-32")[:-5], "--pretrained", value)
        yield Case(f"segment-pretrained-{kind}", "reclip", arguments, telling=kind == "url")
    students = {
        "missing": "nothing.pth", "pickle": "x.pkl", "url": "https://127.0.0.1:1/x.pkl", "folder": "precious",
        "d2": "detectron2://nothing/x.pkl",
    }  # fmt: skip
    for kind, value in students.items():
        arguments = ("segment", "photos", "--classes", "classes.txt", "--output", "out", "--clip", "reclip-embedded",
                     "--device", "cpu", "--student", "--student-weights", value)  # fmt: skip
        yield Case(f"segment-student-{kind}", "reclip", arguments, replace("x.pkl", content(inputs.PICKLE)))
