"""Reading index images: PNGs whose pixels are ids of classes or instances, not colours.

A palette PNG (mode P) stores indices into a table of colours, which programs may reorder when they save, optimise or
convert it. Then the indices are no longer ids, and only the colours reveal it. So indices are taken as ids only if the
palette is in the order of the ids (:class:`Palette`). If the data set defines the colours, another order is mapped by
colour; everything else is rejected.

Shape letters: (H, W) size in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from reclip_d2.data.image_file import open_image
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import StrPath, display_path

Color = tuple[int, int, int]

DEEP_MODES = ("L", "P", "I;16", "I;16B", "I")
"""Pillow's modes of index PNGs of 8 and 16 bits."""
MODES = ("L", "P")
"""Pillow's modes of index PNGs of 8 bits."""
VOID_COLOR: Color = (224, 224, 192)
"""PASCAL VOC's colour of the border around objects, its id 255."""
_BLACK: Color = (0, 0, 0)


def pascal_color(index: int) -> Color:
    """Colour of an id in PASCAL VOC's map: bit j of the id's k-th group of three bits is bit 7 - k of channel j."""
    color = [0, 0, 0]
    for group in range(8):
        for channel in range(3):
            color[channel] |= (index >> (3 * group + channel) & 1) << (7 - group)
    return color[0], color[1], color[2]


# Palettes that annotation tools and libraries give to index images, whatever the ids mean.
_USUAL_ORDERS = ({k: pascal_color(k) for k in range(256)}, {k: (k, k, k) for k in range(256)})


@dataclass(frozen=True)
class Palette:
    """What the colours of palette PNGs say about ids.

    With :attr:`own`, colours identify ids. Without it, a palette can only confirm that indices are ids: it must be in
    the order of :attr:`colors`, of PASCAL VOC's map, or of grey levels.
    """

    colors: Mapping[int, Color] = field(default_factory=dict)
    """Colour of each id."""
    own: bool = False
    """Whether the data set defines these colours, so that all of its labels use them."""
    ignore_label: int = 255
    """Id that may have any colour that is not a class's; by colour, black and VOC's border mean this id unless they
    are in :attr:`colors`."""

    def ids(self, indices: np.ndarray, table: np.ndarray, name: str) -> np.ndarray:
        """Ids of a palette image.

        Args:
            indices: ``(H, W)`` uint8.
            table: ``(N, 3)`` uint8, the image's palette.
            name: the file, for errors.

        Returns:
            ``(H, W)`` uint8 or int64.

        Raises:
            ReclipError: the palette is in another order, and the data set does not define the colours.
        """
        used = np.unique(indices).tolist()
        found: dict[int, Color | None] = {k: _color(table, k) for k in used}
        grey = _USUAL_ORDERS[1]
        orders = [self.colors, grey] if self.own else [self.colors, *_USUAL_ORDERS]
        if any(self._in_order(found, colors) for colors in orders if colors):
            return indices
        if not self.own:
            raise ReclipError(
                f"{name} is a palette image whose palette is not in the order of the ids (its entry"
                f" {self._first_out_of_order(found)}), so its pixels are not ids: save the ids as a grey 8-bit PNG"
            )
        by_color = self._by_color()
        lut = np.zeros(256, dtype=np.uint8 if max(ids[0] for ids in by_color.values()) < 256 else np.int64)
        for index, color in found.items():
            ids = by_color.get(color, []) if color is not None else []
            if len(ids) != 1:
                what = f"colour {color}" if color is not None else f"index {index} without a colour"
                why = f"shared by several ids ({', '.join(map(str, ids))})" if ids else "not one of the data set's"
                raise ReclipError(
                    f"{name} is a palette image in another order, and its {what} is {why}: get the data set's own"
                    " labels, or save the ids as a grey 8-bit PNG"
                )
            lut[index] = ids[0]
        return lut[indices]

    def is_order_of(self, table: np.ndarray) -> bool:
        """Whether a whole palette ``(N, 3)`` is in the order of the ids, as far as they have colours."""
        found = {k: _color(table, k) for k in range(len(table))}
        orders = [self.colors] if self.own else [self.colors, *_USUAL_ORDERS]
        return any(
            self._in_order({k: color for k, color in found.items() if k in colors}, colors)
            for colors in orders
            if colors
        )

    def _in_order(self, found: Mapping[int, Color | None], colors: Mapping[int, Color]) -> bool:
        """Whether each used index has the colour of the id with that number."""
        return all(
            color == colors.get(index, ...) or (index == self.ignore_label and color not in self.colors.values())
            for index, color in found.items()
        )

    def _first_out_of_order(self, found: Mapping[int, Color | None]) -> str:
        colors = self.colors or _USUAL_ORDERS[0]
        index = next(k for k, color in found.items() if color != colors.get(k) or k == max(found))
        return f"{index} is {found[index] or 'missing'}"

    def _by_color(self) -> dict[Color, list[int]]:
        ids: dict[Color, list[int]] = {}
        for index, color in self.colors.items():
            ids.setdefault(color, []).append(index)
        for color in (_BLACK, VOID_COLOR):
            ids.setdefault(color, [self.ignore_label])
        return ids


