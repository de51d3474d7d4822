"""MkDocs hook of ``mkdocs.yml``: pages from elsewhere in the repository, and links from pages to code.

The links in pages work on GitHub. For the site, this module
- adds README.md, CHANGELOG.md and others, and the notebook, as pages (:data:`PAGES`);
- turns links to files outside ``docs/`` into links to pages that show these files. If the link's text is the name of
  a function, class or variable in code font, as in ``[`bias_logits`](../reclip_d2/modeling/bias_head.py)``, the link
  points to the line that defines it.
Links to missing files, or to names that a file does not define, stop the build.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

# Page of the site -> file of the repository.
PAGES = {
    "index.md": "README.md",
    "data_sets.md": "datasets/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "quickstart.md": "demo/quickstart.ipynb",
}
_PAGE_OF = {path: page for page, path in PAGES.items()}
_LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".sh": "bash",
    ".cu": "cuda",
    ".cpp": "cpp",
    ".h": "cpp",
}

_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<text>\[[^\]\n]*\])\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of :data:`PAGES`, and a page for each source file that a page links to."""
    for page, path in PAGES.items():
        files.append(File.generated(config, page, content=_read_page(path)))
    sources = set()
    for file in files.documentation_pages():
        for target in _linked_paths(file.content_string, file.src_uri):
            if not target.startswith("docs/") and target not in _PAGE_OF:
                sources.add(target)
    for path in sorted(sources):
        files.append(File.generated(config, _source_page(path), content=_show_source(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page for the site."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    return rewrite_links(markdown, page.file.src_uri)


def rewrite_links(markdown: str, page: str) -> str:
    """The text of a page, with links between files of the repository replaced by links between pages of the site.

    Args:
        page: path of the page in the site, such as ``training.md``.
    """

    def rewrite(match: re.Match[str]) -> str:
        target, _, fragment = match["target"].partition("#")
        path = _repository_path(target, page)
        if path is None:
            return match[0]
        here = posixpath.dirname(page) or "."
        if path.startswith("docs/"):
            new = path.removeprefix("docs/")
        elif path in _PAGE_OF:
            new = _PAGE_OF[path]
        else:
            new = _source_page(path)
            fragment = _line_anchor(path, match["text"])
        new = posixpath.relpath(new, here)
        return f"{match['text']}({new}{'#' + fragment if fragment else ''})"

    return _outside_fences(markdown, lambda text: _LINK.sub(rewrite, text))


def defined_names(path: str) -> dict[str, int]:
    """Lines on which a Python file defines its names: functions, classes, ``Class.method``, variables."""
    return _defined_names((ROOT / path).read_text(encoding="utf-8"))


@functools.cache
def _defined_names(source: str) -> dict[str, int]:
    names: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names[prefix + node.name] = node.lineno
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        names[prefix + target.id] = node.lineno

    visit(ast.parse(source).body, "")
    return names


def _line_anchor(path: str, text: str) -> str:
    """Anchor of the line that defines the name in a link's text; empty if the text is not a name in code font."""
    name = re.fullmatch(r"\[`([A-Za-z_][\w.]*)(\(\))?`\]", text)
    if not name or not path.endswith(".py") or name[1] == posixpath.basename(path):
        return ""
    names = defined_names(path)
    if name[1] not in names:
        raise PluginError(f"a page links to {name[1]} in {path}, which does not define it")
    return f"__codelineno-0-{names[name[1]]}"


def _repository_path(target: str, page: str) -> str | None:
    """Path in the repository of a link's target; None for other hosts, and for anchors of the page itself."""
    if not target or re.match(r"[a-z]+:", target):
        return None
    home = posixpath.dirname(PAGES.get(page, f"docs/{page}"))
    path = posixpath.normpath(posixpath.join(home, target))
    if path.startswith("../") or not (ROOT / path).is_file():
        raise PluginError(f"{PAGES.get(page, f'docs/{page}')} links to {target}, which is not a file of the repository")
    return path


def _linked_paths(markdown: str, page: str) -> set[str]:
    paths: set[str] = set()

    def collect(text: str) -> str:
        for match in _LINK.finditer(text):
            path = _repository_path(match["target"].partition("#")[0], page)
            if path is not None:
                paths.add(path)
        return text

    _outside_fences(markdown, collect)
    return paths


def _outside_fences(markdown: str, change: Any) -> str:
    """``markdown`` with a function applied to its text outside fenced code."""
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def _read_page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    return _notebook_as_markdown(text) if path.endswith(".ipynb") else text


def _notebook_as_markdown(text: str) -> str:
    cells = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        cells.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(cells) + "\n"


def _source_page(path: str) -> str:
    return f"source/{path}.md"


def _show_source(path: str) -> str:
    """A page that shows a file, excluded from the search."""
    text = (ROOT / path).read_text(encoding="utf-8")
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    language = _LANGUAGES.get(os.path.splitext(path)[1], "text")
    return f'---\nsearch:\n  exclude: true\n---\n# {path}\n\n{fence}{language} linenums="1"\n{text}\n{fence}\n'
