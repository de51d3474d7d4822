"""Runs a case and checks its outcome."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import select
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CANARY = "CANARY"
# Folders of a case that its program may write in.
WRITABLE = ("out", "cache", "tmp")
_SECONDS = 120  # on a loaded machine; most cases take less than one
_MEGABYTES = 3000
_ERROR = re.compile(r"^(?:[\w./ -]+: )?error: ", re.MULTILINE)

Prepare = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of a program.

    Attributes:
        name: of the case, unique.
        program: ``reclip``, or a script below the repository's root.
        arguments: of the command line; ``{case}`` is the case's folder.
        prepare: makes or changes files in the case's folder, where ``photos`` (two images), ``classes.txt`` and, with
            ``model``, ``model`` (a finished run) lie.
        fine: the input is valid: the exit status must be 0.
        either: a clear error and a success are both right; for what only some machines or versions can do.
        words: what the error's line must say, a regular expression.
        model: the case needs a finished run.
        resumed: it resumes that run, which is in ``out``, with all of its images.
        environment: variables; None removes one.
        telling: whether the default tests include it.
    """

    name: str
    program: str
    arguments: Sequence[str]
    prepare: Prepare | None = None
    fine: bool = False
    either: bool = False
    words: str = ""
    model: bool = False
    resumed: bool = False
    environment: dict[str, str | None] = dataclasses.field(default_factory=dict)
    telling: bool = False


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run has ended."""

    status: int
    timed_out: bool
    seconds: float
    megabytes: float
    out: str
    err: str
    changed: list[str]
    canary: bool

    def problems(self, case: Case) -> list[str]:
        """What is not as it must be."""
        found = []
        errors = _ERROR.findall(self.err)
        if self.timed_out:
            found.append(f"it had not ended after {self.seconds:.0f} s")
        elif self.status < 0:
            found.append(f"it was killed by signal {-self.status}")
        if "Traceback (most recent call last)" in self.err + self.out:
            found.append("a traceback")
        fine = case.fine or (case.either and self.status == 0)
        if fine and self.status != 0:
            found.append(f"exit status {self.status}")
        if fine and errors:
            found.append("an error's line")
        if not fine and self.status == 0:
            found.append("exit status 0")
        if not fine and len(errors) != 1:
            found.append(f"{len(errors)} error lines instead of one")
        line = next((text for text in self.err.splitlines() if _ERROR.match(text)), "")
        if not fine and case.words and not re.search(case.words, line):
            found.append(f"the line does not say {case.words!r}")
        if len(line) > 2000:
            found.append(f"a line of {len(line)} characters")
        if self.changed:
            found.append(f"changed: {', '.join(self.changed[:5])}")
        if self.canary:
            found.append("code of the input was run")
        if self.megabytes > _MEGABYTES:
            found.append(f"{self.megabytes:.0f} MB of memory")
        return found


class Server:
    """The process of :mod:`tests.hostile.server`."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "hostile" / "server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment, text=True,
        )  # fmt: skip
        assert self._process.stdout.readline() == "ready\n"

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait(60)

    def run(self, case: Case, folder: Path, finished: Path) -> Ending:
        """Run a case in a new folder.

        Args:
            folder: a new one.
            finished: the finished run with its inputs, of which copies are made.
        """
        prepare_folder(case, folder, finished)
        before = snapshot(folder)
        environment = {
            "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "RECLIP_CACHE": str(folder / "cache"),
            "XDG_CACHE_HOME": str(folder / "cache"), "DETECTRON2_DATASETS": str(folder / "datasets"),
            "FVCORE_CACHE": str(folder / "cache"), "TORCH_HOME": str(folder / "cache"),
            "MPLCONFIGDIR": str(folder / "cache"), **case.environment,
        }  # fmt: skip
        answer, out, err = self.call(
            case.program,
            [str(a).replace("{case}", str(folder)).replace("{root}", str(ROOT)) for a in case.arguments],
            folder,
            {name: value and value.replace("{case}", str(folder)) for name, value in environment.items()},
        )
        after = snapshot(folder)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        return Ending(**answer, out=out, err=err, changed=changed, canary=(folder / CANARY).exists())

    def call(
        self, program: str, arguments: Sequence[object], folder: Path, environment: dict[str, str | None]
    ) -> tuple[dict[str, Any], str, str]:
        """Run a program in a folder.

        Returns:
            the server's answer, and what the program has written to standard output and standard error.
        """
        streams = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
        request = {
            "program": program,
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "environment": environment,
            "seconds": _SECONDS,
            "out": str(streams[0]),
            "err": str(streams[1]),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], _SECONDS + 60)
        assert ready, "the server does not answer"
        answer = json.loads(self._process.stdout.readline())
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in streams)
        for path in streams:
            path.unlink()
        return answer, out, err


def prepare_folder(case: Case, folder: Path, finished: Path) -> None:
    """The inputs of a case, without ``precious``, which no program may touch."""
    folder.mkdir(parents=True)
    (folder / "photos").mkdir()
    for name in ("photos/0.jpg", "photos/1.jpg", "classes.txt"):
        shutil.copy(finished / name, folder / name)
    if case.model:
        shutil.copytree(finished / "out", folder / "model")
    if case.resumed:
        shutil.copytree(finished / "photos", folder / "photos", dirs_exist_ok=True)
        shutil.copytree(finished / "out", folder / "out")
    (folder / "precious" / "in").mkdir(parents=True)
    (folder / "precious" / "letter.txt").write_text("dear")
    (folder / "precious" / "in" / "picture.png").write_bytes(b"picture")
    for name in ("home", "datasets", *WRITABLE[1:]):
        (folder / name).mkdir()
    if case.prepare is not None:
        case.prepare(folder)


def snapshot(folder: Path) -> dict[str, str]:
    """What lies in a case's folder, but for what the program may write."""
    found = {}
    for place, folders, files in os.walk(folder):
        relative = os.path.relpath(place, folder)
        if relative == ".":
            folders[:] = [name for name in folders if name not in WRITABLE]
            files = [name for name in files if name not in WRITABLE]
        for name in [*folders, *files]:
            path = os.path.join(place, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            content = ""
            if stat.S_ISLNK(kind):
                content = os.readlink(path)
            elif stat.S_ISREG(kind) and status.st_mode & 0o400:
                with open(path, "rb") as file:
                    content = hashlib.sha256(file.read(1 << 24)).hexdigest() + str(status.st_size)
            found[os.path.normpath(os.path.join(relative, name))] = f"{status.st_mode:o} {content}"
    return found


def report(case: Case, ending: Ending, problems: Sequence[str]) -> str:
    """What a failed case has done."""
    return (
        f"{case.name}: {'; '.join(problems)}\n  {case.program} {' '.join(map(str, case.arguments))}\n"
        f"  status {ending.status}, {ending.seconds:.1f} s, {ending.megabytes:.0f} MB\n{ending.err[-1500:]}"
    )
