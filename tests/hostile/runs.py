"""Cases of run folders, hypothesis files and recorded state that were damaged or tampered with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.cli.conftest import segment_arguments
from tests.hostile import inputs
from tests.hostile.driver import CANARY, Case
from tests.hostile.images_and_classes import PREDICT, TRAIN
from tests.hostile.inputs import Writer, content

RESUME = tuple(map(str, segment_arguments()))
FAST_AGAIN = tuple(map(str, segment_arguments("--fast")))
OVERWRITE = tuple(map(str, segment_arguments("--fast", "--overwrite")))
STATE, IMAGES, HYPOTHESES = "out/reclip.json", "out/run/images.json", "out/run/hypotheses.jsonl"
SURVEY, LAST, CONFIG = "out/run/survey.jsonl", "out/run/rectified/last_checkpoint", "out/run/rectified/config.yaml"


def state(change: Callable[[dict], object], name: str = STATE) -> Callable[[Path], None]:
    """A JSON file of the run, with a change."""

    def prepare(case: Path) -> None:
        value = json.loads((case / name).read_text())
        change(value)
        (case / name).write_text(json.dumps(value))

    return prepare


def lines(change: Callable[[list[str]], list[str]], name: str = HYPOTHESES) -> Callable[[Path], None]:
    """A file of lines, with a change."""

    def prepare(case: Path) -> None:
        (case / name).write_text("\n".join(change((case / name).read_text().splitlines())) + "\n")

    return prepare


def written(name: str, write: Writer) -> Callable[[Path], None]:
    """A file of the run is another."""
    return inputs.replace(name, write)


def entries(*names: str) -> Callable[[Path], None]:
    """The run claims that these are files of its results."""

    def change(value: dict) -> None:
        value["entries"] = [*value["entries"], *names]

    def prepare(case: Path) -> None:
        state(change)(case)
        text = (case / STATE).read_text()
        (case / STATE).write_text(text.replace("{case}", str(case)))

    return prepare


def second(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """The second line of the hypothesis file, with a change."""

    def edit(text: list[str]) -> list[str]:
        value = json.loads(text[1])
        change(value)
        return [text[0], json.dumps(value), *text[2:]]

    return lines(edit)


def scores(change: Callable[[list], object]) -> Callable[[Path], None]:
    """The second line with another list of what the hypothesis is decided from."""
    return second(lambda value: value.update(scores=change(value["scores"])))


def first(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """The head of the hypothesis file, with a change."""

    def edit(text: list[str]) -> list[str]:
        value = json.loads(text[0])
        change(value)
        return [json.dumps(value), *text[1:]]

    return lines(edit)


_DEEP = content("[" * 100_000 + "]" * 100_000)
# Of reclip.json: none of them can be gone on with.
STATES: dict[str, Callable[[Path], None]] = {
    "empty": written(STATE, content("")),
    "text": written(STATE, content("hello")),
    "list": written(STATE, content("[]")),
    "null": written(STATE, content("null")),
    "number": written(STATE, content("5")),
    "deep": written(STATE, _DEEP),
    "not-utf-8": written(STATE, content(b'{"format": "\xff"}')),
    "pickle": written(STATE, content(inputs.PICKLE)),
    "fifo": written(STATE, inputs.fifo),
    "device": written(STATE, inputs.link("/dev/zero")),
    "folder": written(STATE, inputs.folder),
    "loop": written(STATE, inputs.link("reclip.json")),
    "cut": lambda case: (case / STATE).write_text((case / STATE).read_text()[:200]),
    "format": state(lambda value: value.update(format="reclip_d2 run 99")),
    "no-format": state(lambda value: value.pop("format")),
    "no-classes": state(lambda value: value.pop("classes")),
    "classes-text": state(lambda value: value.update(classes="sky")),
    "classes-numbers": state(lambda value: value["classes"].update(classes=[[1], [2]])),
    "classes-empty": state(lambda value: value["classes"].update(classes=[])),
    "clip-number": state(lambda value: value.update(clip=5)),
    "clip-list": state(lambda value: value.update(clip=["a"])),
    "settings-list": state(lambda value: value.update(settings=[1])),
    "settings-deep": state(lambda value: value.update(settings={"rectified": {"SEED": {"a": 1}}})),
    "entries-text": state(lambda value: value.update(entries="masks")),
    "entries-numbers": state(lambda value: value.update(entries=[5])),
    "unknown": state(lambda value: value.update(__class__="x", nothing=5)),
    "results-number": state(lambda value: value.update(results=5)),
    "results-path": state(lambda value: value.update(results={"model": "../../precious", "background": "ignore"})),
    "nan": lambda case: (case / STATE).write_text((case / STATE).read_text().replace('"openai"', "NaN", 1)),
}
_OUTSIDE = {
    "dots": ("../precious",), "dots-file": ("../precious/letter.txt",), "absolute": ("{case}/precious",),
    "inside-dots": ("masks/../../precious",), "empty": ("",), "here": (".",), "slash": ("/",),
    "zeros": ("a\0b",), "long": ("x" * 5000,), "home": ("~",), "link": ("aside",),
}  # fmt: skip
# Of the hypothesis file.
HYPOTHESIS: dict[str, Callable[[Path], None]] = {
    "empty": written(HYPOTHESES, content("")),
    "text": written(HYPOTHESES, content("hello\n")),
    "pickle": written(HYPOTHESES, content(inputs.PICKLE)),
    "deep": written(HYPOTHESES, _DEEP),
    "fifo": written(HYPOTHESES, inputs.fifo),
    "device": written(HYPOTHESES, inputs.link("/dev/zero")),
    "folder": written(HYPOTHESES, inputs.folder),
    "no-lines": lines(lambda text: text[:1]),
    "missing-line": lines(lambda text: text[:-1]),
    "cut": lines(lambda text: [*text[:-1], text[-1][:20]]),
    "twice": lines(lambda text: [*text, text[-1]]),
    "two": lines(lambda text: [*text, text[-1].replace("0", "1")]),
    "blank": lines(lambda text: [text[0], "", *text[1:]]),
    "no-head": lines(lambda text: text[1:]),
    "format": first(lambda value: value.update(format="reclip_d2 hypothesis 99")),
    "head-list": lines(lambda text: ["[]", *text[1:]]),
    "head-classes": first(lambda value: value.update(class_names=5)),
    "head-ratio": first(lambda value: value.update(window_ratio="x")),
    "head-method": first(lambda value: value.update(method="__import__")),
    "class-negative": scores(lambda values: [-2] * len(values)),
    "class-large": scores(lambda values: [99] * len(values)),
    "class-huge": scores(lambda values: [10**30] * len(values)),
    "class-text": scores(lambda values: "sky"),
    "class-fraction": scores(lambda values: [1.5] * len(values)),
    "class-true": scores(lambda values: [True] * len(values)),
    "windows": scores(lambda values: [0]),
    "no-windows": scores(lambda values: []),
    "size": second(lambda value: value.update(size=[0, 0])),
    "size-huge": second(lambda value: value.update(size=[10**9, 10**9])),
    "size-text": second(lambda value: value.update(size="x")),
    "no-size": second(lambda value: value.pop("size")),
    "id-number": second(lambda value: value.update(image_id=5)),
    "id-path": second(lambda value: value.update(image_id="../../precious/letter.txt")),
    "line-list": lines(lambda text: [text[0], "[]", *text[2:]]),
    "line-null": lines(lambda text: [text[0], "null", *text[2:]]),
    "not-utf-8": written(HYPOTHESES, content(b'{"format": "\xff"}\n')),
}
# Caches and pointers for resuming: made again, or rejected.
OTHER: dict[str, Callable[[Path], None]] = {
    "images-empty": written(IMAGES, content("")),
    "images-list": written(IMAGES, content("[]")),
    "images-deep": written(IMAGES, _DEEP),
    "images-numbers": state(lambda value: value.update(signatures={"0": 5}), IMAGES),
    "images-fifo": written(IMAGES, inputs.fifo),
    "survey-text": written(SURVEY, content("hello\n[]\nnull\n")),
    "survey-deep": written(SURVEY, _DEEP),
    "survey-fifo": written(SURVEY, inputs.fifo),
    "survey-device": written(SURVEY, inputs.link("/dev/zero")),
    "last-not-utf-8": written(LAST, content(b"\xff\xfe")),
    "last-dots": written(LAST, content("../../../precious/letter.txt")),
    "last-absolute": written(LAST, content("/etc/passwd")),
    "last-missing": written(LAST, content("nothing.pth")),
    "last-empty": written(LAST, content("")),
    "last-fifo": written(LAST, inputs.fifo),
    "config-python": written(CONFIG, content(f"a: !!python/object/apply:os.system ['touch {CANARY}']\n")),
    "config-url": written(CONFIG, content("_BASE_: http://127.0.0.1:1/x.yaml\n")),
    "config-empty": written(CONFIG, content("")),
    "masks-file": lambda case: _replaced(case / "out/masks"),
    "masks-link": lambda case: _linked(case / "out/masks", "../precious"),
    "run-link": lambda case: _linked(case / "out/run", "../precious"),
    "mask-link": lambda case: _linked(case / "out/masks/0.png", "../../precious/letter.txt"),
    "mask-damaged": written("out/masks/0.png", content("x")),
    "mask-missing": lambda case: (case / "out/masks/0.png").unlink(),
    "summary-link": lambda case: _linked(case / "out/summary.json", "../precious/letter.txt"),
    "coverage-deep": written("out/masks/.coverage.jsonl", _DEEP),
    "classes-json-text": written("out/masks/classes.json", content("hello")),
    "classes-json-deep": written("out/masks/classes.json", _DEEP),
    "previous-link": lambda case: _linked(case / "out/previous-maskclip-ignore", "../precious"),
}


def _remove(path: Path) -> None:
    if path.is_dir():
        for place, folders, files in os.walk(path, topdown=False):
            for name in files:
                os.unlink(os.path.join(place, name))
            for name in folders:
                os.rmdir(os.path.join(place, name))
        path.rmdir()
    else:
        path.unlink()


def _replaced(path: Path) -> None:
    _remove(path)
    path.write_text("x")


def _linked(path: Path, target: str) -> None:
    _remove(path)
    path.symlink_to(target)


def cases() -> Iterator[Case]:
    """All of this module."""
    yield Case("resume", "reclip", RESUME, resumed=True, fine=True)
    for kind, prepare in STATES.items():
        telling = kind in ("deep", "results-path")
        yield Case(f"resume-state-{kind}", "reclip", RESUME, prepare, resumed=True, words="reclip.json|output|out",
                   telling=telling, either=kind in ("unknown", "results-path"))  # fmt: skip
        predict = (*PREDICT[:3], "out", "--output", "cache/masks", "--device", "cpu")
        yield Case(f"predict-state-{kind}", "reclip", predict, prepare, resumed=True,
                   either=kind.startswith(("entries", "results", "settings")) or kind == "unknown")  # fmt: skip
    for kind, names in _OUTSIDE.items():
        prepare = _with_aside(entries(*names))
        yield Case(f"overwrite-entries-{kind}", "reclip", OVERWRITE, prepare, resumed=True, either=True,
                   telling=kind in ("dots", "absolute"))  # fmt: skip
        yield Case(f"fast-entries-{kind}", "reclip", FAST_AGAIN, prepare, resumed=True, either=True,
                   telling=kind == "dots")  # fmt: skip
    for kind, prepare in HYPOTHESIS.items():
        either = kind in (
            "blank",
            "no-size",
            "size",
            "size-text",
            "size-huge",
            "twice",
        )  # dense hypotheses need no size
        unfinished = _unfinished(prepare)
        yield Case(f"resume-hypotheses-{kind}", "reclip", RESUME, unfinished, resumed=True, either=either,
                   words="hypothes|size|image", telling=kind == "class-large")  # fmt: skip
        if kind in ("text", "pickle", "deep", "fifo", "device", "folder", "format", "head-classes", "not-utf-8"):
            train = (*TRAIN, "HYPOTHESIS.FILE", "hypotheses")
            yield Case(f"train-hypotheses-{kind}", "train_net.py", train, _moved(prepare), resumed=True,
                       words="hypothes")  # fmt: skip
    for kind, prepare in OTHER.items():
        yield Case(f"resume-{kind}", "reclip", RESUME, prepare, resumed=True, either=True,
                   telling=kind in ("masks-link", "last-not-utf-8"))  # fmt: skip
        if kind.startswith("last"):
            train = ("--resume", *TRAIN[:-6], "OUTPUT_DIR", "out/run/rectified", "HYPOTHESIS.WINDOW_RATIO", "0.5")
            yield Case(f"train-resume-{kind}", "train_net.py", train, prepare, resumed=True, either=True)


def _with_aside(prepare: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(case: Path) -> None:
        prepare(case)
        (case / "out" / "aside").symlink_to("../precious")

    return both


def _unfinished(prepare: Callable[[Path], None]) -> Callable[[Path], None]:
    """The training has not begun."""

    def both(case: Path) -> None:
        _remove(case / "out/run/rectified")
        prepare(case)

    return both


def _moved(prepare: Callable[[Path], None]) -> Callable[[Path], None]:
    """The hypothesis file is one of its own."""

    def both(case: Path) -> None:
        prepare(case)
        os.rename(case / HYPOTHESES, case / "hypotheses")

    return both
