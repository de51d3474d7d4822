"""The output folder: its files, the inputs it was made with, and whether a run may resume in it.

::

    masks/            index PNGs, mirroring the images' folders, and classes.json
    overlay/, ...     other formats
    summary.json      the summary; summary.html, to read
    reclip.json       the inputs and settings
    run/              hypotheses, trained models, logs; needed to resume, and by predict. While a run is not finished
                      also features/, the feature store
    previous-*/       earlier results of another kind of model
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from reclip_d2.data.image_folder import RESULTS_MARKER, ImageFile
from reclip_d2.errors import ReclipError
from reclip_d2.modeling.checkpoint import FINAL_CHECKPOINT
from reclip_d2.utils.digest import current_digest, file_digests
from reclip_d2.utils.files import display_path
from reclip_d2.utils.io import atomic_write, is_temporary, remove_leftovers, remove_leftovers_of
from reclip_d2.utils.json_files import read_json
from reclip_d2.utils.locks import LOCK_NAME, exclusive
from reclip_d2.utils.progress import say
from reclip_d2.workspace.run_state import ASIDE, MASKS, PAGE, RESULTS, RUN, SUMMARY, RunState, aside_name
from reclip_d2.workspace.shard_lock import is_shard_lock, running_shard

ANEW = "give --overwrite to start over, or another --output"
# The setting that identifies the trained model of the masks, if it is in another folder.
CHECKPOINT = "the checkpoint"
_IMAGES_SCHEMA = {
    "type": "object",
    "required": ["signatures", "broken"],
    "properties": {
        "signatures": {"type": "object", "additionalProperties": {"type": "string"}},
        "broken": {"type": "array", "items": {"type": "string"}},
    },
}


class RunFolder:
    """Paths of an output folder, and its recorded state."""

    def __init__(self, path: str | Path) -> None:
        """
        Args:
            path: the user's path; resolved, so that two paths of one folder are equal.

        Raises:
            ReclipError: the path cannot be resolved: a loop of links, or not a valid name.
        """
        try:
            self.path = Path(path).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise ReclipError(f"{display_path(path)} is not the path of a folder ({error}): name another") from error
        self.marker = self.path / RESULTS_MARKER
        self.run = self.path / RUN
        self.masks = self.path / MASKS
        self.summary = self.path / SUMMARY
        self.page = self.path / PAGE
        self.hypotheses = self.run / "hypotheses.jsonl"
        self.evidence = self.run / "class_evidence.json"
        self.survey = self.run / "survey.jsonl"
        self.working_files = self.run / "working"
        self.features = self.run / "features"
        self.copies = self.run / "copies"
        self.decision = self.run / "decision.json"
        self._images = self.run / "images.json"

    def model(self, kind: str) -> Path:
        """Folder of a kind of model: ``maskclip``, ``rectified`` or ``student``."""
        return self.run / kind

    def config(self, kind: str) -> Path:
        """Config of a kind of model."""
        return self.model(kind) / "config.yaml"

    def weights(self, kind: str) -> Path:
        """Checkpoint of a trained model."""
        return self.model(kind) / FINAL_CHECKPOINT

    def bank(self, kind: str) -> Path:
        """Bank of features that refines the masks of a kind of model."""
        return self.model(kind) / "bank.safetensors"

    def is_begun(self, kind: str, state: RunState) -> bool:
        """Whether a kind of model has results: a checkpoint, or masks."""
        return (
            (self.model(kind) / "last_checkpoint").exists()
            or state.results.get("model") == kind
            or any(self.path.glob(f"previous-{kind}-*"))
        )

    # ---- state ------------------------------------------------------------------------------------------------

    def is_used(self) -> bool:
        """Whether a run has begun in the folder; False if it is new or empty.

        Raises:
            ReclipError: the folder contains other files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ReclipError(f"{self.path} is a file: name a folder")
        if self.marker.is_symlink():
            raise ReclipError(f"{self.marker} is a symbolic link, so this is not an output folder: name another")
        if self.marker.exists():
            return True
        if self.path.exists() and not all(map(self._is_leftover, self.path.iterdir())):
            raise ReclipError(f"{self.path} contains other files: name a new or empty folder")
        return False

    def _is_leftover(self, path: Path) -> bool:
        """Whether a file was left by a run that was killed before it wrote ``reclip.json``."""
        return path.name == LOCK_NAME or is_shard_lock(path.name) or is_temporary(path, of=RESULTS_MARKER)

    def read(self) -> RunState | None:
        """The state; None for a new or empty folder.

        Raises:
            ReclipError: the folder contains other files, or a damaged ``reclip.json``.
        """
        return RunState.read(self.marker, ANEW) if self.is_used() else None

    def claim(self, state: RunState) -> None:
        """Write the state if the folder is new, before files that a killed run would leave there."""
        if self.read() is None:
            self.write(state)

    def write(self, state: RunState) -> None:
        """Write the state."""
        state.write(self.marker)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Create and lock the folder, and remove half-written files of killed runs; the lock ends with the process in
        any case."""
        busy = f"another run is using {self.path}: wait for it, or name another --output"
        with exclusive(self.path / LOCK_NAME, busy):
            if shard := running_shard(self.path):
                raise ReclipError(f"a run of shard {shard} is using {self.path}: wait for it, or name another --output")
            remove_leftovers_of(self.marker)
            remove_leftovers_of(self.summary)
            remove_leftovers_of(self.page)
            if not self.run.is_symlink():
                remove_leftovers(self.run)
            yield

    def clear(self) -> None:
        """Remove the results of earlier runs, and nothing else; if ``reclip.json`` cannot be read, everything that has
        the name of a result. Links are removed, not their targets."""
        if not self.is_used():
            return
        try:
            entries = self.read().entries
        except ReclipError:  # damaged, or of another version: results are recognised by name
            entries = list(RESULTS)
        for name in (*entries, *ASIDE, RUN):
            _remove(self.path / name)
        self.marker.unlink()  # last: without it, the remaining files would make the folder unusable

    def check_links(self) -> None:
        """Raise :class:`ReclipError` if files of a run would be written elsewhere, through a link."""
        for name in (*RESULTS, *ASIDE, RUN):
            top = self.path / name
            parents = os.walk(top) if top.is_dir() and not top.is_symlink() else ()
            links = (Path(parent, folder) for parent, folders, _ in parents for folder in folders)
            for path in itertools.chain([top], links):
                if path.is_symlink():
                    raise ReclipError(f"{path} is a symbolic link, and results are not written through links: {ANEW}")

    def remove_features(self) -> None:
        """Remove the feature store, which a finished run no longer needs; one in a folder of the user's is kept."""
        _remove(self.features)

    def remove_copies(self) -> None:
        """Remove the copies of images at URLs, which finished masks no longer need."""
        _remove(self.copies)

    # ---- images -----------------------------------------------------------------------------------------------

    def check_images(self, images: Sequence[ImageFile], trained: bool) -> dict[str, str]:
        """Digests of the images' contents by id; raises if the images differ from those of earlier runs.

        An image without a mask, such as a broken one, may have been replaced if it was not trained on.

        Args:
            trained: whether a model was trained on the images, so that none may be new or missing.
        """
        digests = file_digests([image.path for image in images])
        signatures = {image.image_id: digest for image, digest in zip(images, digests, strict=True)}
        known = self._read_images()[0] if self._images.exists() else signatures
        known |= {i.image_id: current_digest(known[i.image_id], i.path) for i in images if i.image_id in known}
        added = [key for key in signatures if key not in known] if trained else []
        removed = [key for key in known if key not in signatures] if trained else []
        names = {image.image_id: image.mask_name for image in images}
        changed = [k for k, v in signatures.items() if known.get(k, v) != v and not self._may_change(k, names[k])]
        counts = [(len(added), "new"), (len(removed), "missing"), (len(changed), "changed")]
        if words := ", ".join(f"{count} {word}" for count, word in counts if count):
            first = (added or removed or changed)[0]
            raise ReclipError(
                f"IMAGES are not those that {self.path} was made with ({words}, such as {first!r}): {ANEW}"
                + (f"; for further images: reclip predict --model {self.path}" if added else "")
            )
        return signatures

    def _may_change(self, image_id: str, mask_name: PurePosixPath) -> bool:
        """Whether nothing depends on an image: it was not trained on, and has no mask."""
        if self.hypotheses.exists() and image_id not in self.broken:
            return False
        folders = [self.masks, *self.path.glob(f"previous-*/{MASKS}")]
        return not any((folder / mask_name).exists() for folder in folders)

    def remember_images(self, signatures: Mapping[str, str]) -> None:
        """Record the images' digests, for :meth:`check_images`."""
        known, broken = self._read_images() if self._images.exists() else ({}, [])
        self._write_images(known | signatures, broken)

    def missing_masks(self, images: Sequence[ImageFile], results: Mapping[str, str]) -> list[ImageFile]:
        """Images without a mask in these results (see :attr:`RunState.results`)."""
        state = self.read()
        if state is None or state.results != results:
            return list(images)
        return _without_masks(images, self.masks)

    def masks_of(self, results: Mapping[str, str]) -> Path:
        """Folder of the masks of these results, in their place or moved aside."""
        state = self.read()
        in_place = state is not None and state.results == results
        return self.masks if in_place else _aside(self, results) / MASKS

    def lacking_masks(self, images: Sequence[ImageFile], results: Mapping[str, str]) -> list[ImageFile]:
        """Images without a mask in these results, in their place or moved aside."""
        return _without_masks(images, self.masks_of(results))

    @property
    def broken(self) -> set[str]:
        """Ids of the images that were broken in the first survey: the training excludes them."""
        return set(self._read_images()[1]) if self._images.exists() else set()

    def mark_broken(self, image_ids: Sequence[str]) -> None:
        """Record which images the training excludes."""
        self._write_images(self._read_images()[0], sorted(image_ids))

    def _read_images(self) -> tuple[dict[str, str], list[str]]:
        content = read_json(self._images, _IMAGES_SCHEMA, "list of images", ANEW)
        return content["signatures"], content["broken"]

    def _write_images(self, signatures: Mapping[str, str], broken: Sequence[str]) -> None:
        with atomic_write(self._images) as temporary:
            temporary.write_text(json.dumps({"signatures": signatures, "broken": broken}), encoding="utf-8")


