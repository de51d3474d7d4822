"""``python -m tools.gpu_check``: run the remaining steps; see docs/gpu_check.md."""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from pathlib import Path

from tools.gpu_check.runner import JSON_NAME, MARKDOWN_NAME, Check
from tools.gpu_check.steps import ROOT, plan


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="tools/gpu_check.sh", description="check the CUDA code on a GPU, and time it")
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run with small steps")
    result.add_argument("--folder", type=Path, help="folder of the results (default: output/gpu_check-DEVICE)")
    result.add_argument("--seconds", type=float, default=470.0, help="time limit for all steps together")
    result.add_argument("--steps", nargs="+", metavar="STEP", help="run only these steps")
    result.add_argument("--again", nargs="*", metavar="STEP", help="run these steps again; without names, all")
    return result


def main() -> int:
    """Run, print the summary, and return the exit status: 0 if all steps have passed."""
    options = parser().parse_args()
    steps = plan(options.device)
    names = [step.name for step in steps]
    if unknown := set([*(options.steps or []), *(options.again or [])]) - set(names):
        print(f"error: no step {', '.join(sorted(unknown))}: the steps are {', '.join(names)}", file=sys.stderr)
        return 2
    steps = [step for step in steps if options.steps is None or step.name in (*options.steps, "build")]
    folder = options.folder or ROOT / "output" / f"gpu_check-{options.device}"
    copies = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    check = Check(steps, options.device, folder, copies)
    check.forget((options.again or names) if options.again is not None else ())
    try:
        passed = check.run(options.seconds)
    finally:
        check.write()
        if copies:
            with tarfile.open(copies / "gpu_check_logs.tar.gz", "w:gz") as archive:
                for log in sorted(folder.glob("*.log")):
                    archive.add(log, log.name)
    print((folder / MARKDOWN_NAME).read_text())
    print(f"{folder / JSON_NAME} has all figures")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
