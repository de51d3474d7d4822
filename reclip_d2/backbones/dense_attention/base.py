"""The interface of dense attentions, and their registry for ``MODEL.CLIP.DENSE_ATTENTION``.

CLIP's last block is trained for its class token only; for dense features each patch must stay local. A dense attention
replaces that block: it maps the block's input tokens to output patches.

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

from reclip_d2.backbones.dense_attention.feedback import Feedback
from reclip_d2.config.checks import value_at
from reclip_d2.config.keys import KEYS
from reclip_d2.errors import ReclipError

KEY = "MODEL.CLIP.DENSE_ATTENTION"


class TransformerBlock(abc.ABC):
    """The parts of a pre-norm transformer block, of any library: ``x + output(A v)``, then ``x + mlp(x)``.

    Built for one forward pass on one grid: :meth:`queries` and :meth:`keys` include any rotary embedding of the grid.
    """

    num_heads: int

    @abc.abstractmethod
    def norm(self, tokens: Tensor) -> Tensor:
        """First norm, of the block's input ``(B, T, E)``: the input of queries, keys and values."""

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
        """Output projection and layer scale of attended values ``(B, T, E)``: what the first residual adds."""

    @abc.abstractmethod
    def mlp(self, tokens: Tensor) -> Tensor:
        """Second norm, MLP and layer scale ``(B, T, E)``: what the second residual adds."""

    def split_heads(self, packed: Tensor) -> Tensor:
        """``(B, T, E)`` to ``(B, heads, T, E / heads)``."""
        # Not unflatten: ONNX's exporter takes the other sizes of its result, here T, for constants.
        return packed.reshape(packed.shape[0], packed.shape[1], self.num_heads, -1).transpose(1, 2)

    def merge_heads(self, heads: Tensor) -> Tensor:
        """``(B, heads, T, E / heads)`` to ``(B, T, E)``."""
        return heads.transpose(1, 2).flatten(2)


@dataclasses.dataclass(frozen=True)
class BlockInput:
    """A block and its input tokens ``(B, T, E)``."""

    block: TransformerBlock
    tokens: Tensor


