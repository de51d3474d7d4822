"""Cases of the preparation programs, the tools, and environment variables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.datasets_prep import miniatures
from tests.hostile import inputs
from tests.hostile.driver import Case
from tests.hostile.images_and_classes import (
    CUSTOM,
    DATASET,
    DEMO,
    DEMO_KEYS,
    FAST,
    MASKCLIP,
    OUTPUTS,
    TRAIN,
    TRAIN_KEYS,
    changed,
    make_links,
)
from tests.hostile.inputs import content, replace
from tests.hostile.keys_and_configs import BAD_YAML

VOC = "datasets/VOCdevkit/VOC2012"
VOC_LABEL, VOC_IMAGE = f"{VOC}/SegmentationClass/2007_000033.png", f"{VOC}/JPEGImages/2007_000033.jpg"
VOC_LIST = f"{VOC}/ImageSets/Segmentation/val.txt"
PREPARE = ("--workers", "1")
# The data sets' own folder is where these programs write.
Prepare = Callable[[Path], object]


def voc(*further: Prepare) -> Prepare:
    """The miniature of VOC, with changes."""

    def prepare(case: Path) -> None:
        miniatures.make_voc20(case / "datasets")
        for change in further:
            change(case)

    return prepare


def label(make: Callable[[np.ndarray], Image.Image | np.ndarray]) -> Prepare:
    """VOC's first label is another."""

    def prepare(case: Path) -> None:
        with Image.open(case / VOC_LABEL) as image:
            made = make(np.asarray(image))
        (made if isinstance(made, Image.Image) else Image.fromarray(made)).save(case / VOC_LABEL)

    return prepare


def _shuffled_palette(ids: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids).convert("P")
    image.putpalette([(i * 37 + k * 11) % 256 for i in range(256) for k in range(3)])
    return image


LABELS: dict[str, Prepare] = {
    "binary": label(lambda ids: (ids > 0).astype(np.uint8) * 255),
    "binary-one": label(lambda ids: Image.fromarray(ids > 0)),
    "rgb": label(lambda ids: np.stack([ids] * 3, axis=-1)),
    "foreign-palette": label(_shuffled_palette),
    "large-id": label(lambda ids: np.full_like(ids, 77)),
    "deep": label(lambda ids: ids.astype(np.uint16) * 256),
    "size": label(lambda ids: ids[:-3]),
    "empty": replace(VOC_LABEL, content(b"")),
    "text": replace(VOC_LABEL, content("label")),
    "cut": replace(VOC_LABEL, inputs.BAD_IMAGES["cut-png"]),
    "bomb": replace(VOC_LABEL, inputs.bomb),
    "eps": replace(VOC_LABEL, content(inputs.EPS)),
    "fifo": replace(VOC_LABEL, inputs.fifo),
    "device": replace(VOC_LABEL, inputs.link("/dev/zero")),
    "loop": replace(VOC_LABEL, inputs.link("2007_000033.png")),
    "missing": lambda case: (case / VOC_LABEL).unlink(),
    "image-missing": lambda case: (case / VOC_IMAGE).unlink(),
    "image-text": replace(VOC_IMAGE, content("image")),
    "image-fifo": replace(VOC_IMAGE, inputs.fifo),
    "image-bomb": replace(VOC_IMAGE, inputs.bomb),
}
IDS = {
    "dots": "../../../../precious/letter", "absolute": "/tmp/x", "empty-line": "", "itself": ".", "parent": "..",
    "zeros": "a\0b", "long": "x" * 5000, "missing": "2007_999999", "spaces": "  2007_000033  x", "slash": "a/b",
    "not-utf-8": "a\udcff",
}  # fmt: skip


def cases() -> Iterator[Case]:
    """All of this module."""
    yield from preparations()
    yield from tools()
    yield from environments()


