"""A bank of features from unlabelled images: what the regions that a model calls by a class's name look like.

It is made once (:mod:`reclip_d2.inference.bank`), stored as safetensors, and read by the refinement ``bank``.

Shape letters: C classes, D width of the joint embedding, M entries of the bank.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reclip_d2.errors import ReclipError
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.utils.io import atomic_write
from reclip_d2.utils.tensor_files import read_tensor_file, save_safetensors

FORMAT = "reclip_d2 bank 1"
_REMEDY = "make it with reclip segment --bank or tools/build_bank.py, or remove bank from TEST.REFINE"


def bank_identity(model: LanguageSegmentor) -> dict[str, Any]:
    """All that a bank's features and class ids depend on, as JSON values: the CLIP and the class list.

    Raises:
        ReclipError: the model has no CLIP.
    """
    if not isinstance(model, CLIPSegmentor):
        raise ReclipError("TEST.REFINE bank compares features of CLIP, which a student does not have: remove it")
    identity = model.identity()
    return {key: value for key, value in identity.items() if key not in ("reference", "MODEL.CLIP.LEARNABLE_QUERY")}


@dataclasses.dataclass(frozen=True)
class Bank:
    """Features of confident regions.

    Attributes:
        mean: mean feature of the images' patches ``(D,)`` float32.
        entries: features of the regions, minus the mean, rows of length 1 ``(M, D)`` float16, sorted by class.
        counts: entries of each class ``(C,)`` int64.
        identity: see :func:`bank_identity`.
    """

    mean: Tensor
    entries: Tensor
    counts: Tensor
    identity: dict[str, Any]

    def of_class(self, index: int) -> Tensor:
        """The entries of a class ``(M_c, D)`` float16."""
        end = int(self.counts[: index + 1].sum())
        return self.entries[end - int(self.counts[index]) : end]

    def save(self, path: Path) -> None:
        """Write the bank, atomically."""
        tensors = {"mean": self.mean, "entries": self.entries, "counts": self.counts}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_safetensors(tensors, temporary, {"format": FORMAT, "identity": json.dumps(self.identity)})

    @classmethod
    def read(cls, path: Path, model: LanguageSegmentor) -> Bank:
        """Read a bank for a model.

        Raises:
            ReclipError: the file is missing or damaged, or belongs to another CLIP or class list.
        """
        expected = bank_identity(model)
        if not path.is_file():
            raise ReclipError(f"TEST.BANK.FILE {path} does not exist: {_REMEDY}")
        file = read_tensor_file(path, "TEST.BANK.FILE")
        content, metadata = file.content, file.metadata
        if metadata.get("format") != FORMAT:
            raise ReclipError(f"TEST.BANK.FILE {path} is not a bank: {_REMEDY}")
        try:
            identity = json.loads(metadata.get("identity", ""))
        except ValueError as error:
            raise ReclipError(f"TEST.BANK.FILE {path} is damaged (identity): {_REMEDY}") from error
        found = identity if isinstance(identity, dict) else {}
        for key in sorted({*found, *expected}):
            if found.get(key) != json.loads(json.dumps(expected.get(key))):
                raise ReclipError(f"TEST.BANK.FILE {path} was made with another {key}: {_REMEDY}")
        bank = cls(*(content.get(name) for name in ("mean", "entries", "counts")), found)
        if not bank._is_sound(model.num_classes):
            raise ReclipError(f"TEST.BANK.FILE {path} is damaged: {_REMEDY}")
        return bank

    def _is_sound(self, num_classes: int) -> bool:
        if not all(isinstance(value, Tensor) for value in (self.mean, self.entries, self.counts)):
            return False
        shapes = self.mean.ndim == 1 and self.entries.ndim == 2 and self.counts.shape == (num_classes,)
        if not shapes or self.counts.dtype != torch.int64 or self.mean.dtype != torch.float32:
            return False
        if self.entries.dtype != torch.float16 or self.entries.shape[1] != len(self.mean):
            return False
        finite = bool(self.entries.isfinite().all()) and bool(self.mean.isfinite().all())
        return finite and bool((self.counts >= 0).all()) and int(self.counts.sum()) == len(self.entries)
