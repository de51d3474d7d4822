"""A user's own images: folders, globs, files, lists and URLs, and the names of their masks.

An image's id is its path, without the extension, relative to the deepest folder that contains all sources: for one
folder that folder, for ``photos/**/*.jpg`` the folder ``photos``. Its mask is the file with that id, so masks mirror
the folders. Two images with one id (``a.jpg`` and ``a.png``) would share a mask and are rejected: often one of them is
a label map or a preview, and only the user knows which.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath

from reclip_d2.data.image_file import extension_remedy, readable_extensions
from reclip_d2.data.remote_images import find_remote, is_url, read_remote, table_paths, url_path
from reclip_d2.data.tiff import page_numbers
from reclip_d2.errors import ReclipError
from reclip_d2.utils.files import MIB, check_regular, decode_text, display_path, read_bytes
from reclip_d2.utils.pages import page_path

# Enough for a list of a million images.
_MAX_LIST = 256 * MIB
# Kinds of other files named in one message.
_NAMED_KINDS = 4
LIST_EXTENSION = ".txt"
LIST_EXTENSIONS = (LIST_EXTENSION, ".csv", ".parquet")
# A folder with this file holds our own results, including masks, which are not images to segment.
RESULTS_MARKER = "reclip.json"


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """A user's image.

    Attributes:
        path: absolute.
        name: relative path with forward slashes.
        scene_size: (H, W) of a GeoTIFF that is read in windows; None for a picture.
        url: where it comes from; ``path`` is then its copy, which is there after
            :func:`~reclip_d2.data.remote_images.fetch_images`. "" for a local file.
    """

    path: Path
    name: PurePosixPath
    scene_size: tuple[int, int] | None = None
    url: str = ""

    @property
    def available(self) -> Path | None:
        """``path``; None if the image is at a URL and has not been copied."""
        return None if self.url and not self.path.exists() else self.path

    @property
    def image_id(self) -> str:
        """``name`` without the extension."""
        return str(self.name.with_suffix(""))

    @property
    def mask_name(self) -> PurePosixPath:
        """The mask's path below the folder of masks: a PNG, or a GeoTIFF for a GeoTIFF."""
        return self.name.with_suffix(".tif" if self.is_scene else ".png")

    @property
    def is_scene(self) -> bool:
        """Whether the image is a GeoTIFF that is read in windows."""
        return self.scene_size is not None


@dataclasses.dataclass(frozen=True)
class FoundImages:
    """The images found in the user's sources.

    Attributes:
        images: sorted by id, each once.
        others: visible files that are not images.
    """

    images: list[ImageFile]
    others: frozenset[Path] = frozenset()

    @property
    def left_out(self) -> str:
        """``"left out: 3 .heic, 1 .gif"``, or "" if every file is an image."""
        return f"left out: {describe_kinds(self.others)}" if self.others else ""


def describe_kinds(paths: Iterable[Path]) -> str:
    """Number of files per extension, most frequent first, and how to enable reading them:
    ``"3 .heic, 1 .gif"``."""
    kinds = sorted(Counter(path.suffix.lower() for path in paths).items(), key=lambda kind: (-kind[1], kind[0]))
    parts = []
    for extension, count in kinds[:_NAMED_KINDS]:
        remedy = extension_remedy(extension)
        parts.append(f"{count:,} {extension or 'without extension'}{f' (to read them: {remedy})' if remedy else ''}")
    if rest := sum(count for _, count in kinds[_NAMED_KINDS:]):
        parts.append(f"{rest:,} of other kinds")
    return ", ".join(parts)