def preparations() -> Iterator[Case]:
    program = "datasets/prepare_voc20.py"
    for kind, change in LABELS.items():
        yield Case(f"voc-label-{kind}", program, PREPARE, voc(change, _writable), words="2007_000033|label|image",
                   environment=_OUT, telling=kind in ("binary", "foreign-palette", "fifo"))  # fmt: skip
    for kind, name in IDS.items():
        change = replace(VOC_LIST, content(f"2007_000033\n{name}\n"))
        yield Case(f"voc-id-{kind}", program, PREPARE, voc(change, _writable), environment=_OUT,
                   either=kind == "empty-line", telling=kind in ("dots", "absolute"))  # fmt: skip
    for kind, write in {"empty": content(""), "zeros": content(b"\0" * 50), "utf-16": content("x\n".encode("utf-16")),
                        "fifo": inputs.fifo, "device": inputs.link("/dev/zero"), "folder": inputs.folder,
                        "pickle": content(inputs.PICKLE)}.items():  # fmt: skip
        yield Case(f"voc-list-{kind}", program, PREPARE, voc(replace(VOC_LIST, write), _writable), environment=_OUT)
    sets = {
        "voc20": miniatures.make_voc20, "context59": miniatures.make_context59, "ade150": miniatures.make_ade150,
        "cityscapes19": miniatures.make_cityscapes19, "coco_stuff": miniatures.make_coco_stuff,
    }  # fmt: skip
    for name, make in sets.items():
        program = f"datasets/prepare_{name}.py"

        def miniature(case: Path, make: Callable = make) -> None:
            make(case / "out")

        yield Case(f"{name}-fine", program, PREPARE, miniature, fine=True, environment={"DETECTRON2_DATASETS": "out"})
        yield Case(f"{name}-nothing", program, PREPARE, words="(?i)datasets|does not exist|missing|no ")
        yield Case(f"{name}-option", program, ("--nothing",))
        yield Case(
            f"{name}-workers", program, ("--workers", "-3"), miniature, environment={"DETECTRON2_DATASETS": "out"}
        )
        yield Case(f"{name}-splits", program, (*PREPARE, "--splits", "test"))
        yield Case(f"{name}-file", program, PREPARE, environment={"DETECTRON2_DATASETS": "precious/letter.txt"})
    context = {
        "text": content("hello"), "deep": content("[" * 100_000), "list": content("[]"), "numbers": content("5"),
        "keys": content('{"images": 5, "annos": [], "categories": []}'), "fifo": inputs.fifo,
        "device": inputs.link("/dev/zero"), "pickle": content(inputs.PICKLE), "nan": content('{"images": [NaN]}'),
        "rle": content(json.dumps({
            "images": [{"file_name": "x.jpg", "image_id": 1, "phase": "val", "height": 5, "width": 5}],
            "annos": [{"image_id": 1, "segmentation": {"size": [10**6, 10**6], "counts": "x"}, "category_id": 2}],
            "categories": [{"id": 2, "name": "aeroplane"}]})),
    }  # fmt: skip
    for kind, write in context.items():

        def damaged(case: Path, write: inputs.Writer = write) -> None:
            miniatures.make_context59(case / "out")
            replace("out/VOC2010/trainval_merged.json", write)(case)

        yield Case(f"context-json-{kind}", "datasets/prepare_context59.py", PREPARE, damaged,
                   words="trainval_merged", environment={"DETECTRON2_DATASETS": "out"})  # fmt: skip


_OUT = {"DETECTRON2_DATASETS": "out"}


def _writable(case: Path) -> None:
    """The data sets lie where the program may write."""
    (case / "datasets").rename(case / "out")
    (case / "datasets").mkdir()