def _color(table: np.ndarray, index: int) -> Color | None:
    return tuple(table[index].tolist()) if index < len(table) else None


PLAIN = Palette()
"""The palette of labels without agreed colours."""


def index_size(path: StrPath, what: str = "label", remedy: str = "get the file again") -> tuple[int, int]:
    """(H, W) declared in the header of an index PNG; arguments and errors as in :func:`read_index_image`."""
    with open_image(path, what, remedy, formats=("PNG",)) as image:
        return image.size[::-1]


def read_palette(path: StrPath, what: str = "label", remedy: str = "get the file again") -> np.ndarray | None:
    """Palette ``(N, 3)`` uint8 of an index PNG, None in other modes; errors as in :func:`read_index_image`."""
    with open_image(path, what, remedy, formats=("PNG",)) as image:
        return _table(image) if image.mode == "P" else None


def read_index_image(
    path: StrPath,
    size: tuple[int, int] | None,
    owner: str = "",
    *,
    what: str = "label",
    remedy: str = "get the file again",
    palette: Palette = PLAIN,
    modes: tuple[str, ...] = DEEP_MODES,
    wrong_mode: str = "write a single-channel PNG of class ids",
) -> np.ndarray:
    """Ids of an index PNG.

    Args:
        size: (H, W) that it must have; otherwise its pixels are not decoded. None: any size.
        owner: what has that size, for errors: ``"its image"``.
        what: what errors call the file.
        remedy: what to do about a missing or damaged file.
        palette: what colours mean.
        modes: Pillow's modes that are accepted, of :data:`DEEP_MODES`.
        wrong_mode: what to do about another mode.

    Returns:
        ``(H, W)`` of an integer dtype.

    Raises:
        ReclipError: the file is missing, damaged, not an index PNG, of another size, or has a palette that
            :meth:`Palette.ids` rejects.
    """
    name = f"{what} {display_path(path)}"
    with open_image(path, what, remedy, formats=("PNG",)) as image:
        if image.mode not in modes:
            raise ReclipError(f"{name} is a {image.mode} image: {wrong_mode}")
        bits = _grey_bits(image)
        if bits is not None:
            # Decoders scale these to 0 to 255, which loses the ids.
            raise ReclipError(f"{name} is a grey PNG of {bits} bits per pixel: {wrong_mode}, of 8 bits")
        if size is not None and image.size != size[::-1]:
            raise ReclipError(
                f"{name} has size {image.width}x{image.height}, {owner} {size[1]}x{size[0]}: they must be the same"
            )
        pixels = np.asarray(image)
        if image.mode != "P":
            return pixels
        return palette.ids(pixels, _table(image), name)


def _table(image: Image.Image) -> np.ndarray:
    """Palette ``(N, 3)`` uint8 of an image of mode P."""
    return np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)


def _grey_bits(image: Image.Image) -> int | None:
    """2 or 4 for a grey PNG with that many bits per pixel, which the decoder scales up."""
    raw = str(image.tile[0][3]) if image.tile else ""
    return int(raw[2:]) if image.mode == "L" and raw in ("L;2", "L;4") else None
