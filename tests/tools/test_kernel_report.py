"""The compiler's report, read from a build log."""

import importlib.util
from pathlib import Path

LOG = """
  ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_90'
  ptxas info    : Function properties for _Z5firstPf
      0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 24 registers, used 1 barriers
  ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_80'
  ptxas info    : Function properties for _Z6secondPf
      16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
  ptxas info    : Used 255 registers, used 0 barriers, 128 bytes smem
  ptxas info    : Used 9 registers
"""


def test_registers_stack_and_spills_of_each_kernel():
    path = Path(__file__).resolve().parents[2] / "tools" / "kernel_report.py"
    spec = importlib.util.spec_from_file_location("kernel_report", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert [tuple(kernel) for kernel in tool.parse_report(LOG)] == [
        ("_Z5firstPf", "sm_90", 24, 0, 0),
        ("_Z6secondPf", "sm_80", 255, 16, 12),
    ]
    assert tool.parse_report("nothing here") == []
