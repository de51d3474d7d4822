"""Vote of regions that another system has drawn, such as SAM: one index PNG per image.

Shape letters: C classes, M regions, (H, W) size of the image in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from detectron2.config import CfgNode
from torch import Tensor

from reclip_d2.data.mask_files import NO_CLASS, MaskFiles
from reclip_d2.errors import ReclipError
from reclip_d2.inference.band import Band
from reclip_d2.utils.files import StrPath

_FLOOR = 1e-12


class RegionMasks:
    """The regions of images, from a folder of masks. Ids 0 and 255 (65535 in 16 bits) mean: no region."""

    def __init__(self, files: MaskFiles) -> None:
        self.files = files

    @classmethod
    def from_config(cls, cfg: CfgNode) -> RegionMasks | None:
        """The masks of ``TEST.REGION_VOTE.FOLDER``; None unless ``TEST.REFINE`` has ``region_vote`` with these.

        Raises:
            ReclipError: the folder is not named, does not exist, or has no PNG.
        """
        keys = cfg.TEST.REGION_VOTE
        if "region_vote" not in cfg.TEST.REFINE or keys.REGIONS != "masks":
            return None
        if not keys.FOLDER:
            raise ReclipError(
                "TEST.REGION_VOTE.REGIONS masks needs TEST.REGION_VOTE.FOLDER: name the folder of index PNGs"
            )
        return cls(MaskFiles(keys.FOLDER))

    def read(self, image: StrPath | None, size: tuple[int, int]) -> Tensor:
        """Region of each pixel ``(H, W)`` int64: M ids from 1 without gaps, 0 for none.

        Args:
            image: the image's file; None for one that has none.
            size: (H, W) of the upright image.

        Raises:
            ReclipError: there is no mask, it cannot be read, or has another size.
        """
        if image is None:
            raise ReclipError(
                "TEST.REGION_VOTE.REGIONS masks finds regions by the names of image files, which this image does not"
                " have, or is read in windows: use REGIONS superpixels"
            )
        mask = torch.from_numpy(self.files.read(image, size))
        mask = mask.masked_fill(mask == NO_CLASS, 0)
        ids, regions = torch.unique(mask, return_inverse=True)
        return regions if int(ids[0]) == 0 else regions + 1


def vote_in_bands(make_bands: Callable[[], Iterable[Band]], regions: Tensor) -> Iterator[Band]:
    """Bands in which all pixels of a region have the mean of its probabilities; pixels of no region keep theirs.

    The bands are made twice, first to sum, then to label, so that memory holds ``(C, M)`` sums and one band.

    Args:
        make_bands: makes the bands of an image, whose soft-max over C are the probabilities.
        regions: ``(H, W)`` int64, ids from 1, 0 for none.
    """
    sums: Tensor | None = None
    regions_there: Tensor | None = None
    for band in make_bands():
        probabilities = band.logits.softmax(0).flatten(1)
        if sums is None:
            sums = probabilities.new_zeros(len(probabilities), int(regions.max()) + 1)
            regions_there = regions.to(probabilities.device)
        sums.index_add_(1, regions_there[band.rows].flatten(), probabilities)
    assert sums is not None and regions_there is not None
    counts = torch.bincount(regions_there.flatten(), minlength=sums.shape[1]).clamp(min=1)
    means = (sums / counts).clamp(min=_FLOOR).log()
    for band in make_bands():
        yield Band(band.rows, lambda band=band: _voted(band.logits, regions_there[band.rows], means))


def _voted(logits: Tensor, regions: Tensor, means: Tensor) -> Tensor:
    """Log-probabilities ``(C, rows, W)``: of its region, or a pixel's own where there is none."""
    return torch.where(regions > 0, means[:, regions], logits.log_softmax(0))
