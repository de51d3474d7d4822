"""A user's own images: folders, globs, files and text lists, and the names that their masks get.

An image's id is its path, without the extension, below the deepest folder that holds everything that was named: for one
folder below that folder, for ``photos/**/*.jpg`` below ``photos``. Its mask is the file of that id, so masks mirror the
folders. Two images of one id (``a.jpg`` and ``a.png``) would share a mask, and are refused: often one of the two is a
label map or a preview, and only the user knows which.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from reclip_d2.errors import ReclipError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp")
LIST_EXTENSION = ".txt"
# A folder with this file holds our own results, masks among them: they are no images to segment.
RESULTS_MARKER = "reclip.json"


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image of the user's.

    Attributes:
        path: absolute.
        name: relative path with forward slashes.
    """

    path: Path
    name: PurePosixPath

    @property
    def image_id(self) -> str:
        """``name`` without the extension."""
        return str(self.name.with_suffix(""))


def find_images(sources: Sequence[str | os.PathLike[str]], exclude: Sequence[Path] = ()) -> list[ImageFile]:
    """The images that ``sources`` name, sorted by id, each once.

    Args:
        sources: each a folder (searched recursively; hidden files and folders are left out, links are followed), an
            image, a glob (``**`` for any depth), or a ``.txt`` list of such paths, one a line, relative to the list;
            lines that begin with # are comments.
        exclude: folders that are left out where a folder or a glob is searched. So are folders with our own results.

    Raises:
        ReclipError: a source does not exist, has no image, or has an unknown extension; two images share an id.
    """
    skipped = {folder.resolve() for folder in exclude}
    files: dict[Path, None] = {}  # a set that keeps the order
    bases = []
    for source in sources:
        found, base = _resolve(os.fspath(source), Path.cwd(), skipped, f"IMAGES {source}")
        bases.append(base)
        files.update(dict.fromkeys(found))
    if not files:
        raise ReclipError("no images are named: give a folder, files, a glob or a list")
    root = Path(os.path.commonpath(bases))
    images = [ImageFile(path, PurePosixPath(path.relative_to(root))) for path in files]
    _check_ids(images)
    return sorted(images, key=lambda image: image.image_id)


def _check_ids(images: Iterable[ImageFile]) -> None:
    seen: dict[str, Path] = {}
    for image in images:
        other = seen.setdefault(image.image_id, image.path)
        if other != image.path:
            raise ReclipError(
                f"{other} and {image.path.name} would share the mask {image.image_id}.png: rename or move one, or give"
                " a .txt list of the images that you mean"
            )


def _resolve(source: str, start: Path, skipped: set[Path], where: str) -> tuple[list[Path], Path]:
    """Images of one source, and the deepest folder that holds all that it names.

    Args:
        start: folder that a relative source begins at.
    """
    # Without ``..``, but with links as they are: the user's names count.
    source = os.path.normpath(os.path.expanduser(source))
    path = Path(os.path.normpath(start / source))
    if path.is_dir():
        if path.resolve() in skipped:
            raise ReclipError(f"{where} is the folder that the results go to: name another --output")
        return _scan(path, skipped, where), path
    if path.is_file():
        if path.suffix.lower() == LIST_EXTENSION:
            return _read_list(path, skipped)
        _check_extension(path, where)
        return [path], path.parent
    if glob.has_magic(source):
        return _expand(source, start, skipped, where)
    raise ReclipError(f"{where} does not exist: give a folder, an image, a glob or a .txt list")


def _check_extension(path: Path, where: str) -> None:
    if path.suffix.lower() not in EXTENSIONS:
        raise ReclipError(f"{where} is none of {' '.join(EXTENSIONS)}: convert it")


def _visible(name: str) -> bool:
    return not name.startswith(".")


def _scan(folder: Path, skipped: set[Path], where: str) -> list[Path]:
    """Images below a folder."""
    images, others = [], Counter()
    for parent, names in _walk(folder, skipped):
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in EXTENSIONS:
                images.append(parent / name)
            else:
                others[suffix or "no extension"] += 1
    if not images:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
        raise ReclipError(
            f"{where} has no images ({' '.join(EXTENSIONS)}){f'; its files are {kinds}' if kinds else ''}:"
            " check the folder, or convert them"
        )
    return images


def _walk(folder: Path, skipped: set[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Visible folders and their visible files; links are followed, each folder is visited once."""

    def refuse(error: OSError) -> None:
        raise ReclipError(f"folder {error.filename} cannot be read ({error.strerror}): check its permissions")

    visited = set(skipped)
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = Path(parent).resolve()
        if real in visited or (RESULTS_MARKER in names and Path(parent) != folder):
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(filter(_visible, folders))
        yield Path(parent), sorted(filter(_visible, names))


def _expand(pattern: str, start: Path, skipped: set[Path], where: str) -> tuple[list[Path], Path]:
    """Files that a glob names, and its part before the first wild card. Brackets in ``start`` are no wild cards."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    folder = Path(os.path.normpath(start.joinpath(*parts[:fixed])))
    names = sorted(glob.glob(os.path.join(*parts[fixed:]), root_dir=folder, recursive=True))
    matches = [folder / name for name in names if (folder / name).is_file()]
    named = [path for path in matches if path.suffix.lower() in EXTENSIONS]
    images = [path for path in named if not any(parent.resolve() in skipped for parent in path.parents)]
    if named and not images:
        raise ReclipError(f"{where} matches only files in the folder that the results go to: name another --output")
    if not images:
        what = f"matches {len(matches)} files, but no images ({' '.join(EXTENSIONS)})" if matches else "matches nothing"
        raise ReclipError(f"{where} {what}: check the pattern")
    return images, folder


def _read_list(path: Path, skipped: set[Path]) -> tuple[list[Path], Path]:
    """Images that a text file lists, and the folder that holds all of them."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ReclipError(f"image list {path} is no UTF-8 text ({error}): save it as UTF-8, a path a line") from error
    images: list[Path] = []
    bases = []
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        where = f"image list {path}, line {number}: {entry}"
        if entry.lower().endswith(LIST_EXTENSION):
            raise ReclipError(f"{where} is itself a list: lists name images, folders and globs")
        found, base = _resolve(entry, path.parent, skipped, where)
        images += found
        bases.append(base)
    if not images:
        raise ReclipError(f"image list {path} names no image: write a path a line")
    return images, Path(os.path.commonpath(bases))
