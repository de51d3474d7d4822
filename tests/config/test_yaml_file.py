"""YAML of unknown origin is read as plain data of limited size, or quickly rejected with one line."""

import http.server
import json
import os
import threading
import time
import tracemalloc

import pytest
import yaml

from reclip_d2.config import flatten, load_config, read_yaml
from reclip_d2.config.yaml_file import MAX_BYTES, parse_yaml
from reclip_d2.errors import ReclipError
from reclip_d2.experiments.suite_file import load_suite

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name}\n  <<: [{', '.join([f'*{before}'] * 20)}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


def message_of(path, read=None) -> str:
    with pytest.raises(ReclipError) as caught:
        (read or (lambda: load_config(str(path))))()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700 and message.isprintable()
    return message


def file_message(tmp_path, content: str | bytes, name: str = "config.yaml") -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = message_of(path)
    assert str(path) in message
    return message


@pytest.mark.parametrize("bomb", [BOMB, MERGE_BOMB], ids=["lists", "merges"])
def test_an_alias_bomb_is_refused_before_it_is_built(tmp_path, bomb):
    assert len(bomb) < 2000
    tracemalloc.start()
    start = time.monotonic()
    try:
        assert "more than 100,000 values" in file_message(tmp_path, bomb)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 5
    with pytest.raises(ReclipError, match="more than 100,000 values"):
        load_suite(tmp_path / "config.yaml", "paper")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("SEED: &x [*x]", "contains itself"),
        ("MODEL: &x\n  CLIP: *x", "contains itself"),
        ("SEED: [1, *nothing]", "undefined alias"),
        ("SEED: !!set {a, b}", "a set"),
        ("SEED: !!omap [a: 1]", "an ordered map"),
        ("SEED: !!pairs [a: 1]", "a list of pairs"),
        ("SEED: !!binary aGVsbG8=", "binary data"),
        ("OUTPUT_DIR: 2024-01-01", "a date: put it in quotes"),
        ("OUTPUT_DIR: 2001-12-14t21:59:43.10-05:00", "a date"),
        ("OUTPUT_DIR: =", "put it in quotes"),
        ("SEED: !mine 3", "the tag '!mine'"),
        ("SEED: !!python/object/apply:os.getcwd []", "the tag"),
        ("SEED: " + "9" * 5000, "more than 40 digits"),
        ("SEED: 0x" + "f" * 5000, "more than 40 digits"),
        ("SEED: " + ":".join(["59"] * 3000), "more than 40 digits"),
        ("SOLVER: {BASE_LR: " + "1:" * 3000 + "1.5}", "no key accepts"),
        ("SEED: " + "9" * 39, "SEED is 999"),
        ("SEED: '" + "9" * 60 + "'", "SEED is a number of more than 40 digits"),
        ("SEED: '" + "(" * 3000 + "'", "SEED is '(((("),
        ("SEED: '" + "-" * 50_000 + "1'", "SEED is '----"),
        ("SEED: " + "[" * 5000, "nested deeper than 40"),
        ("SEED: " + "{a: " * 5000, "nested deeper than 40"),
        ("- " * 5000 + "x", "nested deeper than 40"),
        ("SEED: " + "[" * 39 + "]" * 39, "SEED is [[[["),
        ("? [a, b]\n: 1", "a key that is not a text"),
        ("? {a: 1}\n: 1", "a key that is not a text"),
        ("SEED: 1\nSEED: 2", "the key 'SEED' occurs twice"),
        ("MODEL:\n  CLIP:\n    NAME: a\n    NAME: b", "line 4: the key 'NAME' occurs twice"),
        ("SEED: 1\n---\nSEED: 2", "single document"),
        (b"SEED: \x00", "null bytes"),
        (b"SEED: \xff", "not UTF-8"),
        ("SEED: .nan", "SEED is nan"),
        ("SOLVER: {BASE_LR: .inf}", "SOLVER.BASE_LR is inf"),
        ("SOLVER: 3", "SOLVER is 3; it has keys"),
        ("SEED: {a: 1}", "there is no key SEED.a"),
        ("SEED: {}", "SEED is {}"),
        ("null: 1", "has no keys"),
        ("x" * MAX_BYTES + "y", "more than the 512 KiB allowed"),
    ],
)
def test_content_that_is_refused(tmp_path, content, expected):
    assert expected in file_message(tmp_path, content)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("''", "it must be a file"),
        ("' '", "it must be a file"),
        ("3", "it must be a file"),
        ("{a: 1}", "it must be a file"),
        ("[1]", "it must be a file"),
        ("[[x.yaml]]", "it must be a file"),
        ("~", "it must be a file"),
        (".", "not a regular file"),
        ("/", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("pipe", "not a regular file"),
        ("loop", "loop of symbolic links"),
        ("none.yaml", "does not exist"),
        ("config.yaml", "form a cycle"),
        ("./sub/../config.yaml", "form a cycle"),
        ("circle.yaml", "form a cycle"),
        ("many0.yaml", "more than 64 files"),
        ("http://localhost:1/x.yaml", "is a URL"),
        ("https://localhost/x.yaml", "is a URL"),
        ("s3://bucket/x.yaml", "is a URL"),
        ("detectron2://x.yaml", "is a URL"),
        ("x" * 5000, "it must be a file"),
        ("x" * 300, "cannot be read"),
    ],
)
def test_bases_that_are_refused(tmp_path, base, expected):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sub").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "circle.yaml").write_text("_BASE_: config.yaml\nSEED: 1")
    for number in range(7):
        (tmp_path / f"many{number}.yaml").write_text(f"_BASE_: [many{number + 1}.yaml, many{number + 1}.yaml]\n")
    (tmp_path / "many7.yaml").write_text("SEED: 1")
    path = tmp_path / "config.yaml"
    path.write_text(f"_BASE_: {base}\nSEED: 2")
    message = message_of(path)
    assert expected in message and "_BASE_" in message


