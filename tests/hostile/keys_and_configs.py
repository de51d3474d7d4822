"""Cases of keys, values, YAML files and options of the command line."""

from __future__ import annotations

from collections.abc import Iterator

from tests.hostile import inputs
from tests.hostile.driver import CANARY, Case
from tests.hostile.images_and_classes import (
    CUSTOM,
    DEMO,
    DEMO_KEYS,
    FAST,
    MASKCLIP,
    RECTIFY,
    SEGMENT,
    TRAIN,
    TRAIN_KEYS,
    changed,
)
from tests.hostile.inputs import content, replace

# Key: wrong values, as they are typed.
WRONG_VALUES: dict[str, tuple[str, ...]] = {
    "SOLVER.BASE_LR": ("nan", "inf", "-0.1", "None", "'x'", "[0.1]"),
    "SOLVER.MAX_ITER": ("0", "-5", "1.5", "None", "10**3", "1" + "0" * 30),
    "SOLVER.IMS_PER_BATCH": ("0", "-1", "2.5", "None"),
    "SOLVER.CHECKPOINT_PERIOD": ("0", "-1", "'often'"),
    "SOLVER.WEIGHT_DECAY": ("nan", "-1"),
    "SOLVER.MOMENTUM": ("nan", "1.5", "-0.1"),
    "SOLVER.GAMMA": ("nan",),
    "SOLVER.WARMUP_ITERS": ("-1", "None"),
    "SOLVER.WARMUP_FACTOR": ("nan", "-1"),
    "SOLVER.STEPS": ("5", "('a',)", "(-1,)"),
    "SOLVER.LR_SCHEDULER_NAME": ("Nothing", "''", "os.system"),
    "SOLVER.ACCUMULATE_STEPS": ("0", "-2"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ("nan", "-1"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("half", "''"),
    "INPUT.CROP.SIZE": ("[0, 0]", "[-8, 8]", "[8]", "[8, 8, 8]", "None", "'x'", "[1.5, 2.5]"),
    "INPUT.CROP.ENABLED": ("2", "'maybe'"),
    "INPUT.MIN_SIZE_TRAIN": ("()", "(0,)", "('a',)", "(-5,)"),
    "INPUT.MIN_SIZE_TEST": ("-1", "nan", "'x'"),
    "INPUT.MAX_SIZE_TEST": ("-1", "0"),
    "INPUT.FORMAT": ("BGRA", "''", "5"),
    "INPUT.RANDOM_FLIP": ("sideways", "5"),
    "INPUT.TILES.SIZE": ("0", "-1", "1", "1.5"),
    "INPUT.TILES.OVERLAP": ("1", "-0.5", "nan"),
    "INPUT.TILES.FROM_SIDE": ("0", "-1"),
    "DATALOADER.NUM_WORKERS": ("-1", "1.5", "100000"),
    "MODEL.PIXEL_MEAN": ("[]", "[1]", "[nan, 1, 1]", "'x'", "[1, 2, 3, 4]"),
    "MODEL.PIXEL_STD": ("[0, 0, 0]", "[-1, 1, 1]", "[nan, 1, 1]", "None"),
    "MODEL.DEVICE": ("meta", "mps", "xla", "''", "cuda:99", "cpu:x", "None", "5"),
    "MODEL.META_ARCHITECTURE": ("Nothing", "''", "None", "GeneralizedRCNN"),
    "MODEL.CLIP.NAME": ("ViT-Nothing", "''", "../../etc/passwd", "a\nb", "hf-hub:evil/model"),
    "MODEL.CLIP.PRETRAINED": ("''", "nothing.pt", "precious/letter.txt", "precious"),
    "MODEL.CLIP.TEMPLATES": ("nothing", "''", "5"),
    "MODEL.BIAS_HEAD.NAME": ("Nothing", "''"),
    "MODEL.BIAS_HEAD.RECTIFICATION": ("sideways", "''"),
    "MODEL.BIAS_HEAD.PROMPT_LENGTH": ("-1", "10000", "1.5"),
    "MODEL.MASK_DECODER.NAME": ("Nothing",),
    "MODEL.KERNELS": ("'x'", "2"),
    "MODEL.WEIGHTS": ("nothing.pth", "precious", "https://example.com/x.pth", "detectron2://x"),
    "SEED": ("4294967296", "-2", "1.5", "nan"),
    "OUTPUT_DIR": ("5", "None", "['a']"),
    "VIS_PERIOD": ("-1", "'x'"),
    "CUDNN_BENCHMARK": ("2", "'x'"),
    "DATASETS.TRAIN": ("('nothing',)", "()", "'x'", "(5,)"),
    "DATASETS.TEST": ("('nothing',)", "5"),
    "DATASETS.CUSTOM.IMAGES": ("''", "nothing", "5", "None"),
    "DATASETS.CUSTOM.CLASSES": ("''", "nothing", "5", "precious"),
    "HYPOTHESIS.WINDOW_RATIO": ("0", "-1", "nan", "1.5", "0.001", "'x'"),
    "HYPOTHESIS.THRESHOLD": ("nan", "'x'"),
    "HYPOTHESIS.METHOD": ("nothing", "''"),
    "HYPOTHESIS.BATCH_SIZE": ("-1", "1.5"),
    "HYPOTHESIS.FILE": ("precious", "precious/letter.txt/x", "s3://bucket/x", "precious/letter.txt"),
    "TEST.EVAL_PERIOD": ("-1", "'x'"),
    "TEST.BAND_MEMORY": ("0", "-1", "nan"),
    "NOTHING": ("1",),
    "MODEL.NOTHING": ("1",),
    "MODEL": ("1",),
    "": ("1",),
    "MODEL..DEVICE": ("cpu",),
    "__class__": ("1",),
    "SOLVER.__class__.__init__": ("1",),
    "VERSION": ("99",),
}
# Read by other programs, or only with other keys: a value that is wrong there may pass here.
_MAY_PASS = {("DATALOADER.NUM_WORKERS", "100000"), ("INPUT.MAX_SIZE_TEST", "0"), ("SOLVER.MAX_ITER", "10**3"),
             ("HYPOTHESIS.THRESHOLD", "nan"), ("VERSION", "99"), ("INPUT.CROP.ENABLED", "2"),
             ("HYPOTHESIS.WINDOW_RATIO", "1.5"), ("INPUT.MIN_SIZE_TRAIN", "(0,)"),
             ("MODEL.DEVICE", "cuda:99")}  # fmt: skip
_TELLING = {("SOLVER.BASE_LR", "nan"), ("SOLVER.MAX_ITER", "0"), ("INPUT.CROP.SIZE", "[0, 0]"), ("SEED", "4294967296"),
            ("MODEL.DEVICE", "meta"), ("MODEL.PIXEL_STD", "[0, 0, 0]"),
            ("HYPOTHESIS.WINDOW_RATIO", "0.001"),
            ("HYPOTHESIS.FILE", "s3://bucket/x")}  # fmt: skip

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
BAD_YAML: dict[str, inputs.Writer] = {
    "empty-base": content("_BASE_: ''\n"),
    "base-itself": content("_BASE_: config.yaml\n"),
    "base-loop": content("_BASE_: precious/../config.yaml\n"),
    "base-folder": content("_BASE_: precious\n"),
    "base-url": content("_BASE_: http://127.0.0.1:1/x.yaml\n"),
    "base-https": content("_BASE_: https://example.com/x.yaml\n"),
    "base-missing": content("_BASE_: nothing.yaml\n"),
    "base-list": content("_BASE_: [5]\n"),
    "base-device": content("_BASE_: /dev/zero\n"),
    "bomb": content(_BOMB),
    "python": content(f"SEED: !!python/object/apply:os.system ['touch {CANARY}']\n"),
    "python-name": content("SEED: !!python/name:os.system\n"),
    "python-new": content(f"a: !!python/object/new:subprocess.Popen [['touch', '{CANARY}']]\n"),
    "eval": content(f'_BASE_: \'__import__("os").system("touch {CANARY}")\'\n'),
    "set": content("SEED: !!set {1, 2}\n"),
    "date": content("OUTPUT_DIR: 2020-01-01\n"),
    "binary": content("OUTPUT_DIR: !!binary aGVsbG8=\n"),
    "huge-number": content("SEED: " + "9" * 6000 + "\n"),
    "itself": content("MODEL: &a {CLIP: *a}\n"),
    "deep": content("SEED: " + "[" * 5000 + "]" * 5000 + "\n"),
    "deep-map": content("MODEL: " + "{a: " * 500 + "1" + "}" * 500 + "\n"),
    "two-documents": content("SEED: 1\n---\nSEED: 2\n"),
    "list": content("- SEED\n"),
    "text": content("hello\n"),
    "number": content("5\n"),
    "twice": content("SEED: 1\nSEED: 2\nMODEL: 5\n"),
    "tabs": content("MODEL:\n\tDEVICE: cpu\n"),
    "not-utf-8": content(b"OUTPUT_DIR: \xff\xfe\n"),
    "zeros": content(b"SEED: 1\0\n"),
    "pickle": content(inputs.PICKLE),
    "large": content("a: " + "x" * 3_000_000),
    "unknown-key": content("MODLE: {DEVICE: cpu}\n"),
    "number-key": content("5: 5\n"),
    "null-section": content("MODEL: null\n"),
    "json": content('{"SEED": "x"}'),
    "fifo": inputs.fifo,
    "device": inputs.link("/dev/zero"),
    "folder": inputs.folder,
    "loop": inputs.link("config.yaml"),
    "missing": inputs.link("nothing"),
    "html": content(inputs.HTML),
}
_TELLING_YAML = {"base-itself", "base-url", "bomb", "python", "python-new", "deep", "fifo", "huge-number"}


def cases() -> Iterator[Case]:
    """All of this module."""
    for key, values in WRONG_VALUES.items():
        for value in values:
            either = (key, value) in _MAY_PASS
            # The last of two values of a key counts.
            words = "nothing|class file|DATASETS" if key.startswith("DATASETS") else key.rpartition(".")[2]
            words = "(https|detectron2)://|WEIGHTS" if key == "MODEL.WEIGHTS" and "://" in value else words
            yield Case(f"train-key-{key}={value!r}", "train_net.py", (*TRAIN, key, value), either=either, words=words,
                       telling=(key, value) in _TELLING)  # fmt: skip
    for key in ("SOLVER.BASE_LR", "INPUT.TILES.SIZE", "MODEL.PIXEL_STD", "INPUT.MIN_SIZE_TEST", "TEST.BAND_MEMORY",
                "INPUT.FORMAT", "SEED", "NOTHING", "MODEL.CLIP.TEMPLATES"):  # fmt: skip
        value = WRONG_VALUES[key][0]
        yield Case(f"segment-key-{key}", "reclip", (*FAST, key, value), words=f"{key.rpartition('.')[2]}|--tile")
        yield Case(f"demo-key-{key}", "demo/demo.py", (*DEMO, *DEMO_KEYS, key, value), words=key.rpartition(".")[2])
    for count, opts in enumerate((("SEED",), ("SEED", "1", "MODEL.DEVICE"), ("=",))):
        yield Case(f"train-odd-keys-{count}", "train_net.py", (*TRAIN, *opts))
        yield Case(f"segment-odd-keys-{count}", "reclip", (*FAST, *opts))
    yield from configs()
    yield from options()


def configs() -> Iterator[Case]:
    train = changed(TRAIN, RECTIFY, "config.yaml")
    for kind, write in BAD_YAML.items():
        prepare = replace("config.yaml", write)
        yield Case(f"train-yaml-{kind}", "train_net.py", train, prepare, words="(?i)yaml|_BASE_|SEED|OUTPUT_DIR|MODEL",
                   telling=kind in _TELLING_YAML)  # fmt: skip
    demo = changed(DEMO, MASKCLIP, "config.yaml")
    for kind in ("python", "bomb", "base-url", "fifo", "deep", "list"):
        prepare = replace("config.yaml", BAD_YAML[kind])
        yield Case(f"demo-yaml-{kind}", "demo/demo.py", (*demo, *DEMO_KEYS), prepare)
        for tool in ("make_hypotheses", "linear_probe"):
            arguments = ("--config-file", "config.yaml", *TRAIN_KEYS)
            yield Case(f"{tool}-yaml-{kind}", f"tools/{tool}.py", arguments, prepare)
        arguments = ("--config-file", "config.yaml", "--output-dir", "out", "--opts", *CUSTOM)
        yield Case(f"analyze-yaml-{kind}", "tools/analyze_bias.py", arguments, prepare)
        arguments = ("export", "--config-file", "config.yaml", "--format", "torchscript", "--output", "out")
        yield Case(f"export-yaml-{kind}", "reclip", arguments, prepare)
    for kind, path in (
        ("missing", "nothing.yaml"),
        ("empty", ""),
        ("url", "http://127.0.0.1:1/x.yaml"),
        ("long", "x" * 5000),
    ):
        arguments = ("--config-file", path, *TRAIN_KEYS)
        yield Case(f"train-config-{kind}", "train_net.py", arguments, words="config|yaml|MaskCLIP|META|DATASETS")


def options() -> Iterator[Case]:
    number = {"zero": "0", "negative": "-3", "text": "x", "fraction": "1.5", "huge": "9" * 40, "empty": ""}
    for option in ("--iterations", "--tile"):
        for kind, value in number.items():
            yield Case(f"segment{option}-{kind}", "reclip", (*SEGMENT, option, value), words=option.lstrip("-"))
    for kind, value in number.items():
        yield Case(f"segment--workers-{kind}", "reclip", (*SEGMENT, "--workers", value), words="workers")
    parts = {**number, "beyond": "3/2", "first": "0/2", "many": "1/" + "9" * 40, "zeros": "1/2\0"}
    for kind, value in parts.items():
        yield Case(f"segment--shard-{kind}", "reclip", (*SEGMENT, "--shard", value), words="shard",
                   telling=kind == "beyond")  # fmt: skip
    yield Case("segment--tile-one", "reclip", (*SEGMENT, "--fast", "--tile", "1"), telling=True, words="(?i)tile")
    for kind, value in {"zero-machines": "0", "negative": "-3", "many": "99", "text": "x", "huge": "9" * 40}.items():
        yield Case(f"train--num-gpus-{kind}", "train_net.py", ("--num-gpus", value, *TRAIN), telling=kind == "negative",
                   fine=kind == "zero-machines")  # fmt: skip
    two = ("--num-machines", "2", "--dist-url", "tcp://127.0.0.1:9", *TRAIN)
    yield Case("train--num-machines", "train_net.py", two, telling=True)
    for kind, value in {"zero": "0", "negative": "-1", "text": "x"}.items():
        yield Case(f"train--num-machines-{kind}", "train_net.py", ("--num-machines", value, *TRAIN))
    yield Case("train--machine-rank", "train_net.py", ("--machine-rank", "5", *TRAIN))
    yield Case("train--dist-url", "train_net.py", ("--num-machines", "2", "--dist-url", "nonsense", *TRAIN))
    yield Case("train--resume-eval", "train_net.py", ("--resume", "--eval-only", *TRAIN))
    for kind, value in {
        "meta": "meta",
        "mps": "mps",
        "empty": "",
        "cuda": "cuda:7",
        "text": "gpu",
        "zeros": "cpu\n",
    }.items():
        yield Case(f"segment--device-{kind}", "reclip", (*FAST[:-5], "--device", value), words="device",
                   telling=kind == "mps")  # fmt: skip
    for kind, value in {"unknown": "jpeg2000", "empty-and-unknown": ",,x", "path": "../x"}.items():
        yield Case(f"segment--formats-{kind}", "reclip", (*FAST[:-5], "--formats", value), words="format")
    for kind, value in {"unknown": "ViT-Nothing", "empty": "", "path": "../../x", "hub": "hf-hub:evil/model"}.items():
        arguments = changed(FAST, "reclip-embedded", value)
        yield Case(f"segment--clip-{kind}", "reclip", arguments, words="(?i)clip")
    for kind, arguments in {
        "nothing": (), "unknown": ("nothing",), "segment-nothing": ("segment",), "option": ("--nothing",),
        "both": (*SEGMENT, "--fast", "--student"), "zeros": ("segment", ""), "export-nothing": ("export",),
        "predict-nothing": ("predict", "photos"), "two-clips": (*SEGMENT, "--student-iterations", "x"),
        "app-port": ("app", "--clip", "reclip-embedded", "--port", "0"),
        "app-port-large": ("app", "--clip", "reclip-embedded", "--port", "99999"),
        "app-host": ("app", "--clip", "reclip-embedded", "--host", "nothing.invalid"),
        "app-model": ("app", "--model", "precious"), "app-model-clip": ("app", "--model", "x", "--clip", "y"),
        "app-megapixels": ("app", "--clip", "reclip-embedded", "--max-megapixels", "0"),
        "app-megabytes": ("app", "--clip", "reclip-embedded", "--max-megabytes", "-1"),
        "app-output": ("app", "--clip", "reclip-embedded", "--output", "precious/letter.txt", "--port", "7999"),
        "app-output-proc": ("app", "--clip", "reclip-embedded", "--output", "/proc/x", "--port", "7998"),
        "app-clip": ("app", "--clip", "ViT-Nothing"), "doctor-clip": ("doctor", "--clip", "ViT-Nothing"),
        "doctor-option": ("doctor", "--nothing"), "doctor-pretrained": ("doctor", "--pretrained", "nothing/x.pt"),
    }.items():  # fmt: skip
        program_fault = kind.startswith("doctor-") and kind != "doctor-option"
        yield Case(f"reclip-{kind}", "reclip", arguments, telling=kind in ("nothing", "both"),
                   either=program_fault)  # fmt: skip
