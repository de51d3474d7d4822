"""A process that has imported everything, and forks a child for each run of a program.

A fresh interpreter takes seconds to import PyTorch; a fork takes milliseconds. Requests and answers are lines of JSON
on standard input and output. In this process no operator of PyTorch runs: threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A run that needs more fails before the machine runs out of memory.
_ADDRESS_SPACE = 12 << 30
_FILE_BYTES = 1 << 30


def main() -> None:
    """Answer requests until standard input ends."""
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what an import prints is no answer
    _import_everything()
    os.write(answers, b"ready\n")
    with open(requests, encoding="utf-8") as stream:
        for line in stream:
            answer = _run(json.loads(line))
            os.write(answers, json.dumps(answer).encode() + b"\n")


def _import_everything() -> None:
    import importlib

    import matplotlib

    matplotlib.use("Agg")
    import reclip_d2

    for name in ("numpy", "scipy.ndimage", "PIL.Image", "torchvision", "open_clip", "jsonschema", "filelock", "tqdm",
                 "detectron2.evaluation", "detectron2.utils.visualizer", "pycocotools.mask"):  # fmt: skip
        importlib.import_module(name)
    for path in sorted(Path(reclip_d2.__file__).parent.rglob("*.py")):
        parts = path.relative_to(Path(reclip_d2.__file__).parents[1]).with_suffix("").parts
        if "app" not in parts and parts[-1] not in ("__init__", "__main__"):
            with contextlib.suppress(ImportError, SystemExit):
                importlib.import_module(".".join(parts))


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Run a program in a child: ``program`` (a script, or ``reclip``), ``arguments``, ``folder``, ``environment``,
    ``seconds``."""
    out, err = Path(request["out"]), Path(request["err"])
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            _become(request, out, err)
            status = _call(request["program"], request["arguments"])
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(status)
    end = start + request["seconds"]
    timed_out = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            timed_out = True
            os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it has left running
    return {
        "status": os.waitstatus_to_exitcode(status),
        "timed_out": timed_out,
        "seconds": time.monotonic() - start,
        "megabytes": usage.ru_maxrss / 1024,
    }


def _become(request: dict[str, Any], out: Path, err: Path) -> None:
    """Take over the streams, the folder, the environment and the limits of the request."""
    os.setsid()
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    os.chdir(request["folder"])
    for name, value in request["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    import tempfile

    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.setrecursionlimit(1000)


def _call(program: str, arguments: list[str]) -> int:
    """Run it; returns the exit status that a separate process would have."""
    sys.argv = [program, *arguments]
    try:
        if program == "reclip":
            from reclip_d2.cli.main import main as reclip

            reclip(arguments)
        else:
            sys.argv[0] = str(ROOT / program)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main()
