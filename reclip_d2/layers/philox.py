"""Philox4x32-10, the counter-based random number generator behind the Gumbel noise, in plain PyTorch.

A counter-based generator is a pure function of (seed, offset, element). The noise is never stored: the backward pass
recomputes it, and CPU, CUDA and this module draw the same numbers. Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", SC 2011; the compiled twin is ``csrc/philox.h``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def _mulhilo(multiplier: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit halves of ``multiplier * value``; two 16-bit halves keep every product below 2**49."""
    low = multiplier * (value & 0xFFFF)
    high = multiplier * (value >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: Sequence[Tensor], key: Sequence[int | Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of equal or broadcastable shapes, each a 32-bit word in 0 .. 2**32 - 1.
        key: two 32-bit words, numbers or int64 tensors that broadcast.

    Returns:
        Four int64 tensors, each a random 32-bit word in 0 .. 2**32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = (word & _MASK32 for word in key)
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _mulhilo(_MULTIPLIERS[0], c0)
        high1, low1 = _mulhilo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def draw_seed() -> Tensor:
    """Draw the (seed, offset) pair of one noise field from PyTorch's default CPU generator.

    ``torch.manual_seed`` therefore controls all noise, on every device, and drawing never synchronises with a GPU.

    Returns:
        int64 CPU tensor of shape (2,), both entries in 0 .. 2**63 - 2.
    """
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device="cpu")


class NoiseCounter:
    """Seeds in device memory that a CUDA graph can draw: each call of :meth:`next` gives a new one.

    ``seed=counter`` is accepted by the operators that draw noise. The counter is advanced by an operation on the
    device, which is part of a graph that is captured around the operator: each replay draws new noise, without the
    host. Two counters set to the same seed draw the same noise, on any device.
    """

    def __init__(self, seed: Tensor, device: torch.device | str = "cpu") -> None:
        """
        Args:
            seed: int64 tensor (2,) from :func:`draw_seed`: the first that :meth:`next` gives.
            device: device of the operators' logits.
        """
        self.state = seed.detach().to(device, copy=True)

    def set(self, seed: Tensor) -> None:
        """Continue with another seed; without waiting for the GPU if ``seed`` is on it or in pinned memory."""
        self.state.copy_(seed, non_blocking=True)

    def next(self) -> Tensor:
        """The seed (2,) of the next noise field; advances the counter, the second number, by one."""
        seed = self.state.clone()
        self.state[1] += 1
        return seed


def seed_for(seed: Tensor | NoiseCounter | None) -> Tensor:
    """The seed of one noise field: given, the next of a counter, or drawn by :func:`draw_seed`."""
    if seed is None:
        return draw_seed()
    return seed.next() if isinstance(seed, NoiseCounter) else seed


def gumbel_noise(
    shape: Sequence[int], seed: Tensor, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard Gumbel(0, 1) noise addressed by (seed, offset, element).

    Element e is the row-major index in ``shape``. It takes word e & 3 of Philox4x32-10 with the counter
    (lo32(e >> 2), hi32(e >> 2), lo32(offset), hi32(offset)) and the key (lo32(seed), hi32(seed)). The word x becomes
    u = ((x >> 9) + 0.5) * 2**-23, exact in float32 and strictly inside (0, 1), and the noise is -log(-log(u)).

    Args:
        shape: shape of the noise, (B, n, C) for logits.
        seed: int64 tensor of shape (2,) from :func:`draw_seed`.
        device: device of the noise.
        dtype: float64 is computed in float64; every other floating dtype in float32, then rounded.

    Returns:
        Tensor of ``shape``, contiguous, values in [-2.81, 16.64].
    """
    if not dtype.is_floating_point:
        raise TypeError(f"gumbel_noise: `dtype` must be a floating dtype, got {dtype}")
    if seed.dtype != torch.int64 or tuple(seed.shape) != (2,):
        raise ValueError(f"gumbel_noise: `seed` must be int64 of shape (2,), got {seed.dtype} {tuple(seed.shape)}")
    key, offset = seed.to(device)  # not read by the host
    numel = math.prod(shape)
    index = torch.arange((numel + 3) // 4, dtype=torch.int64, device=device)
    words = philox4x32(
        (index & _MASK32, index >> 32, offset & _MASK32, (offset >> 32) & _MASK32),
        (key & _MASK32, (key >> 32) & _MASK32),
    )
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    bits = torch.stack(torch.broadcast_tensors(*words), dim=1).flatten()[:numel] >> 9
    uniform = (bits.to(compute_dtype) + 0.5) * 2.0**-23
    return (-torch.log(-torch.log(uniform))).to(dtype).view(tuple(shape))
