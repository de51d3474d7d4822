"""Say why a loss is not finite: which key is likely to be wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from reclip_d2.errors import ReclipError


def check_finite(
    losses: Mapping[str, Tensor],
    *,
    trained: nn.Module,
    frozen_features: Tensor,
    logits: Callable[[], Tensor],
    temperatures: Mapping[str, float],
) -> None:
    """Raise :class:`ReclipError` for a loss that is NaN or infinite; the message names the cause and the key.

    All losses are checked at once: on a GPU the host waits for a single flag. The images are never the cause: their
    pixels are whole numbers, read and checked before.

    Args:
        losses: of one batch, scalars.
        trained: the module whose weights train.
        frozen_features: what the frozen CLIP has made of the images, any shape.
        logits: gives the mask logits of the trained module, before any temperature; called only for the message.
        temperatures: by their keys, as they are used.
    """
    if not losses or bool(torch.isfinite(torch.stack([value.detach() for value in losses.values()])).all()):
        return
    bad = next(name for name, value in losses.items() if not torch.isfinite(value))
    with torch.no_grad():
        raise ReclipError(f"{bad} is not finite: {_cause(trained, frozen_features, logits(), temperatures)}")


def _cause(trained: nn.Module, frozen_features: Tensor, logits: Tensor, temperatures: Mapping[str, float]) -> str:
    device = frozen_features.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16
    if not torch.isfinite(frozen_features).all():
        precision = "set MODEL.CLIP.AUTOCAST float32 and SOLVER.AMP.ENABLED False, or check MODEL.CLIP.PRETRAINED"
        return f"CLIP's image features are not: {precision}"
    weights = [p for p in trained.parameters() if p.requires_grad]
    if not all(bool(torch.isfinite(p).all()) for p in weights):
        return "the training has diverged, its weights are not: lower SOLVER.BASE_LR"
    if not torch.isfinite(logits).all():
        precision = ", or set SOLVER.AMP.DTYPE bfloat16" if half else ""
        return f"the mask logits overflow, so the weights have grown too large: lower SOLVER.BASE_LR{precision}"
    key = min(temperatures, key=lambda name: temperatures[name])
    largest = float(logits.abs().max())
    return (
        f"mask logits of up to {largest:.3g} are divided by temperatures, the lowest of which is {key}"
        f" {temperatures[key]:.3g}: raise it, or lower SOLVER.BASE_LR"
    )
