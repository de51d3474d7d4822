#!/usr/bin/env python
"""Print nvcc's report of each kernel (registers, stack, spills) from the log of a verbose build.

pip install -v --no-build-isolation -e . > build.log 2>&1; python tools/kernel_report.py build.log
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from reclip_d2.errors import exit_on_error
from reclip_d2.utils.files import MIB, read_bytes

_MAX_LOG = 256 * MIB

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


class Kernel(NamedTuple):
    """One compiled entry function."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def parse_report(log: str) -> list[Kernel]:
    """Kernels of a build log, in order; reports without all three lines are skipped."""
    kernels, entry, frame = [], None, None
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry, frame = match.groups(), None
        elif match := _SPILLS.search(line):
            frame = int(match[1]), int(match[2]) + int(match[3])
        elif entry and frame and (match := _REGISTERS.search(line)):
            kernels.append(Kernel(*entry, int(match[1]), *frame))
            entry = frame = None
    return kernels


def demangle(names: list[str]) -> list[str]:
    """Demangled C++ names; unchanged if c++filt is missing."""
    if not names or shutil.which("c++filt") is None:
        return names
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


@exit_on_error
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="log of a verbose build")
    args = parser.parse_args()
    log = read_bytes(args.log, "build log", limit=_MAX_LOG, remedy="build with pip install -v")
    kernels = parse_report(log.decode(errors="replace"))
    if not kernels:
        print("no kernels in the build log: the extension was not compiled for CUDA")
        return
    print("registers  stack  spills  architecture  kernel")
    for kernel, name in zip(kernels, demangle([kernel.name for kernel in kernels]), strict=True):
        counts = f"{kernel.registers:>9}  {kernel.stack_bytes:>5}  {kernel.spill_bytes:>6}"
        print(f"{counts}  {kernel.architecture:<12}  {name[:140]}")
    print(f"{len(kernels)} kernels; {sum(kernel.spill_bytes > 0 for kernel in kernels)} of them spill registers")


if __name__ == "__main__":
    main()
