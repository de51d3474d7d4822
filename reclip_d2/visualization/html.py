"""A web page in one file: headings, paragraphs, tables, and pictures inside it. No script, nothing loaded."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc }
p, li { max-width: 50rem }
figure { margin: 1.5rem 0 } figure img { max-width: 100% }
figcaption { color: #444; font-size: .9rem; max-width: 50rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: bottom }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
""".strip()


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number for a table; a dash for what there is not."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


class Page:
    """Collects the parts of a page in their order. All text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def items(self, texts: Sequence[str]) -> None:
        """A list."""
        self._parts.append(f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> None:
        """A table; columns from ``text_columns`` on hold numbers and are set flush right."""

        def line(tag: str, cells: Sequence[str]) -> str:
            return "".join(
                f"<{tag}{' class=number' if i >= text_columns else ''}>{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )

        body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
        head = f"<thead><tr>{line('th', header)}</tr></thead>"
        self._parts.append(f"<div class=scroll><table>{head}\n<tbody>{body}</tbody></table></div>")

    def picture(self, png: Path, caption: str) -> None:
        """A PNG file, put into the page."""
        data = base64.b64encode(png.read_bytes()).decode()
        text = html.escape(caption, quote=True)
        self._parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        )

    def render(self) -> str:
        """The page's HTML."""
        title = html.escape(self.title)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
            + "\n".join(self._parts)
            + "\n</body>\n</html>\n"
        )
