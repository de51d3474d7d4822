"""What the page takes at most."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from reclip_d2.data.images import peek_size
from reclip_d2.errors import ReclipError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of what visitors may send.

    Attributes:
        pixels: of an image.
        file_bytes: of an image's file.
        upload_bytes: of all uploads that are kept.
        text_bytes: of a class list.
    """

    pixels: int = 50_000_000
    file_bytes: int = 64 * 2**20
    upload_bytes: int = 4 * 2**30
    text_bytes: int = 2**16

    def check_image(self, path: Path) -> None:
        """Raise :class:`ReclipError` for an image of more bytes or pixels; nothing is decoded."""
        size = path.stat().st_size
        if size > self.file_bytes:
            raise ReclipError(
                f"image {path} has {size / 2**20:,.1f} MiB, more than the {self.file_bytes / 2**20:,.0f} that this page"
                " takes: use reclip segment, or start the page with a larger --max-megabytes"
            )
        height, width = peek_size(path)
        if height * width > self.pixels:
            raise ReclipError(
                f"image {path} has {width} x {height} pixels, more than the {self.pixels / 1e6:,.0f} million that this"
                " page takes: use reclip segment, or start the page with a larger --max-megapixels"
            )

    def check_text(self, text: str) -> None:
        """Raise :class:`ReclipError` for a class list that is too long."""
        if len(text.encode("utf-8", "surrogatepass")) > self.text_bytes:
            raise ReclipError(f"the class list has more than {self.text_bytes // 1024} KiB: shorten it")