def tools() -> Iterator[Case]:
    files = {"text": content("hello\n"), "pickle": content(inputs.PICKLE), "negative": content("[-1]\n"),
             "huge": content("[1" + "0" * 5000 + "]\n"), "deep": content("[" * 100_000 + "\n"), "fifo": inputs.fifo,
             "device": inputs.link("/dev/zero"), "code": content('__import__("os").system("touch CANARY")\n'),
             "empty": content(""), "folder": inputs.folder}  # fmt: skip
    for kind, write in files.items():
        arguments = ("public.txt", "out/x.jsonl", "--dataset", "embedded_val")
        yield Case(f"import-{kind}", "tools/import_public_hypotheses.py", arguments, replace("public.txt", write),
                   words="public.txt", telling=kind == "code", environment=_OUT)  # fmt: skip
        yield Case(f"kernel-report-{kind}", "tools/kernel_report.py", ("public.txt",), replace("public.txt", write),
                   either=True)  # fmt: skip
        listed = ("--suite", "embedded", "--out", "out", "--list", "--suite-file", "public.txt")
        yield Case(f"reproduce-suite-{kind}", "tools/reproduce.py", listed, replace("public.txt", write),
                   words="public.txt")  # fmt: skip
    for kind in ("python", "bomb", "deep", "set", "itself"):
        listed = ("--suite", "embedded", "--out", "out", "--list", "--suite-file", "suite.yaml")
        yield Case(f"reproduce-yaml-{kind}", "tools/reproduce.py", listed, replace("suite.yaml", BAD_YAML[kind]))
    suite = ("--suite", "embedded", "--out", "out")
    analyze = (*DATASET, "--config-file", MASKCLIP, "--output-dir", "out")
    convert = ("classes.txt", "out/x.pth")
    maskclip_of = (*DATASET, "--config-file", MASKCLIP)
    wrong = {
        "import_public_hypotheses": {
            "dataset": ("classes.txt", "out/x", "--dataset", "nothing"),
            "nothing": ("nothing", "out/x", "--dataset", "embedded_val"),
        },
        "reproduce": {
            "suite": ("--suite", "nothing", "--out", "out"), "experiment": (*suite, "--list", "--experiments", "x"),
            "seeds": (*suite, "--list", "--seeds", "-5"), "jobs": (*suite, "--list", "--jobs", "-1"),
            "out": ("--suite", "embedded", "--out", "precious/letter.txt", "--report-only"),
        },
        "benchmark_kernels": {
            "pixels": ("--pixels", "0", "--repeats", "1"), "batches": ("--batches", "-1", "--repeats", "1"),
            "repeats": ("--repeats", "0"), "threads": ("--threads", "-1"), "device": ("--device", "mps"),
            "json": ("--json", "precious/letter.txt/x"),
        },
        "pretrain_embedded_clip": {
            "steps": ("--steps", "0", "--out", "out/x"), "pool": ("--pool", "-1", "--out", "out/x"),
            "seed": ("--seed", "-1", "--out", "out/x"), "threads": ("--threads", "0", "--out", "out/x"),
            "out": ("--out", "/proc/x", "--steps", "1"),
        },
        "demo": {
            "seed": ("--seed", "-5", "--output-dir", "out"), "device": ("--device", "mps", "--output-dir", "out"),
            "output": ("--output-dir", "precious/letter.txt"), "dataset": ("--dataset", "nothing"),
        },
        "convert_public_checkpoint": {
            "dataset": (*convert, "--dataset", "nothing"), "names": (*convert, "--class-names", "nothing"),
            "extension": ("classes.txt", "out/x.exe", "--dataset", "voc20_val"),
        },
        "analyze_bias": {
            "dataset": (*analyze, "--dataset", "nothing", "--opts", *CUSTOM), "compare": (*analyze, "--compare", "x"),
            "scenes": (*analyze, "--scenes", "-1", "--opts", *CUSTOM),
        },
        "linear_probe": {"unlabelled": TRAIN},
        "kernel_report": {"nothing": ("nothing",)},
        "evaluate_masks": {
            "dataset": ("photos", "--dataset", "nothing"), "folder": ("nothing", "--dataset", "embedded_val"),
            "names": ("photos", "--dataset", "embedded_val", "--names", "nothing"),
        },
        "judge_masks": {
            "runs": ("--out", "out", "--runs", "nothing"), "clip": ("--out", "out", "--clip", "embedded=nothing"),
            "world": ("--out", "out", "--clip", "nothing"), "out": ("--out", "precious/letter.txt", "--runs", "none"),
        },
        "make_hypotheses": {"option": ("--nothing",)},
        "benchmark_deployment": {
            "weights": (*maskclip_of, "--weights", "nothing", "--calibrate", "photos"),
            "file": (*maskclip_of, "--weights", "classes.txt", "--calibrate", "photos"),
            "calibrate": (*maskclip_of, "--weights", "classes.txt", "--calibrate", "nothing"),
            "repeats": (*maskclip_of, "--weights", "classes.txt", "--calibrate", "photos", "--repeats", "0"),
        },
        "synonym_report": {
            "synonyms": (*maskclip_of, "--synonyms", "nothing"), "photo": (*maskclip_of, "--synonyms", "photos/a.jpg"),
            "images": (*maskclip_of, "--synonyms", "classes.txt", "--images", "-1"),
            "output": (*maskclip_of, "--synonyms", "classes.txt", "--output", "precious/letter.txt/x"),
        },
        "build_bank": {
            "output": (*maskclip_of, "--output", "/proc/x.safetensors"),
            "extension": (*maskclip_of, "--output", "out/x"),
            "there": (*maskclip_of, "--output", "precious/letter.txt"),
        },
    }  # fmt: skip
    for tool, variants in wrong.items():
        for kind, arguments in variants.items():
            yield Case(f"tool-{tool}-{kind}", f"tools/{tool}.py", arguments,
                       telling=(tool, kind) in (("reproduce", "suite"), ("demo", "output")))  # fmt: skip
    for kind, arguments in {"wheel": ("--wheel-dir", "precious/letter.txt"), "option": ("--nothing",),
                            "archive": ("--sdist", "classes.txt", "--wheel-dir", "out"),
                            "pipe": ("--sdist", "pipe", "--wheel-dir", "out")}.items():  # fmt: skip
        yield Case(f"install-{kind}", "reclip_d2/install_detectron2/__main__.py", arguments, make_links)
    maskclip = (*DATASET, "--config-file", MASKCLIP, *TRAIN_KEYS)
    unlabelled = ("--eval-only", *maskclip, "DATASETS.TEST", "('custom',)")
    yield Case("evaluate-unlabelled", "train_net.py", unlabelled)
    yield Case("train-maskclip", "train_net.py", maskclip)
    yield Case("evaluate-nothing", "train_net.py", ("--eval-only", *TRAIN))
    for kind in ("proc", "bucket", "file", "null", "empty", "fifo"):
        hypotheses = changed(TRAIN, "out", OUTPUTS[kind])
        yield Case(f"hypotheses-output-{kind}", "tools/make_hypotheses.py", hypotheses, make_links)
        export = ("export", "--model", "model", "--format", "torchscript", "--output", OUTPUTS[kind])
        yield Case(f"export-output-{kind}", "reclip", export, make_links, model=True)