def find_images(
    sources: Sequence[str | os.PathLike[str]], exclude: Sequence[Path] = (), copies: Path | None = None
) -> FoundImages:
    """The images that ``sources`` name.

    Args:
        sources: each a folder (searched recursively; hidden files and folders are skipped, links are followed), an
            image, a glob (``**`` for any depth), or a list of such paths, relative to the list: ``.txt``, one per line,
            where lines that begin with # are comments, or ``.csv`` or ``.parquet`` with a column ``image``, ``path``,
            ``url``, ``file_name`` or ``filename``. Instead of paths, all may be URLs.
        exclude: folders to skip when a folder or a glob is searched. Folders with our own results are skipped too.
        copies: folder for copies of images at URLs; None if there may be none.

    Raises:
        ReclipError: a source does not exist, has no image, has an unknown extension, or is not a regular file; or two
            images share an id.
    """
    search = _Search({folder.resolve() for folder in exclude})
    files: dict[Path, None] = {}  # an ordered set
    bases = []
    for source in sources:
        found, base = search.resolve(os.fspath(source), Path.cwd(), f"IMAGES {display_path(source)}")
        if base is not None:
            bases.append(base)
        files.update(dict.fromkeys(found))
    if search.urls:
        if files:
            raise ReclipError("IMAGES names both files and URLs: give a command for each")
        return FoundImages(_remote_images(list(search.urls), copies), frozenset(search.others))
    if not files:
        raise ReclipError("no images given: name a folder, files, a glob or a list")
    root = Path(os.path.commonpath(bases))
    images = [image for path in files for image in _images_of(path, PurePosixPath(path.relative_to(root)))]
    _check_ids(images)
    return FoundImages(sorted(images, key=lambda image: image.image_id), frozenset(search.others))


def _remote_images(urls: Sequence[str], copies: Path | None) -> list[ImageFile]:
    """Images at URLs, with copies below ``copies``; their ids are relative to the deepest folder that has all."""
    if copies is None:
        raise ReclipError(f"IMAGES {display_path(urls[0])} is a URL, which only reclip predict and segment read")
    paths = [url_path(url) for url in urls]
    root = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(root) for path in paths]
    images = [ImageFile(copies / name, name, url=url) for name, url in zip(names, urls, strict=True)]
    _check_ids(images)
    return sorted(images, key=lambda image: image.image_id)


def _images_of(path: Path, name: PurePosixPath) -> Iterator[ImageFile]:
    """The file, or the pages of a TIFF with several: ``stack_page_0001`` and so on."""
    pages = page_numbers(path) if name.suffix.lower() in (".tif", ".tiff") else ()
    if len(pages) < 2:
        yield ImageFile(path, name)
        return
    for number in pages:
        yield ImageFile(page_path(path, number), name.with_name(f"{name.stem}_page_{number:04d}{name.suffix}"))


def _check_ids(images: Iterable[ImageFile]) -> None:
    seen: dict[str, str] = {}
    for image in images:
        place = image.url or str(image.path)
        other = seen.setdefault(image.image_id, place)
        if other != place:
            raise ReclipError(
                f"{display_path(other)} and {image.path.name} would share the mask {image.image_id}.png: rename or move"
                " one, or give a .txt list of the images to use"
            )


