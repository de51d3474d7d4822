"""Runs the steps, with a time limit per step and one for all. A second run resumes with the remaining steps."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from tools.gpu_check.figures import MORE_TO_DO
from tools.gpu_check.report import markdown
from tools.gpu_check.steps import CORRECTNESS, ROOT, Step

JSON_NAME, MARKDOWN_NAME = "gpu_check.json", "gpu_check.md"
# States of a step. Those in DONE are not run again: a second run repeats neither failures nor steps that exceeded their
# limit.
PASSED, FAILED, TIMED_OUT, MISSING = "passed", "failed", "over its own limit", "program not found"
OUT_OF_TIME, NOT_RUN, BLOCKED = "cut off: no time left", "not run: no time left", "not run: a step before it failed"
PARTLY = "partly done: no time left"
DONE = (PASSED, FAILED, TIMED_OUT, MISSING)
# States that resume from the step's figures.
_CONTINUED = (OUT_OF_TIME, PARTLY)
_LEAST_SECONDS = 5.0  # with less than this left, no step is started
_GRACE_SECONDS = 2.0  # between SIGTERM and SIGKILL


def sources_digest(root: Path = ROOT) -> str:
    """A hash of the sources that the steps check: results for other sources are discarded."""
    digest = hashlib.sha256()
    for folder, pattern in (("csrc", "**/*"), ("reclip_d2/layers", "*.py"), ("tests/layers", "*.py")):
        for path in sorted(path for path in (root / folder).glob(pattern) if path.is_file()):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Check:
    """A check in a folder: its JSON state, the Markdown summary, and one log per step."""

    def __init__(self, steps: Iterable[Step], device: str, folder: Path, copies: Path | None = None) -> None:
        """
        Args:
            folder: folder of the results; an earlier run with the same device and sources is resumed.
            copies: a second folder for JSON and Markdown.
        """
        self.steps, self.folder, self.copies = list(steps), folder, copies
        folder.mkdir(parents=True, exist_ok=True)
        self.state: dict[str, Any] = {
            "device": device,
            "sources": sources_digest(),
            "machine": {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()},
            "runs": [],
            "steps": {},
        }
        earlier = self._read_earlier()
        if earlier is not None:
            self.state["runs"], self.state["steps"] = earlier["runs"], earlier["steps"]
            for name, step in earlier["steps"].items():  # the JSON may come from another machine, without the logs
                if "figures" in step and not (path := folder / f"{name}.json").exists():
                    path.write_text(json.dumps(step["figures"]))

    def _read_earlier(self) -> dict[str, Any] | None:
        try:
            earlier = json.loads((self.folder / JSON_NAME).read_text())
            same = all(earlier[key] == self.state[key] for key in ("device", "sources"))
            return earlier if same and isinstance(earlier["steps"], dict) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None  # missing or damaged: start over

    def write(self) -> None:
        """Write JSON and Markdown, and their copies, atomically."""
        for name, text in ((JSON_NAME, json.dumps(self.state, indent=1)), (MARKDOWN_NAME, markdown(self.state))):
            for folder in filter(None, (self.folder, self.copies)):
                temporary = folder / f"{name}.tmp"
                temporary.write_text(text + "\n")
                temporary.replace(folder / name)

    def forget(self, names: Iterable[str]) -> None:
        """Mark these steps to run again."""
        for name in names:
            self.state["steps"].pop(name, None)

    def run(self, seconds: float) -> bool:
        """Run the remaining steps, for at most ``seconds``. Returns whether all steps have passed."""
        begin = time.monotonic()
        end = begin + seconds
        self.state["runs"].append({"began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "limit": seconds})
        for _, group in groupby(self.steps, key=lambda step: step.group or step.name):
            wanted = [step for step in group if step.always or self.status(step.name) not in DONE]
            running = []
            for step in wanted:
                if any(self.status(name) != PASSED for name in step.needs):
                    self.state["steps"][step.name] = {"status": BLOCKED}
                elif end - time.monotonic() < _LEAST_SECONDS:
                    self.state["steps"][step.name] = {"status": NOT_RUN}
                else:
                    running.append(_Process(step, self.folder, end, self.status(step.name) in _CONTINUED))
            while any([process.poll() for process in running]):  # a list: poll all of them
                time.sleep(0.05)
            for process in running:
                self.state["steps"][process.step.name] = process.result()
            self.state["runs"][-1]["seconds"] = round(time.monotonic() - begin, 1)
            self.write()
        return all(self.status(step.name) == PASSED for step in self.steps)

    def status(self, name: str) -> str | None:
        """The state of a step; None if it was not tried yet."""
        return self.state["steps"].get(name, {}).get("status")


class _Process:
    """A running step."""

    def __init__(self, step: Step, folder: Path, end: float, continued: bool) -> None:
        self.step, self.begin = step, time.monotonic()
        self.own_end = self.begin + step.seconds
        self.end = min(end, self.own_end)
        self.log, self.figures = folder / f"{step.name}.log", folder / f"{step.name}.json"
        if not continued:
            self.figures.unlink(missing_ok=True)
        self.stopped: str | None = None
        self.process: subprocess.Popen | None = None
        self.seconds = 0.0
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            **step.environment,
            "GPU_CHECK_FIGURES": str(self.figures),
            "GPU_CHECK_CEILINGS": str(folder / "ceilings.json"),
        }
        with self.log.open("wb") as log:
            try:
                self.process = subprocess.Popen(
                    step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                log.write(f"{step.command[0]}: {error.strerror}\n".encode())

    def poll(self) -> bool:
        """Whether the step is still running; stops it and its child processes when its time is up."""
        if self.process is None:
            return False
        now = time.monotonic()
        if self.process.poll() is not None:
            self.seconds = self.seconds or now - self.begin
            return False
        if now > self.end + _GRACE_SECONDS:
            self._signal(signal.SIGKILL)
        elif now > self.end and self.stopped is None:
            self.stopped = TIMED_OUT if self.end == self.own_end else OUT_OF_TIME
            self._signal(signal.SIGTERM)
        return True

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def result(self) -> dict[str, Any]:
        """The step's entry in the JSON."""
        code = None if self.process is None else self.process.returncode
        if self.process is not None:
            self._signal(signal.SIGKILL)  # processes that it has left running
        status = self.stopped or {None: MISSING, 0: PASSED, MORE_TO_DO: PARTLY}.get(code, FAILED)
        text = self.log.read_text(errors="replace")
        result: dict[str, Any] = {"status": status, "exit": code, "seconds": round(self.seconds, 1)}
        if status not in (PASSED, PARTLY):
            result["tail"] = text.splitlines()[-25:]
        with contextlib.suppress(OSError, ValueError):
            result["figures"] = json.loads(self.figures.read_text())
        if self.step.name == "operator_calls" or self.step.group == CORRECTNESS:
            result["last_line"] = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        return result