def test_an_address_is_never_asked(tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/base.yaml"
        file_message(tmp_path, f"_BASE_: {address}")
        message_of(address)
        server.shutdown()
    assert asked == []


def test_a_config_of_unknown_origin_has_no_base(tmp_path):
    (tmp_path / "base.yaml").write_text("SEED: 1")
    path = tmp_path / "config.yaml"
    path.write_text("_BASE_: base.yaml")
    assert load_config(str(path)).SEED == 1
    assert "_BASE_" in message_of(path, lambda: load_config(str(path), bases=False))


def test_bases_in_a_diamond_are_no_circle(tmp_path):
    (tmp_path / "root.yaml").write_text("SEED: 1\nVIS_PERIOD: 1\nSOLVER: {MAX_ITER: 5, BASE_LR: 0.5}")
    (tmp_path / "left.yaml").write_text("_BASE_: root.yaml\nSEED: 2\nSOLVER: {MAX_ITER: 6}")
    (tmp_path / "right.yaml").write_text("_BASE_: root.yaml\nVIS_PERIOD: 3")
    (tmp_path / "top.yaml").write_text("_BASE_: [left.yaml, right.yaml]\nOUTPUT_DIR: x")
    cfg = load_config(str(tmp_path / "top.yaml"))
    assert (cfg.SEED, cfg.VIS_PERIOD, cfg.OUTPUT_DIR) == (1, 3, "x")  # the last base wins, including its own bases
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (5, 0.5)


def test_plain_yaml_is_what_pyyaml_reads(tmp_path):
    text = "a: &x [1, 2.5, true, ~, 'x', \"y\", 1e-3, 1_000]\nb: *x\nc: &y {d: 1}\n"
    text += "e:\n  <<: *y\n  f: |\n    two\n    lines\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    for content in ("", "# nothing", "3", "[]", "{}"):
        path = tmp_path / "file.yaml"
        path.write_text(content)
        assert read_yaml(path, "file") == yaml.safe_load(content)


def test_a_config_that_was_written_is_read_again(tmp_path):
    cfg = load_config("", ["SEED", "3", "MODEL.CLIP.CLASS_TOKEN", "häuser \udcff.safetensors"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_config(str(tmp_path / "config.yaml"))
    assert "&id001" in cfg.dump() and json.dumps(flatten(again)) == json.dumps(flatten(cfg))


# ---- keys that are wrong by a letter --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("SOLVER.BASE_RL", "SOLVER.BASE_LR"),
        ("BASE_LR", "SOLVER.BASE_LR"),
        ("solver.base_lr", "SOLVER.BASE_LR"),
        ("MODEL.CLIP.NAM", "MODEL.CLIP.NAME"),
        ("HYPOTHESIS.TRESHOLD", "HYPOTHESIS.THRESHOLD"),
        ("OUTPUT_DIRECTORY", "OUTPUT_DIR"),
        ("MODEL.GUMBEL.TAU.X", "MODEL.GUMBEL.TAU"),
    ],
)
def test_the_nearest_key_is_named(tmp_path, key, meant):
    message = message_of(None, lambda: load_config("", [key, "1"]))
    assert f"there is no key {key}; did you mean {meant}?" in message
    tree: object = 1
    for part in reversed(key.split(".")):
        tree = {part: tree}
    assert f"did you mean {meant}?" in file_message(tmp_path, yaml.safe_dump(tree))


@pytest.mark.parametrize("key", ["", ".", "\n", "x" * 5000, "\x1b[31m", "MODEL..NAME", "qqqqqqqq"])
def test_keys_that_are_near_to_none(key):
    assert "there is no key" in message_of(None, lambda: load_config("", [key, "1"]))
