"""The machine and its ceilings: bytes per second of a large copy, operations per second of a matrix product."""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess

import torch

from reclip_d2.utils.timing import timed
from tools.gpu_check.figures import write_figures


def command_output(*command: str) -> str | None:
    """Output of a program; None if it is not installed."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or None


def copy_bytes_per_second(device: torch.device, elements: int) -> float:
    """Bytes per second, read plus written, of a float32 copy larger than the caches; the best of ten."""
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(10))


def product_flops(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product of random numbers; the best of ten."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = torch.device(parser.parse_args().device)
    cuda = device.type == "cuda"
    figures = {
        "device_name": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": command_output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"
        ),
        "nvcc": (command_output("nvcc", "--version") or "").splitlines()[-1:],
        "copy_bytes_per_second": copy_bytes_per_second(device, 2**30 if cuda else 2**22),
        "bfloat16_flops": product_flops(device, 8192 if cuda else 256, torch.bfloat16),
        "float32_flops": product_flops(device, 8192 if cuda else 256, torch.float32),
    }
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        figures["multiprocessors"] = properties.multi_processor_count
        figures["l2_bytes"] = properties.L2_cache_size
        figures["memory_bytes"] = properties.total_memory
    write_figures(figures)
    for key, value in figures.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