class EarlierBlocks:
    """Runs the blocks before the last, and keeps what a dense attention needs of them.

    Attributes:
        inputs: :attr:`AttentionInput.earlier`.
        kept: :attr:`AttentionInput.kept`.
    """

    def __init__(self, wanted: Sequence[int], attention: DenseAttention | None = None, class_tokens: int = 1) -> None:
        """
        Args:
            wanted: indices of the blocks whose inputs are kept.
            attention: may run these blocks; None if the tower runs all.
            class_tokens: p.
        """
        self.inputs: dict[int, BlockInput] = {}
        self.kept: Tensor | None = None
        self._wanted, self._attention, self._class_tokens = wanted, attention, class_tokens

    def __call__(self, index: int, block: TransformerBlock, tokens: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """Output tokens ``(B, T, E)`` of a block.

        Args:
            own: the tower's own forward pass.
        """
        if index not in self._wanted:
            return own(tokens)
        self.inputs[index] = BlockInput(block, tokens)
        result = None
        if self._attention is not None:
            result = self._attention.run_earlier(self.inputs[index], self._class_tokens, self.kept)
        if result is None:
            return own(tokens)
        tokens, self.kept = result
        return tokens


@dataclasses.dataclass(frozen=True)
class AttentionInput:
    """Input of a dense attention.

    Attributes:
        images: ``(B, 3, H, W)``, normalised for the CLIP: for helper vision models.
        block: the last block.
        tokens: its input ``(B, T, E)``, the p class tokens first.
        grid: (h, w). In a trace these are values of the graph: compute with them, do not convert them to ints.
        class_tokens: p; 1 for a CLIP, 0 for towers with attentional pooling.
        valid: ``(B, n)`` bool, patches in the image, not in padding; None if no image is padded.
        earlier: inputs of the blocks in :meth:`DenseAttention.earlier_blocks`, by index.
        kept: what :meth:`DenseAttention.run_earlier` has kept of these blocks; None for nothing.
        count: number of the tower's blocks.
        is_pooled: the tower pools its patches by attention after the last block (SigLIP, CoCa). The block is then not
            trained for a class token, and Z is the value path of the pooling.
        feedback: a change of the scores, for attentions that :attr:`DenseAttention.takes_feedback`; None for none.
    """

    images: Tensor
    block: TransformerBlock
    tokens: Tensor
    grid: tuple[int, int]
    class_tokens: int = 1
    valid: Tensor | None = None
    earlier: Mapping[int, BlockInput] = dataclasses.field(default_factory=dict)
    kept: Tensor | None = None
    count: int = 1
    is_pooled: bool = False
    feedback: Feedback | None = None

    @property
    def patches(self) -> Tensor:
        """The patches' tokens ``(B, n, E)``."""
        return self.tokens[:, self.class_tokens :]


class DenseAttention(nn.Module, abc.ABC):
    """Replaces the last block for the patches. Subclasses define :meth:`forward`, and register with
    ``@DENSE_ATTENTION_REGISTRY.register()`` under their ``name``.

    A helper model is a submodule: like the backbone, it is moved to the device, frozen, and not in checkpoints. The
    tower's weights come with each :class:`AttentionInput` and must not be stored.

    Attributes:
        name: value of ``MODEL.CLIP.DENSE_ATTENTION``.
        options: config key of each constructor argument. The attribute of the same name holds its value.
        other_keys: config keys that ``from_config`` reads besides, such as a helper model's.
        uses_mlp: whether the last block's MLP is used; only then does it train with ``MODEL.CLIP.FINE_TUNE``.
        upsampling: integer factor from the patch grid to the output grid, for helpers with smaller patches.
        takes_feedback: whether it changes its scores by :attr:`AttentionInput.feedback`.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, str]] = {}
    other_keys: ClassVar[Sequence[str]] = ()
    uses_mlp: bool = False
    upsampling: int = 1
    takes_feedback: ClassVar[bool] = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> DenseAttention:
        """Build the attention of a config, with the values of its :attr:`options`."""
        return cls(**{argument: value_at(cfg, key) for argument, key in cls.options.items()})

    def earlier_blocks(self, count: int) -> Sequence[int]:
        """Indices of the blocks, out of ``count``, whose inputs are needed in :attr:`AttentionInput.earlier`."""
        return ()

    def run_earlier(self, earlier: BlockInput, class_tokens: int, kept: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Run one of :meth:`earlier_blocks` in place of the tower, to keep what the tower would not. Not called for
        padded images.

        Args:
            class_tokens: p.
            kept: what was kept of the blocks before; None for nothing.

        Returns:
            Output tokens ``(B, T, E)``, and what is kept now, :attr:`AttentionInput.kept`; by default None: the tower
            runs the block.
        """
        return None

    @abc.abstractmethod
    def forward(self, inputs: AttentionInput) -> Tensor:
        """Output patches ``(B, n', E)`` in place of the last block's, before the tower's final norm and projection.

        n' is ``upsampling**2 * n``, in row-major order; patches that are not :attr:`AttentionInput.valid` may have any
        finite values. Export needs operators that can be traced for ONNX opset 17.
        """

    def refine(self, features: Tensor, inputs: AttentionInput) -> Tensor:
        """Refine the projected features ``(B, n', D)`` before they are normalised to length 1; by default unchanged."""
        return features

    def identity(self) -> dict[str, Any]:
        """What checkpoints record and compare, as JSON values: the name, and options that differ from their defaults.
        Attentions with a helper model add a hash of its weights."""
        values = {key: getattr(self, argument) for argument, key in self.options.items()}
        return {KEY: self.name} | {key: value for key, value in values.items() if value != KEYS[key].default}


class _RegistryByName(Registry):
    """A registry of classes by their attribute ``name``."""

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
Registry of :class:`DenseAttention` classes by their ``name``; they are built by ``from_config``.
"""


def dense_attention_class(name: str) -> type[DenseAttention]:
    """The attention class of this name; raise :class:`ReclipError` if there is none."""
    if name not in DENSE_ATTENTION_REGISTRY:
        names = ", ".join(sorted(known for known, _ in DENSE_ATTENTION_REGISTRY))
        raise ReclipError(f"{KEY} {name!r} is not registered: choose one of {names}")
    return DENSE_ATTENTION_REGISTRY.get(name)


def build_dense_attention(cfg: CfgNode) -> DenseAttention:
    """Build the attention of ``MODEL.CLIP.DENSE_ATTENTION``.

    Raises:
        ReclipError: it is not registered, or an option of another attention is set.
    """
    attention = dense_attention_class(cfg.MODEL.CLIP.DENSE_ATTENTION)
    owners: dict[str, list[str]] = {}
    for name, other in DENSE_ATTENTION_REGISTRY:
        for key in (*other.options.values(), *other.other_keys):
            owners.setdefault(key, []).append(name)
    for key in sorted(owners.keys() - {*attention.options.values(), *attention.other_keys}):
        if (value := value_at(cfg, key)) != KEYS[key].default:
            names = ", ".join(sorted(owners[key]))
            raise ReclipError(f"{key} {value} is for {KEY} {names}, not {attention.name}: remove one of the two keys")
    return attention.from_config(cfg)
