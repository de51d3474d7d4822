"""Kill a program at every rename that it makes: no clean-up, no ``finally``, as in a power failure."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

Moment = str


def run_killed(call: Callable[[], object], arrange: Callable[[], None], log: Path | None = None) -> int:
    """Call a function in a separate process, a fork of this one.

    Args:
        arrange: called in that process, before.
        log: where its output goes.

    Returns:
        its exit status, 0 if the function returns; negative if a signal ended it.
    """
    process = os.fork()
    if process == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            quiet = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            arrange()
            call()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _name(target: Path, source: Path) -> str:
    """What a rename is about: the target; which checkpoint is the last is told by the content."""
    return f"{target.name}: {source.read_text()}" if target.name == "last_checkpoint" else target.name


def kill_at_new_rename(seen: set[Moment], record: Path) -> Callable[[], None]:
    """Arrange that the process is killed before, or just after, the first rename that ``seen`` does not have yet.

    Args:
        record: the file where it leaves which one that was.
    """

    def arrange() -> None:
        def watched(original: Callable) -> Callable:
            def rename(source: object, target: object, **options: object) -> None:
                name = _name(Path(target), Path(source))
                for moment, step in ((f"before {name}", None), (f"after {name}", original)):
                    if step is not None:
                        step(source, target, **options)
                    if moment not in seen:
                        record.write_text(moment)
                        os.kill(os.getpid(), signal.SIGKILL)

            return rename

        os.replace, os.rename = watched(os.replace), watched(os.rename)

    return arrange


def run_with_kills(call: Callable[[], object], folder: Path, limit: int = 200) -> list[Moment]:
    """Call a function again and again until it ends by itself; each time it is killed at a rename at which it was not
    killed before.

    Args:
        folder: for the record and the log.

    Returns:
        where it was killed.
    """
    seen: dict[Moment, None] = {}
    record, log = folder / "killed.txt", folder / "killed.log"
    for _ in range(limit):
        log.unlink(missing_ok=True)
        status = run_killed(call, kill_at_new_rename(set(seen), record), log)
        if status == 0:
            return list(seen)
        assert status == -signal.SIGKILL, f"after a kill {list(seen)[-1:]}:\n{log.read_text()[-3000:]}"
        seen[record.read_text()] = None
    raise AssertionError(f"does not end: {list(seen)}")