# Keys that hypotheses depend on; other keys may change until the training begins.
_HYPOTHESIS_KEYS = (
    "HYPOTHESIS.CLASS_SHARES", "HYPOTHESIS.METHOD", "HYPOTHESIS.SPLIT_BLOCK", "HYPOTHESIS.WINDOW_RATIO",
    "INPUT.COPIES", "INPUT.GEO", "INPUT.MAX_SIZE_TEST", "INPUT.MIN_SIZE_TEST", "INPUT.TILES", "MODEL.CLIP",
)  # fmt: skip


# Keys that results depend on but folders of earlier versions do not record, with the values used then.
_RECORDED_SINCE = {"MODEL.CLIP.DENSE_ATTENTION": "value"}


def check_same_inputs(folder: RunFolder, known: RunState, wanted: RunState) -> None:
    """Raise :class:`ReclipError` if a run would resume with other inputs than its results were made with.

    Args:
        known: state of the folder.
        wanted: state that the command line asks for.
    """
    begun = {kind for kind in known.settings if folder.is_begun(kind, known)}
    if not begun and not folder.hypotheses.exists():
        return
    for what, theirs, ours in (
        ("--classes", known.classes.entries, wanted.classes.entries),
        ("background names", known.classes.background, wanted.classes.background),
        ("--clip", known.clip, wanted.clip),
        ("CLIP weights", known.weights, wanted.weights),
    ):
        if theirs != ours:
            raise ReclipError(f"{folder.path} was made with other {what}{_difference(theirs, ours)}: {ANEW}")
    for kind, settings in wanted.settings.items():
        before = known.settings.get(kind, {})
        before = {**_RECORDED_SINCE, **before} if before else before
        for key in sorted(before.keys() & settings.keys()):  # versions of the package differ in their keys
            matters = kind in begun or (kind == "rectified" and key.startswith(_HYPOTHESIS_KEYS))
            if matters and before[key] != settings[key]:
                raise ReclipError(
                    f"{folder.path} was made with {key} {before[key]} instead of {settings[key]} ({kind}): {ANEW}"
                )
        # Neither models trained here nor MaskCLIP have this setting.
        if kind in begun and (before.get(CHECKPOINT) or "") != (settings.get(CHECKPOINT) or ""):
            raise ReclipError(f"{folder.path} was made with another trained model ({kind}): {ANEW}")


