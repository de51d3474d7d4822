"""Positional embeddings of a Vision Transformer on any patch grid.

Shape letters: (h, w) patch grid, n = h*w patches, p rows of other tokens, E width of the transformer.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor, nn

from reclip_d2.layers import resize_bicubic

MOST_GRIDS = 16
"""Resized embeddings that are kept for a tower; one of 32 x 32 patches of ViT-B takes 3 MiB."""


def patch_numbers(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, from 0: two maps ``(h, w)`` float32. Can be traced for any grid.

    Counted in a map of ones: the ONNX exporter takes the length of a range for a constant, and the sizes of all that is
    computed with it.

    Args:
        patches: a map ``(h, w)`` whose values do not matter.
    """
    ones = torch.ones_like(patches, dtype=torch.float32)
    return ones.cumsum(0) - 1, ones.cumsum(1) - 1


def resize_positional_embedding(
    positional_embedding: Tensor, grid: tuple[int, int], size: tuple[int, int], others: int = 1
) -> Tensor:
    """Resize the patch part of a positional embedding bicubically.

    Args:
        positional_embedding: ``(p + grid_h * grid_w, E)``, the rows of class and register tokens first.
        grid: (grid_h, grid_w) of the pretrained embedding.
        size: (h, w) of the result.
        others: p.

    Returns:
        ``(p + h * w, E)``, with the first p rows unchanged; the input itself if the sizes are equal.
    """
    if grid == size:
        return positional_embedding
    token, patches = positional_embedding[:others], positional_embedding[others:]
    patches = patches.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    # Not all devices have low-precision bicubic kernels; the embedding is tiny, so use float32 or wider.
    dtype = torch.promote_types(patches.dtype, torch.float32)
    patches = resize_bicubic(patches.to(dtype), size)
    patches = patches.flatten(2).squeeze(0).transpose(0, 1).to(token.dtype)
    return torch.cat([token, patches])


def positions_on_grid(visual: nn.Module, size: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """The positional embedding of an image tower on the grid (h, w): ``(1 + n, E)``, the class token's row first.

    Computed once for each of the last :data:`MOST_GRIDS` grids, unless the embedding trains. A change of the tower's
    embedding in place (loading, moving) is noticed, unless it is made through ``.data``.

    Args:
        visual: open_clip ``VisionTransformer``.
        dtype: None for the embedding's.
    """
    return resized_once(visual, visual.positional_embedding, tuple(visual.grid_size), size, dtype)


def resized_once(
    owner: nn.Module,
    source: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype | None = None,
    others: int = 1,
) -> Tensor:
    """:func:`resize_positional_embedding` of an embedding of the module ``owner``, kept as for
    :func:`positions_on_grid`: one embedding a module.

    Args:
        dtype: None for the embedding's.
    """
    dtype = dtype or source.dtype
    if grid == size or not _may_be_kept(source):
        return resize_positional_embedding(source, grid, size, others).to(dtype)
    with _lock:
        kept = _kept.setdefault(owner, _Kept())
    return kept.get(source, grid, size, dtype, others)


def _may_be_kept(source: Tensor) -> bool:
    """Whether the embedding is constant, and neither traced nor one that autograd could not use later."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or source.requires_grad
        or type(source) not in (nn.Parameter, Tensor)
        or source.is_inference()
    )


class _Kept:
    """The resized embeddings of a tower."""

    def __init__(self) -> None:
        self.source: tuple | None = None
        self.by_grid: dict[tuple, Tensor] = {}  # the one used last comes last
        self.in_graphs: dict[int, Tensor] = {}  # CUDA graphs read their memory, whatever happens here

    def get(
        self, source: Tensor, grid: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, others: int = 1
    ) -> Tensor:
        state = (source.data_ptr(), source._version, source.device, source.dtype, grid)
        capturing = source.is_cuda and torch.cuda.is_current_stream_capturing()
        with _lock:
            if state != self.source:
                self.by_grid, self.source = {}, state
            found = self.by_grid.pop((size, dtype), None)
            if found is not None:
                self.by_grid[size, dtype] = found
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = resize_positional_embedding(source, grid, size, others).to(dtype)
            if capturing or type(found) is not Tensor:  # it has no values before the graph is replayed
                return found
            with _lock:
                self.by_grid[size, dtype] = found
                for other in list(self.by_grid)[:-MOST_GRIDS]:
                    del self.by_grid[other]
        elif capturing:
            self.in_graphs[id(found)] = found
        return found


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
