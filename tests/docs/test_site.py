"""The site of mkdocs.yml: it builds strictly, loads nothing from other hosts, and its links to code are correct."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from mkdocs.exceptions import PluginError

from tools import docs_site

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. ``--strict`` makes warnings errors: broken links and anchors, pages outside the navigation."""
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


class _Loaded(HTMLParser):
    """Addresses that a browser fetches to show a page; the targets of links are not."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        fetched = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}
        if tag in fetched and attrs.get(fetched[tag]):
            self.addresses.append(attrs[fetched[tag]])
        self.addresses += re.findall(r"url\(([^)]+)\)", attrs.get("style") or "")


def test_no_page_fetches_anything_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        parser = _Loaded()
        parser.feed(page.read_text(encoding="utf-8"))
        foreign = [a for a in parser.addresses if re.match(r"(https?:)?//", a.strip("'\""))]
        assert parser.addresses and not foreign, (page, foreign)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_links_to_code_lead_to_the_line(site):
    page = (site / "method.html").read_text(encoding="utf-8")
    target, anchor = re.search(r'href="(source/[^"#]*losses\.py\.html)#([^"]*)"><code>contrastive_loss', page).groups()
    source = (site / target).read_text(encoding="utf-8")
    line = source[source.index(f'id="{anchor}"') :].partition("\n")[0]
    assert "contrastive_loss" in line


def test_every_page_of_the_repository_is_in_the_navigation(site):
    for path in docs_site.PAGES:
        assert (site / path).with_suffix(".html").is_file()


def test_links_between_files_become_links_between_pages():
    text = (
        "[data](../datasets/README.md#cityscapes) [method](method.md) [key](../reclip_d2/config/keys.py)\n"
        "[`KEYS`](../reclip_d2/config/keys.py) [site](https://example.org) [here](#x)\n"
        "```\n[kept](../datasets/README.md)\n```\n"
    )
    lines = docs_site.rewrite_links(text, "training.md").splitlines()
    assert lines[0] == "[data](data_sets.md#cityscapes) [method](method.md) [key](source/reclip_d2/config/keys.py.md)"
    keys = (ROOT / "reclip_d2/config/keys.py").read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(keys, 1) if line.startswith("KEYS: "))
    assert lines[1].startswith(f"[`KEYS`](source/reclip_d2/config/keys.py.md#__codelineno-0-{number}) ")
    assert lines[1].endswith("[site](https://example.org) [here](#x)")
    assert lines[3] == "[kept](../datasets/README.md)"


def test_links_of_a_page_from_another_folder_are_relative_to_its_file():
    assert docs_site.rewrite_links("[a](docs/install.md) [b](LICENSE)", "index.md") == (
        "[a](install.md) [b](source/LICENSE.md)"
    )
    assert docs_site.rewrite_links("[a](../docs/install.md)", "data_sets.md") == "[a](install.md)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x](../reclip_d2/nowhere.py)", "not a file of the repository"),
        ("[x](../../outside.md)", "not a file of the repository"),
        ("[`no_such_name`](../reclip_d2/config/keys.py)", "does not define it"),
    ],
)
def test_a_broken_link_stops_the_build(text, message):
    with pytest.raises(PluginError, match=message):
        docs_site.rewrite_links(text, "training.md")


def test_defined_names_are_functions_classes_members_and_variables():
    names = docs_site._defined_names(
        "A = 1\nB: int = 2\n\n\ndef f():\n    c = 3\n\n\nclass G:\n    def h(self):\n        pass\n"
    )
    assert names == {"A": 1, "B": 2, "f": 5, "G": 9, "G.h": 10}


def test_the_site_folder_is_ignored_by_git():
    site = yaml.safe_load(re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))["site_dir"]
    assert f"{site}/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