def _difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, str):
        return f" ({theirs})"
    if len(theirs) != len(ours):
        return f" ({len(theirs)} instead of {len(ours)})"
    index = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    return f" (number {index + 1} was {_words(theirs[index])} and is {_words(ours[index])})"


def _words(names: str | tuple[str, ...]) -> str:
    return names if isinstance(names, str) else ", ".join(names)


def _without_masks(images: Sequence[ImageFile], masks: Path) -> list[ImageFile]:
    return [image for image in images if not (masks / image.mask_name).exists()]


def begin_results(
    folder: RunFolder, state: RunState, wanted: Mapping[str, str], entries: Sequence[str], silent: bool = False
) -> None:
    """Make room for the masks of a kind of model; another kind's are moved aside, and back when wanted again.

    Args:
        wanted: see :attr:`RunState.results`.
        entries: files and folders of the results.
        silent: do not report what is moved.
    """
    if state.results and state.results != wanted:
        aside = _aside(folder, state.results)
        _move(folder.path, aside, state.entries)
        state.entries = []
        if not silent:
            say("masks", f"moved the results of {' '.join(state.results.values())} to {aside}")
    back = _aside(folder, wanted)
    returned = [name for name in RESULTS if (back / name).exists()]
    state.results = dict(wanted)
    state.entries = sorted({*state.entries, *entries, *returned})
    folder.write(state)
    if back.is_dir():
        _move(back, folder.path, returned)
        with contextlib.suppress(OSError):  # it contains a user's file
            back.rmdir()


def _aside(folder: RunFolder, results: Mapping[str, str]) -> Path:
    return folder.path / aside_name(results["model"], results["background"])


def _move(source: Path, target: Path, names: Sequence[str]) -> None:
    target.mkdir(exist_ok=True)
    for name in names:
        if not (source / name).exists():
            continue
        _remove(target / name)  # left by a run that was killed here
        (source / name).rename(target / name)


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link (not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
