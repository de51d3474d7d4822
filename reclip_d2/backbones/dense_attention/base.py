"""The contract of a dense attention, and the registry that ``MODEL.CLIP.DENSE_ATTENTION`` reads.

A CLIP's last block mixes all patches into its class token; for a map of features each patch must stay local. The
attention takes the last block's place: it gets the tokens that enter the block and gives the patches that leave it.

Shape letters: B images, (H, W) size in pixels, (h, w) patch grid, n = h*w patches, p class (and register) tokens, which
come before the patches, T = p + n tokens, E width of the image transformer, D width of the joint embedding.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from reclip_d2.errors import ReclipError

KEY = "MODEL.CLIP.DENSE_ATTENTION"


class TransformerBlock(abc.ABC):
    """A pre-norm transformer block in parts, whatever library it comes from: ``x + output(A v)``, then ``x + mlp(x)``.

    Built for one forward pass over one grid: rotary embeddings of that grid are in :meth:`queries` and :meth:`keys`.
    """

    num_heads: int

    @abc.abstractmethod
    def norm(self, tokens: Tensor) -> Tensor:
        """What queries, keys and values are projected from: ``(B, T, E)`` of the block's input ``(B, T, E)``."""

    @abc.abstractmethod
    def queries(self, normed: Tensor) -> Tensor:
        """Queries ``(B, T, E)`` of :meth:`norm`'s output, not yet divided by the square root of the head width."""

    @abc.abstractmethod
    def keys(self, normed: Tensor) -> Tensor:
        """Keys ``(B, T, E)`` of :meth:`norm`'s output."""

    @abc.abstractmethod
    def values(self, normed: Tensor) -> Tensor:
        """Values ``(B, T, E)`` of :meth:`norm`'s output."""

    @abc.abstractmethod
    def output(self, mixed: Tensor) -> Tensor:
        """Output projection and layer scale of mixed values ``(B, T, E)``: what the residual connection adds."""

    @abc.abstractmethod
    def mlp(self, tokens: Tensor) -> Tensor:
        """What the second residual connection adds, ``(B, T, E)``: norm, MLP and layer scale."""

    def split_heads(self, packed: Tensor) -> Tensor:
        """``(B, T, E)`` to ``(B, heads, T, E / heads)``."""
        return packed.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge_heads(self, heads: Tensor) -> Tensor:
        """``(B, heads, T, E / heads)`` to ``(B, T, E)``."""
        return heads.transpose(1, 2).flatten(2)


@dataclasses.dataclass(frozen=True)
class BlockInput:
    """A block and the tokens ``(B, T, E)`` that enter it."""

    block: TransformerBlock
    tokens: Tensor


@dataclasses.dataclass(frozen=True)
class AttentionInput:
    """What a dense attention gets.

    Attributes:
        images: ``(B, 3, H, W)``, normalised for the CLIP: for helper vision models.
        block: the last block.
        tokens: ``(B, T, E)`` that enter it, the p class tokens first.
        grid: (h, w). In a trace these are values of the graph: compute with them, do not turn them into ints.
        class_tokens: p; 1 for a CLIP, 0 for towers that pool by attention.
        valid: ``(B, n)`` bool, patches that lie in the image; None if no image is padded.
        earlier: inputs of the blocks that :meth:`DenseAttention.earlier_blocks` names, by their index.
    """

    images: Tensor
    block: TransformerBlock
    tokens: Tensor
    grid: tuple[int, int]
    class_tokens: int = 1
    valid: Tensor | None = None
    earlier: Mapping[int, BlockInput] = dataclasses.field(default_factory=dict)

    @property
    def patches(self) -> Tensor:
        """The patches' tokens ``(B, n, E)``."""
        return self.tokens[:, self.class_tokens :]


class DenseAttention(nn.Module, abc.ABC):
    """Takes the place of the last block for the patches. Subclasses define :meth:`forward`, and are registered by
    ``@DENSE_ATTENTION_REGISTRY.register()`` under their ``name``.

    A helper model is a submodule: it moves to the backbone's device and stays frozen and out of checkpoints with it.
    The tower's own weights come with each :class:`AttentionInput` and must not be kept.

    Attributes:
        name: what ``MODEL.CLIP.DENSE_ATTENTION`` says.
        uses_mlp: the last block's MLP takes part. With ``MODEL.CLIP.FINE_TUNE`` it trains only then.
        upsampling: integer factor from the patch grid to the grid of the output, for helpers with smaller patches.
    """

    name: ClassVar[str]
    uses_mlp: bool = False
    upsampling: int = 1

    @classmethod
    def from_config(cls, cfg: CfgNode) -> DenseAttention:
        """Build it for a config; by default without arguments."""
        return cls()

    def earlier_blocks(self, count: int) -> Sequence[int]:
        """Indices of the blocks, of ``count`` in all, whose inputs :attr:`AttentionInput.earlier` shall hold."""
        return ()

    @abc.abstractmethod
    def forward(self, inputs: AttentionInput) -> Tensor:
        """The patches ``(B, n', E)`` as they leave the last block, before the tower's final norm and projection.

        n' is ``upsampling**2 * n``, row by row; patches that are not :attr:`AttentionInput.valid` may hold anything
        finite. Only operators that can be traced for ONNX opset 17 can be exported.
        """

    def refine(self, features: Tensor, inputs: AttentionInput) -> Tensor:
        """Change the projected features ``(B, n', D)`` before they are normalised to length 1; by default unchanged."""
        return features

    def identity(self) -> dict[str, Any]:
        """What checkpoints record of it and compare, as plain values for JSON: by default the name. A helper model adds
        a hash of its weights, and keys that change the features are added where they do not have their defaults."""
        return {KEY: self.name}


class _RegistryByName(Registry):
    """A registry whose names are the classes' attribute ``name``."""

    def register(self, obj: type[DenseAttention] | None = None) -> Callable[[type], type] | None:
        def decorate(attention: type[DenseAttention]) -> type[DenseAttention]:
            self._do_register(attention.name, attention)
            return attention

        if obj is None:
            return decorate
        decorate(obj)
        return None


DENSE_ATTENTION_REGISTRY = _RegistryByName("DENSE_ATTENTION")
DENSE_ATTENTION_REGISTRY.__doc__ = """
Registry of :class:`DenseAttention` classes, by their ``name``. The registered class is built by its ``from_config``.
"""


def dense_attention_class(name: str) -> type[DenseAttention]:
    """The class that ``MODEL.CLIP.DENSE_ATTENTION`` names, or raise :class:`ReclipError`."""
    if name not in DENSE_ATTENTION_REGISTRY:
        names = ", ".join(sorted(known for known, _ in DENSE_ATTENTION_REGISTRY))
        raise ReclipError(f"{KEY} {name!r} is not registered: choose one of {names}")
    return DENSE_ATTENTION_REGISTRY.get(name)


def build_dense_attention(cfg: CfgNode) -> DenseAttention:
    """The attention that ``MODEL.CLIP.DENSE_ATTENTION`` names.

    Raises:
        ReclipError: it is not registered, or a key of the value path is set for another attention.
    """
    keys = cfg.MODEL.CLIP
    attention = dense_attention_class(keys.DENSE_ATTENTION)
    if attention.name != "value" and not keys.VALUE_PATH_RESIDUAL:
        raise ReclipError(
            f"MODEL.CLIP.VALUE_PATH_RESIDUAL False is for {KEY} value, not {attention.name}: remove one of the two keys"
        )
    return attention.from_config(cfg)
