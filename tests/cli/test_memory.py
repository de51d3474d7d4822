"""Memory of long runs does not grow with the number of images."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reclip_d2.workspace.options import PredictOptions
from reclip_d2.workspace.predict import PredictRun

IMAGES = int(os.environ.get("RECLIP_TEST_IMAGES", "10000"))
WARM = IMAGES // 10
# MiB that the highest resident memory may grow after the first tenth of the images. A kept mask, or the pixels of a
# kept image, would be 64 px squared: 35 MiB for the masks of 9,000 images, and 105 MiB for the images.
BOUND = 16.0


def peak() -> float:
    """Highest resident memory of this process since :func:`forget_peak`, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def forget_peak() -> None:
    """Linux: the highest resident memory is the present one."""
    Path("/proc/self/clear_refs").write_text("5")


def write_images(folder: Path, count: int, side: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((side // 4, side // 4, 1), np.uint8))
        Image.fromarray(pixels).save(folder / f"{number:05d}.png")


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_is_flat_over_10000_images(model, tmp_path):
    write_images(tmp_path / "many", IMAGES, 64)
    peaks = {}

    def watch(event) -> None:
        if event.stage != "masks" or not event.total:
            return
        for name, done in (("begun", WARM // 2), ("warm", WARM), ("end", IMAGES)):
            if event.done >= done and name not in peaks:
                if name == "begun":  # what loading and the first images need is over
                    forget_peak()
                peaks[name] = peak()

    options = PredictOptions(device="cpu", use="rectified", opts=("INPUT.MIN_SIZE_TEST", "64"))
    result = PredictRun(tmp_path / "many", model, tmp_path / "masks", options).predict(watch)
    assert result.made == IMAGES
    growth = peaks["end"] - peaks["warm"]
    print(f"{IMAGES} images: peak {peaks['warm']:.1f} MiB at {WARM}, {peaks['end']:.1f} MiB at the end: {growth:+.1f}")
    assert growth < BOUND, peaks
