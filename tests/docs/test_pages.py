"""Names in README and the pages exist: files, Python names, keys and commands; and every equation has its code."""

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from reclip_d2.cli.main import build_parser
from reclip_d2.config.keys import add_reclip_config
from tools.docs_site import PAGES

ROOT = Path(__file__).parents[2]
PAGE_FILES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / path for path in PAGES.values() if path.endswith(".md"))])
TOP_LEVEL = ("reclip_d2", "configs", "csrc", "datasets", "demo", "docs", "tests", "tools")
# Written by programs: not in the repository.
MADE = ("datasets/embedded", "docs/images/results_")


def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":  # of the tables "before, now" only the right column exists
        text = re.sub(r"^\|.*\|([^|]*)\|$", r"\1", text, flags=re.MULTILINE)
    if page.name == "how_to_add.md":  # its blocks add files, names and keys: test_how_to_add.py runs them
        text = re.sub(r"^ *```\w+ title=.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"MODEL.LOSS.ENTROPY_WEIGHT|MODEL.CLIP.LOCAL_MEAN_SIZE", "", text)
    return text


def resolve(dotted: str) -> object:
    """The module, class, function or attribute of a dotted name.

    Raises:
        AttributeError: there is none.
    """
    parts = dotted.split(".")
    value, rest = importlib.import_module(parts[0]), parts[1:]
    while rest:  # modules as far as they go: a package may export a function of the same name as its module
        try:
            value = importlib.import_module(f"{value.__name__}.{rest[0]}")
        except ModuleNotFoundError:
            break
        rest = rest[1:]
    return functools.reduce(getattr, rest, value)


def shell_paths(text: str) -> str:
    """``text`` with ``$data`` and ``$methods`` as the last commands of its page that set them say."""
    for name, value in re.findall(r"(?<!\S)(data|methods)=(\S+)", text):
        text = text.replace(f"${name}", value)
    return text


def expand(path: str) -> list[str]:
    """A path with ``{a,b}`` as the paths that it stands for."""
    group = re.search(r"\{([^{}]*)\}", path)
    if not group:
        return [path]
    return [p for part in group[1].split(",") for p in expand(path[: group.start()] + part + path[group.end() :])]


@pytest.mark.parametrize("page", PAGE_FILES, ids=lambda page: page.name)
def test_every_path_named_exists(page):
    pattern = rf"(?<![\w/.$~<-])(?:{'|'.join(TOP_LEVEL)})/[\w./*{{}},-]+"
    for match in re.finditer(pattern, shell_paths(text_of(page))):
        paths = [path for paths in expand(match[0].rstrip(".,")) for path in paths.split(",")]
        for path in paths:
            if not path.startswith(MADE):
                assert any(ROOT.glob(path)), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGE_FILES, ids=lambda page: page.name)
def test_every_python_name_resolves(page):
    for dotted in set(re.findall(r"(?<![\w./@-])reclip_d2(?:\.[A-Za-z_]\w*)+(?![\w/]|\.\w)", text_of(page))):
        if not dotted.endswith((".py", ".git")):
            resolve(dotted)


@pytest.mark.parametrize("page", PAGE_FILES, ids=lambda page: page.name)
def test_every_key_named_is_a_key(page):
    cfg = get_cfg()
    add_reclip_config(cfg)
    nodes = "MODEL|HYPOTHESIS|SOLVER|TEST|INPUT|DATASETS|DATALOADER|LINEAR_PROBE"
    for match in re.finditer(rf"(?<![\w./`-])`?((?:{nodes})(?:\.[A-Z0-9_{{}},]+)+)", text_of(page)):
        for key in expand(match[1].rstrip(",.")):
            node = cfg
            for part in key.split("."):
                assert part in node, f"{page.name} names the key {key}"
                node = node[part]


def _commands():
    for page in PAGE_FILES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            if language not in ("", "bash", "sh"):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["reclip"] and "COMMAND" not in words:
                    yield pytest.param(words[1:], id=f"{page.name}: {shlex.join(words)}")


@pytest.mark.parametrize("words", list(_commands()))
def test_the_commands_of_reclip_are_understood(words):
    assert build_parser().parse_args(words).command == words[0]


def _table_of_equations() -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows of the table in docs/method.md: the left cell, and (name, file) of each link in the right one."""
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8").partition("## Where each equation is")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, flags=re.MULTILINE)[1:]
    return [(left, re.findall(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)\)", right)) for left, right in rows]


@pytest.mark.parametrize(("row", "links"), _table_of_equations(), ids=lambda value: str(value)[:40])
def test_every_entry_of_the_table_of_equations_is_defined_where_it_says(row, links):
    assert links
    for name, path in links:
        module = path.removesuffix(".py").replace("/", ".")
        assert getattr(importlib.import_module(module), name).__module__ == module


def test_every_equation_is_in_the_table():
    left = " ".join(row for row, _ in _table_of_equations())
    assert [number for number in range(1, 11) if f"Eq. ({number})" not in left] == []


def test_the_folders_of_the_architecture_page_are_in_the_linters_order():
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("layers = [")[2].partition("]")[0]
    layers = [set(re.findall(r"\w+", line)) for line in re.findall(r'"([^"]+)"', contract)][::-1]
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("## Folders")[2]
    rows = [set(re.findall(r"`(\w+)(?:\.py)?`", cell)) for cell in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)]
    folders = {path.name for path in (ROOT / "reclip_d2").iterdir() if (path / "__init__.py").is_file()} | {"errors"}
    expected = [layer & folders - {"install_detectron2"} for layer in layers]
    assert [layer for layer in expected if layer] == rows


def test_the_readme_can_be_read_to_the_end():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