def environments() -> Iterator[Case]:
    values = {
        "cache-file": {"RECLIP_CACHE": "{case}/precious/letter.txt"},
        "cache-proc": {"RECLIP_CACHE": "/proc/cache"},
        "cache-null": {"RECLIP_CACHE": "/dev/null"},
        "cache-long": {"RECLIP_CACHE": "/" + "x" * 5000},
        "tmp-missing": {"TMPDIR": "{case}/nothing"},
        "home-missing": {"HOME": "{case}/nothing"},
        "no-home": {"HOME": None, "RECLIP_CACHE": None, "XDG_CACHE_HOME": None},
        "datasets-tilde": {"DETECTRON2_DATASETS": "~/nothing"},
        "datasets-long": {"DETECTRON2_DATASETS": "x" * 5000},
        "columns": {"COLUMNS": "-5", "LINES": "x"},
        "language": {"LANG": "xx_YY", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        "term": {"TERM": "", "NO_COLOR": "1"},
        "tqdm": {"TQDM_MININTERVAL": "x"},
        "threads": {"OMP_NUM_THREADS": "-1"},
        "seed": {"PL_GLOBAL_SEED": "x", "PYTHONHASHSEED": "x"},
        "matplotlib": {"MPLBACKEND": "module://nothing"},
        "hub": {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": "/proc/x"},
        "proxy": {"HTTPS_PROXY": "nonsense", "ALL_PROXY": "socks5://127.0.0.1:1"},
    }
    for kind, environment in values.items():
        for name, program, arguments in (("segment", "reclip", FAST), ("train", "train_net.py", TRAIN),
                                         ("demo", "demo/demo.py", (*DEMO, *DEMO_KEYS))):  # fmt: skip
            yield Case(f"{name}-environment-{kind}", program, arguments, environment=environment, either=True,
                       telling=name == "segment" and kind == "cache-file")  # fmt: skip