class _Search:
    """Looks for images.

    Attributes:
        others: files that were skipped because of their extension.
        urls: images at URLs, an ordered set.
    """

    def __init__(self, skipped: set[Path]) -> None:
        self.skipped = skipped
        self.urls: dict[str, None] = {}
        self.extensions = readable_extensions()
        self.others: set[Path] = set()

    def resolve(self, source: str, start: Path, where: str) -> tuple[list[Path], Path | None]:
        """Images of one source, and the deepest folder that contains them all; none, and None, for a URL.

        Args:
            start: folder that a relative source is relative to.
        """
        if is_url(source):
            self._resolve_url(source)
            return [], None
        # Removes ``..`` but keeps links: the user's names count.
        source = os.path.normpath(os.path.expanduser(source))
        path = Path(os.path.normpath(start / source))
        if os.path.isdir(path):
            if path.resolve() in self.skipped:
                raise ReclipError(f"{where} is the output folder: choose another --output")
            return self._scan(path, where), path
        if not os.path.lexists(path):
            if glob.has_magic(source):
                return self._expand(source, start, where)
            raise ReclipError(f"{where} does not exist: give a folder, an image, a glob or a .txt list")
        if path.suffix.lower() in LIST_EXTENSIONS:
            return self._read_list(path)
        self._check_extension(path, where)
        check_regular(path, "image", "name a file")
        return [path], path.parent

    def _resolve_url(self, url: str) -> None:
        """Add the images that a URL names: a list, an image, a folder or a glob."""
        extension = url_path(url).suffix.lower()
        if extension not in LIST_EXTENSIONS:
            urls, others = find_remote(url, self._is_image)
            self.urls.update(dict.fromkeys(urls))
            self.others.update(map(Path, others))
            return
        name = f"image list {display_path(url)}"
        base = url.partition("?")[0].rpartition("/")[0]
        for number, entry in _entries(read_remote(url, _MAX_LIST), name, extension):
            where = f"{name}, line {number}: {display_path(entry)}"
            if PurePosixPath(entry).suffix.lower() in LIST_EXTENSIONS:
                raise ReclipError(f"{where} is itself a list: a list may name images, folders and globs only")
            self._resolve_url(entry if is_url(entry) else f"{base}/{entry}")

    def _is_image(self, path: PurePath) -> bool:
        return path.suffix.lower() in self.extensions

    def _check_extension(self, path: Path, where: str) -> None:
        if not self._is_image(path):
            remedy = extension_remedy(path.suffix.lower())
            raise ReclipError(
                f"{where} is none of {' '.join(self.extensions)}: {f'{remedy}, or ' if remedy else ''}convert it"
            )

    def _scan(self, folder: Path, where: str) -> list[Path]:
        """Images below a folder."""
        images, others = [], []
        for parent, names in self._walk(folder):
            for name in names:
                (images if self._is_image(path := parent / name) else others).append(path)
        if not images:
            found = f"; its files are {describe_kinds(others)}" if others else ""
            raise ReclipError(
                f"{where} has no images ({' '.join(self.extensions)}){found}: check the folder, or convert them"
            )
        self.others.update(others)
        return images

    def _walk(self, folder: Path) -> Iterator[tuple[Path, list[str]]]:
        """Walk visible folders and their visible files; links are followed, each folder is visited once."""

        def refuse(error: OSError) -> None:
            where = f"folder {display_path(error.filename)}"
            raise ReclipError(f"{where} cannot be read ({error.strerror}): check its permissions")

        visited = set(self.skipped)
        for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
            real = os.path.realpath(parent)
            if Path(real) in visited or (RESULTS_MARKER in names and Path(parent) != folder):
                folders.clear()
                continue
            visited.add(Path(real))
            folders[:] = sorted(filter(_visible, folders))
            yield Path(parent), sorted(filter(_visible, names))

    def _expand(self, pattern: str, start: Path, where: str) -> tuple[list[Path], Path]:
        """Files that match a glob, and its part before the first wildcard. Brackets in ``start`` are literal."""
        parts = Path(pattern).parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        folder = Path(os.path.normpath(start.joinpath(*parts[:fixed])))
        names = sorted(glob.glob(os.path.join(*parts[fixed:]), root_dir=folder, recursive=True))
        matches = [folder / name for name in names if not os.path.isdir(folder / name)]
        named = [path for path in matches if self._is_image(path)]
        images = [path for path in named if not any(parent.resolve() in self.skipped for parent in path.parents)]
        if named and not images:
            raise ReclipError(f"{where} matches only files in the output folder: choose another --output")
        if not images:
            no_images = f"but no images ({' '.join(self.extensions)})"
            what = f"matches {describe_kinds(matches)}, {no_images}" if matches else "matches nothing"
            raise ReclipError(f"{where} {what}: check the pattern")
        self.others.update(set(matches) - set(named))
        return images, folder

    def _read_list(self, path: Path) -> tuple[list[Path], Path | None]:
        """Images in a list, and the deepest folder that contains them all; None for a list of URLs."""
        name = f"image list {display_path(path)}"
        images: list[Path] = []
        bases = []
        data = read_bytes(path, "image list", limit=_MAX_LIST, remedy="give a list of images")
        known = len(self.urls)
        for number, entry in _entries(data, name, path.suffix.lower()):
            where = f"{name}, line {number}: {display_path(entry)}"
            if entry.lower().endswith(LIST_EXTENSIONS):
                raise ReclipError(f"{where} is itself a list: a list may name images, folders and globs only")
            found, base = self.resolve(entry, path.parent, where)
            images += found
            bases += [] if base is None else [base]
        if not images and len(self.urls) == known:
            raise ReclipError(f"{name} names no image: write one path per line")
        return images, Path(os.path.commonpath(bases)) if bases else None


def _entries(data: bytes, name: str, extension: str) -> list[tuple[int, str]]:
    """Lines of a list with their numbers, from 1, or rows of a table."""
    if extension == LIST_EXTENSION:
        lines = decode_text(data, name.partition("image list ")[2], "image list").splitlines()
        stripped = ((number, line.strip()) for number, line in enumerate(lines, start=1))
        return [(number, line) for number, line in stripped if line and not line.startswith("#")]
    return list(enumerate(table_paths(data, name, extension), start=1))


def _visible(name: str) -> bool:
    return not name.startswith(".")
