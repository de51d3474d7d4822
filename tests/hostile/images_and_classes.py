"""Cases of images, class files and paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tests.hostile import inputs
from tests.hostile.driver import Case
from tests.hostile.inputs import content, replace

CLIP = ("--clip", "reclip-embedded", "--device", "cpu")
QUICK = ("MODEL.CLIP.TEMPLATES", "photo", "DATALOADER.NUM_WORKERS", "0")
SEGMENT = ("segment", "photos", "--classes", "classes.txt", "--output", "out", *CLIP)
FAST = (*SEGMENT, "--fast", "--opts", *QUICK)
PREDICT = ("predict", "photos", "--model", "model", "--output", "out", "--device", "cpu")
DATASET = ("--config-file", "{root}/configs/datasets/custom-reclip-embedded.yaml")
MASKCLIP, RECTIFY = "{root}/configs/methods/maskclip.yaml", "{root}/configs/methods/reclippp_rectify.yaml"
DEMO = (*DATASET, "--config-file", MASKCLIP, "--input", "photos", "--output", "out")
CUSTOM = ("MODEL.DEVICE", "cpu", "DATASETS.CUSTOM.CLASSES", "classes.txt", "DATASETS.CUSTOM.IMAGES", "photos", *QUICK)
DEMO_KEYS = ("--opts", *CUSTOM)
TRAIN_KEYS = (*CUSTOM, "OUTPUT_DIR", "out", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2",
              "HYPOTHESIS.WINDOW_RATIO", "0.5")  # fmt: skip
TRAIN = (*DATASET, "--config-file", RECTIFY, *TRAIN_KEYS)


def changed(arguments: tuple, old: str, *new: str) -> tuple:
    """Arguments with one of them replaced."""
    place = arguments.index(old)
    return (*arguments[:place], *new, *arguments[place + 1 :])


def cases() -> Iterator[Case]:
    """All of this module."""
    yield from fine()
    yield from images()
    yield from class_files()
    yield from outputs()
    yield from inputs_and_lists()


def fine() -> Iterator[Case]:
    """The commands that the others are variants of: what they refuse is not refused for another reason."""
    yield Case("segment", "reclip", FAST, fine=True, telling=True)
    yield Case("predict", "reclip", PREDICT, fine=True, model=True)
    yield Case("demo", "demo/demo.py", (*DEMO, *DEMO_KEYS), fine=True)
    yield Case("train", "train_net.py", TRAIN, fine=True)


def images() -> Iterator[Case]:
    telling = {"eps", "fifo", "bomb", "device"}
    for kind, write in inputs.BAD_IMAGES.items():
        name = "bad.png"
        prepare = replace(f"photos/{name}", write)
        words = "bad.png|1 of 3 images|1 image"
        yield Case(f"segment-image-{kind}", "reclip", FAST, prepare, words=words, telling=kind in telling)
        yield Case(f"predict-image-{kind}", "reclip", PREDICT, prepare, model=True, words=words)
        alone = changed((*DEMO, *DEMO_KEYS), "photos", f"photos/{name}")
        yield Case(f"demo-image-{kind}", "demo/demo.py", alone, prepare, words="bad.png|1 of 1")
    for kind, options in {
        "bands-zero": ("--bands", "0"), "bands-two": ("--bands", "1", "2"), "bands-text": ("--bands", "red"),
        "bands-nothing": ("--bands",), "bands-many": ("--bands", *"123456789"), "bands-photos": ("--bands", "1"),
        "stretch-descending": ("--stretch", "98", "2"), "stretch-nan": ("--stretch", "nan", "98"),
        "stretch-one": ("--stretch", "2"), "stretch-word": ("--stretch", "linear"),
        "stretch-photos": ("--stretch", "none"),
    }.items():  # fmt: skip
        yield Case(f"predict-{kind}", "reclip", (*PREDICT, *options), model=True, words="bands|stretch")
    for kind in ("cut-jpeg", "bomb", "eps", "fifo", "thin"):
        prepare = replace("photos/bad.png", inputs.BAD_IMAGES[kind])
        yield Case(f"train-image-{kind}", "train_net.py", TRAIN, prepare, words="bad")
        skip = (*SEGMENT, "--fast", "--skip-broken", "--opts", *QUICK)
        yield Case(f"segment-skipped-{kind}", "reclip", skip, prepare, fine=kind != "fifo", either=kind == "fifo")
    for name, write in inputs.GOOD_IMAGES.items():
        yield Case(f"segment-good-{os.fsencode(name)!r}", "reclip", FAST, replace(f"photos/{name}", write),
                   fine=name.isprintable(), either=not name.isprintable())  # fmt: skip


def class_files() -> Iterator[Case]:
    telling = {"twice-nfd", "longest", "many-background", "fifo"}
    for kind, (write, words) in inputs.BAD_CLASSES.items():
        prepare = replace("classes.txt", write)
        yield Case(f"segment-classes-{kind}", "reclip", FAST, prepare, words=words, telling=kind in telling)
        if kind in ("twice-nfd", "utf-16", "many", "fifo", "pickle", "missing", "longest", "empty", "long", "key"):
            yield Case(f"train-classes-{kind}", "train_net.py", TRAIN, prepare, words=words)
            yield Case(f"demo-classes-{kind}", "demo/demo.py", (*DEMO, *DEMO_KEYS), prepare, words=words)
    for kind, write in inputs.GOOD_CLASSES.items():
        yield Case(f"segment-classes-good-{kind}", "reclip", FAST, replace("classes.txt", write), fine=True)


OUTPUTS: dict[str, str] = {
    "empty": "",
    "file": "precious/letter.txt",
    "below-file": "precious/letter.txt/x",
    "others": "precious",
    "proc": "/proc/reclip",
    "sys": "/sys/reclip",
    "null": "/dev/null",
    "long": "out/" + "x" * 300,
    "longest": "out/" + "x/" * 3000,
    "url": "https://example.com/out",
    "bucket": "s3://bucket/out",
    "other-scheme": "gs://bucket/out",
    "not-utf-8": "out/a\udcff\udcfe",
    "line-end": "out/a\nb",
    "dangling": "dangling",
    "link-to-file": "link",
    "fifo": "pipe",
}


def make_links(case: Path) -> None:
    (case / "dangling").symlink_to("nowhere/at/all")
    (case / "link").symlink_to("precious/letter.txt")
    os.mkfifo(case / "pipe")


def outputs() -> Iterator[Case]:
    telling = {"empty", "others", "bucket", "fifo"}
    for kind, path in OUTPUTS.items():
        either = kind in ("not-utf-8", "line-end")
        for name, program, arguments, model in (
            ("segment", "reclip", FAST, False),
            ("predict", "reclip", PREDICT, True),
            ("demo", "demo/demo.py", (*DEMO, *DEMO_KEYS), False),
        ):
            if (name, kind) == ("demo", "others"):  # it draws into any folder
                continue
            yield Case(f"{name}-output-{kind}", program, changed(arguments, "out", path), make_links, model=model,
                       either=either, telling=name == "segment" and kind in telling)  # fmt: skip
        if kind == "others":  # Detectron2's programs write into any folder that holds no run
            continue
        yield Case(f"train-output-{kind}", "train_net.py", changed(TRAIN, "out", path), make_links, either=either,
                   telling=kind == "proc")  # fmt: skip
    overwrite = (*PREDICT, "--overwrite")
    for kind, path, make in (
        ("model", "model", None),
        ("model-dots", "photos/../model", None),
        ("model-link", "same", lambda case: (case / "same").symlink_to("model")),
        ("model-masks", "model/masks", None),
        ("model-run", "model/run/rectified", None),
        ("photos", "photos", None),
        ("here", ".", None),
        ("home", "precious/..", None),
        ("root", "/", None),
    ):
        yield Case(f"predict-overwrite-{kind}", "reclip", changed(overwrite, "out", path), make, model=True,
                   telling=kind in ("model-dots", "model-link"))  # fmt: skip
        again = (*SEGMENT, "--fast", "--overwrite", "--opts", *QUICK)
        if not kind.startswith("model"):
            yield Case(f"segment-overwrite-{kind}", "reclip", changed(again, "out", path), make)


def inputs_and_lists() -> Iterator[Case]:
    wrong = {
        "missing": "nothing", "empty": "", "empty-folder": "home", "glob": "photos/*.xyz", "null": "/dev/null",
        "url": "https://example.com/a.jpg", "pipe": "pipe", "long": "x" * 5000, "file": "classes.txt.jpg",
        "proc": "/proc/1/mem", "brackets": "[", "many-stars": "**/" * 50 + "*.nope",
    }  # fmt: skip
    for kind, path in wrong.items():
        telling = kind in ("missing", "pipe")
        yield Case(f"segment-input-{kind}", "reclip", changed(FAST, "photos", path), make_links, telling=telling)
        yield Case(f"demo-input-{kind}", "demo/demo.py", changed((*DEMO, *DEMO_KEYS), "photos", path), make_links)
    lists = {
        "itself": content("list.txt\n"),
        "missing": content("photos/0.jpg\nphotos/nothing.jpg\n"),
        "zeros": content(b"photos/0.jpg\0photos/1.jpg\n"),
        "utf-16": content("photos/0.jpg\n".encode("utf-16")),
        "empty": content(""),
        "pickle": content(inputs.PICKLE),
        "device": content("/dev/zero\n"),
        "long": content("x" * 2_000_000),
        "fifo": inputs.fifo,
    }
    for kind, write in lists.items():
        yield Case(f"segment-list-{kind}", "reclip", changed(FAST, "photos", "list.txt"), replace("list.txt", write),
                   telling=kind == "itself")  # fmt: skip
