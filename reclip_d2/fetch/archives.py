"""Downloading one archive with resume and checksum, by pooch, and unpacking it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import tarfile
import time
import zipfile
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from reclip_d2.errors import ReclipError
from reclip_d2.utils.digest import file_digest
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.json_files import read_json
from reclip_d2.utils.progress import count_steps

_CHUNK = 1 << 20
_SECONDS = 30  # without an answer
_TRIES = 5
_RECORDED = "hashes.json"
_RECORDED_SCHEMA = {"type": "object", "additionalProperties": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}}


@dataclasses.dataclass(frozen=True)
class Archive:
    """An archive of a data set.

    Attributes:
        name: file name.
        url: its address.
        hash: ``md5:``, ``sha1:`` or ``sha256:`` and hex digits; None if none is published.
        into: folder that it is unpacked into, or copied to if it is not an archive.
        only: members to unpack; empty for all.
        gigabytes: size, about; 0 if unknown.
    """

    name: str
    url: str
    hash: str | None
    into: str = "."
    only: tuple[str, ...] = ()
    gigabytes: float = 0.0


def load_pooch() -> ModuleType:
    """pooch; raise :class:`ReclipError` that names the extra if it is not installed."""
    try:
        pooch = importlib.import_module("pooch")
    except ImportError as error:
        raise ReclipError(
            "pooch, which downloads data sets, is not installed: pip install 'reclip_d2[fetch]'"
        ) from error
    pooch.get_logger().setLevel("ERROR")
    return pooch


def is_offline() -> bool:
    """Whether ``RECLIP_OFFLINE`` or ``HF_HUB_OFFLINE`` forbids downloads."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("RECLIP_OFFLINE", "HF_HUB_OFFLINE"))


def fetch_archive(archive: Archive, folder: Path) -> Path:
    """An archive in ``folder``, downloaded unless it is there; its hash is checked in any case.

    An interrupted download is ``NAME.part`` and resumes. Without a published hash that of the first download is
    recorded in ``folder/hashes.json``, and compared later.

    Raises:
        ReclipError: pooch is not installed, the archive cannot be downloaded, or its hash is wrong; then nothing of it
            is left.
    """
    pooch = load_pooch()
    target, recorded = folder / archive.name, _recorded(folder)
    expected = archive.hash or recorded.get(archive.name)
    if is_offline() and not target.exists():
        raise ReclipError(
            f"{archive.name} is not in {folder}, and RECLIP_OFFLINE or HF_HUB_OFFLINE is set: get {archive.url}"
            " elsewhere, and copy it there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists() and expected and not pooch.hashes.hash_matches(target, expected):
        raise ReclipError(f"{target} has another hash than {expected}: remove it, and repeat the command")
    if not target.exists():
        registry = pooch.create(folder, "", registry={archive.name: expected}, urls={archive.name: archive.url})
        try:
            registry.fetch(archive.name, downloader=_download, progressbar=False)
        except ValueError as error:  # pooch has removed its file
            raise ReclipError(
                f"{archive.url} has another hash than {expected}: the download is damaged, or the file has changed;"
                " repeat the command"
            ) from error
    if expected is None:
        recorded[archive.name] = f"sha256:{file_digest(target)}"
        with atomic_write(folder / _RECORDED) as temporary:
            temporary.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    return target


def _recorded(folder: Path) -> dict[str, str]:
    path = folder / _RECORDED
    return read_json(path, _RECORDED_SCHEMA, "list of hashes", "remove it") if path.exists() else {}


def _download(url: str, output: Any, registry: Any) -> None:  # noqa: ANN401 (pooch's types)
    """pooch's downloader: into ``NAME.part`` next to the target, resumed where it ends, then moved to ``output``."""
    name = next(name for name, address in registry.urls.items() if address == url)
    part = Path(registry.path) / f"{name}.part"
    for attempt in range(1, _TRIES + 1):
        before = _size(part)
        try:
            done, cause = _append(url, part, name), "the server closed the connection"
        except OSError as error:  # all errors of requests are
            done, cause = False, _words(error)
        if done:
            shutil.move(part, output)
            return
        if _size(part) <= before and attempt > 1:
            break
        time.sleep(min(attempt, 3) * _PAUSE)
    kept = f"{_size(part) >> 20:,} MiB are kept: " if _size(part) else ""
    raise ReclipError(f"{url} cannot be downloaded ({cause}); {kept}repeat the command to resume")


_PAUSE = 1.0  # seconds


def _append(url: str, part: Path, name: str) -> bool:
    """Append what is missing; whether the file is complete.

    Raises:
        ReclipError: the server answers with an error that a repetition does not change.
    """
    requests = importlib.import_module("requests")
    have = _size(part)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=headers, stream=True, timeout=_SECONDS) as reply:
        if reply.status_code == 416:  # nothing is missing, or the file has become shorter
            complete = reply.headers.get("Content-Range", "").rpartition("/")[2] == str(have)
            if not complete:
                part.unlink()
            return complete
        if 400 <= reply.status_code < 500:
            raise ReclipError(
                f"{url} cannot be downloaded (HTTP {reply.status_code}): look for the file on the data set's own page"
            )
        reply.raise_for_status()
        resumed = reply.status_code == 206 and reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with (
            open(part, "ab" if resumed else "wb") as file,
            count_steps(name, max(total >> 20, 1), unit="MiB", done=have >> 20) as steps,
        ):
            for chunk in reply.iter_content(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                if total:
                    steps.advance(min(have >> 20, steps.total) - steps.done)
    return not total or have >= total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _words(error: OSError) -> str:
    inner = getattr(error.args[0], "reason", None) if error.args else None
    text = str(inner or error) if error.errno is None else os.strerror(error.errno)
    return " ".join(text.split(":")[-1].split())[:120] or type(error).__name__


def unpack(archive: Archive, file: Path, datasets: Path) -> None:
    """Unpack an archive below ``datasets``, unless that is done. An interrupted run begins again.

    Raises:
        ReclipError: the archive is damaged, or a member would be written elsewhere.
    """
    done = file.with_name(f"{file.name}.unpacked")
    if done.exists():
        return
    target = datasets / archive.into
    target.mkdir(parents=True, exist_ok=True)
    try:
        if file.suffix == ".zip":
            _unzip(archive, file, target)
        elif file.suffix in (".tar", ".tgz"):
            _untar(archive, file, target)
        else:
            with atomic_write(target / file.name) as temporary:
                shutil.copyfile(file, temporary)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ReclipError(f"{file} cannot be unpacked ({error}): remove it, and repeat the command") from error
    done.touch()


def _untar(archive: Archive, file: Path, target: Path) -> None:
    with tarfile.open(file) as tar, count_steps(f"unpack {file.name}", file.stat().st_size >> 20, unit="MiB") as steps:
        for member in tar:
            if not archive.only or member.name.removeprefix("./") in archive.only:
                tar.extract(member, target, filter="data")
            steps.advance(max(0, min(member.offset_data >> 20, steps.total) - steps.done))


def _unzip(archive: Archive, file: Path, target: Path) -> None:
    with (
        zipfile.ZipFile(file) as zipped,
        count_steps(f"unpack {file.name}", len(zipped.infolist()), unit="file") as steps,
    ):
        for member in zipped.infolist():
            path = PurePosixPath(member.filename)
            if path.is_absolute() or ".." in path.parts:
                raise zipfile.BadZipFile(f"member {member.filename!r} is outside of the folder")
            if not archive.only or member.filename in archive.only:
                zipped.extract(member, target)
            steps.advance()
