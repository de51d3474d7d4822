"""About fifty small calls of the operators, forward and backward, that cover every kernel, for compute-sanitizer.

Both layouts of the logits, hard and soft masks, numbers of classes below and above the limit of shared memory (504 in
float32), all types, images without a hypothesis, sizes that do not fill a tile, areas too small for float32. Values are
tested in tests/layers; here results must only be finite, otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from reclip_d2.layers import (
    NoiseCounter,
    gumbel_softmax,
    masked_average_pool,
    rectify_and_pool,
    upsample_argmax,
    upsample_cross_entropy,
    upsample_l1,
    use_kernels,
)

Call = tuple[str, Callable[[], list[Tensor]]]
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


class Calls:
    """Makes inputs and calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        """Random numbers."""
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)

    def rows(self, counts: list[int], classes: int) -> tuple[Tensor, Tensor]:
        """class_ids and offsets of hypotheses with the given numbers of classes per image."""
        ids = [torch.randperm(classes, generator=self.generator)[:count] for count in counts]
        return torch.cat(ids), torch.tensor([0, *counts]).cumsum(0)

    def logits(self, images: int, classes: int, patches: int, dtype: torch.dtype, layout: str) -> Tensor:
        """``cn``: as from a convolution; ``nc``: as from a matrix product, classes contiguous."""
        if layout == "cn":
            return self.normal(images, classes, patches, dtype=dtype).transpose(1, 2).requires_grad_()
        return self.normal(images, patches, classes, dtype=dtype).requires_grad_()

    def rectify(
        self,
        classes: int,
        patches: int,
        width: int,
        hard: bool,
        layout: str = "cn",
        dtype: torch.dtype = F32,
        counts: tuple[int, ...] = (5, 0, 1),
        bias: bool = True,
        lift: float = 0.0,
        padding: int = 0,
    ) -> Call:
        """rectify_and_pool with all gradients.

        Args:
            lift: added to the logits of the first class of the hypothesis.
            padding: number of rows of padding; rows and seed are then on the device.
        """
        name = f"rectify_and_pool C{classes} n{patches} D{width} {layout} {str(dtype)[6:]} {'hard' if hard else 'soft'}"

        def call() -> list[Tensor]:
            ids, offsets = self.rows([min(count, classes) for count in counts], classes)
            logits = self.logits(len(counts), classes, patches, dtype, layout)
            if lift:
                with torch.no_grad():
                    logits[:, :, ids[0]] += lift
            wide = torch.promote_types(dtype, F32)
            m_b = self.normal(classes, patches, dtype=wide).t().requires_grad_() if bias else None
            features = self.normal(len(counts), patches, width, dtype=dtype).requires_grad_()
            seed: Tensor | NoiseCounter = torch.tensor([1, 2])
            if padding:
                ids, offsets = torch.cat([ids, ids.new_zeros(padding)]).to(self.device), offsets.to(self.device)
                seed = NoiseCounter(seed, self.device)
            pooled, area = rectify_and_pool(logits, m_b, features, ids, offsets, 0.5, hard, seed)
            inputs = [tensor for tensor in (logits, m_b, features) if tensor is not None]
            return [pooled, area, *torch.autograd.grad((pooled.sum() + area.sum()), inputs)]

        name += (
            f" rows {counts}{f' + {padding}' * bool(padding)}{' no bias' * (not bias)}{f' lift {lift}' * bool(lift)}"
        )
        return name, call

    def masks(self, classes: int, patches: int, hard: bool, layout: str, dtype: torch.dtype = F32) -> Call:
        """gumbel_softmax and its gradient."""

        def call() -> list[Tensor]:
            logits = self.logits(2, classes, patches, dtype, layout)
            masks = gumbel_softmax(logits, 0.5, hard, torch.tensor([1, 2]))
            return [masks, *torch.autograd.grad((masks * self.normal(*masks.shape, dtype=dtype)).sum(), logits)]

        return f"gumbel_softmax C{classes} n{patches} {layout} {str(dtype)[6:]} {'hard' if hard else 'soft'}", call

    def pool(self, classes: int, patches: int, width: int, layout: str, dtype: torch.dtype) -> Call:
        """masked_average_pool and its gradients."""

        def call() -> list[Tensor]:
            ids, offsets = self.rows([4, 0, 1], classes)
            masks = self.logits(3, classes, patches, dtype, layout).detach().softmax(-1).requires_grad_()
            features = self.normal(3, patches, width, dtype=dtype).requires_grad_()
            pooled, area = masked_average_pool(features, masks, ids, offsets)
            return [pooled, area, *torch.autograd.grad(pooled.sum() + area.sum(), [features, masks])]

        return f"masked_average_pool C{classes} n{patches} D{width} {layout} {str(dtype)[6:]}", call

    def labels(self, classes: int, size: tuple[int, int], dtype: torch.dtype, channels_last: bool = False) -> Call:
        """upsample_argmax."""

        def call() -> list[Tensor]:
            grid = self.normal(2, classes, 9, 13, dtype=dtype)
            if channels_last:
                grid = grid.to(memory_format=torch.channels_last)
            return [upsample_argmax(grid, size).float()]

        return f"upsample_argmax C{classes} {size} {str(dtype)[6:]}{' channels last' * channels_last}", call

    def distance(
        self, channels: int, size: tuple[int, int], dtype: torch.dtype = F32, last: bool = False, images: int = 2
    ) -> Call:
        """upsample_l1 with both gradients, student and teacher on different grids."""

        def call() -> list[Tensor]:
            layout = {"memory_format": torch.channels_last if last else torch.contiguous_format}
            student = self.normal(images, channels, 9, 13, dtype=dtype).to(**layout).requires_grad_()
            teacher = self.normal(images, channels, 5, 7, dtype=dtype).to(**layout).requires_grad_()
            valid = self.normal(images, *size) > -0.5
            loss = upsample_l1(student, teacher, valid)
            return [loss, *torch.autograd.grad(loss.sum(), [student, teacher])]

        return f"upsample_l1 D{channels} {size} {str(dtype)[6:]}{' channels last' * last}", call

    def entropy(self, classes: int, size: tuple[int, int], dtype: torch.dtype = F32, last: bool = False) -> Call:
        """upsample_cross_entropy and its gradient, with pixels that do not count."""

        def call() -> list[Tensor]:
            layout = {"memory_format": torch.channels_last if last else torch.contiguous_format}
            logits = self.normal(2, classes, 9, 13, dtype=dtype).to(**layout).requires_grad_()
            labels = torch.randint(-1, classes, (2, *size), generator=self.generator).to(self.device)
            loss = upsample_cross_entropy(logits, labels)
            return [loss, *torch.autograd.grad(loss.sum(), logits)]

        return f"upsample_cross_entropy C{classes} {size} {str(dtype)[6:]}{' channels last' * last}", call

    def everything(self) -> Iterator[Call]:
        """All calls."""
        for hard in (True, False):
            for layout in ("cn", "nc"):
                for classes, patches, width in ((20, 65, 130), (150, 65, 64), (504, 33, 64), (600, 33, 68)):
                    yield self.rectify(classes, patches, width, hard, layout)
            for dtype in (F64, F16, BF16):
                yield self.rectify(20, 65, 130, hard, dtype=dtype)
            yield self.rectify(600, 33, 64, hard, dtype=F64)
            yield self.rectify(1, 1, 1, hard, counts=(1,))
            yield self.rectify(20, 33, 64, hard, counts=(0, 0), bias=False)
            yield self.rectify(150, 65, 64, hard, counts=(94, 33), bias=False)
            yield self.rectify(20, 33, 8, hard, counts=(2, 0, 1) * 11)  # several images per block
            yield self.rectify(20, 65, 130, hard, padding=7)
        yield self.rectify(20, 65, 64, False, lift=-60.0)  # exp(-120): too small for float32
        yield self.rectify(600, 33, 64, False, lift=-60.0)
        for hard in (True, False):
            yield self.masks(20, 65, hard, "cn")
            yield self.masks(600, 33, hard, "nc", BF16)
        yield self.pool(20, 65, 130, "cn", F32)
        yield self.pool(150, 33, 64, "nc", BF16)
        yield self.pool(20, 65, 64, "cn", F64)
        yield self.labels(20, (61, 47), F32)
        yield self.labels(171, (36, 52), F32, channels_last=True)
        yield self.labels(20, (4, 5), BF16)
        yield self.labels(20, (61, 47), F16)
        for size, dtype, last in (((61, 147), F32, False), ((36, 52), F32, True), ((4, 5), BF16, False)):
            yield self.distance(133, size, dtype, last)
            yield self.entropy(150, size, dtype, last)
        for dtype in (F64, F16):
            yield self.distance(20, (61, 47), dtype)
            yield self.entropy(1, (61, 47), dtype)

    def profile(self) -> Iterator[Call]:
        """A few calls with the papers' sizes, for the profiler."""
        yield self.rectify(150, 1024, 512, True, counts=(22,) * 16)
        yield self.rectify(150, 1024, 512, True, "nc", counts=(22,) * 16)
        yield self.labels(150, (512, 683), F32)
        yield self.distance(512, (520, 520))
        yield self.entropy(150, (520, 520))


def main() -> int:
    """Make the calls; 1 if a result is not finite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", choices=("everything", "profile"), default="everything")
    options = parser.parse_args()
    calls, made, bad = Calls(torch.device(options.device)), 0, 0
    with use_kernels(True):
        for name, call in getattr(calls, options.only)():
            made += 1
            if not all(bool(result.isfinite().all()) for result in call()):
                print(f"not finite: {name}")
                bad += 1
    print(f"{made} calls, {bad} with results that are not finite")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
